"""Plans of teams, as data: which shapes fit on chip, and what limits the teams."""

import ctypes
import itertools

import pytest
import torch

from bn_ext import testing

from . import build
from .batch_norm import Settings, kernels
from .device import Fault
from .operators import CudaOnCpu
from .structs import H200, Machine, Plan, Shape
from .test_plan import RESNET50
from .test_plan import check as check_plan
from .test_single_pass import KIB, read_again

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@pytest.mark.parametrize("largest", ["none", "block", "cluster", "grid"])
def test_the_largest_teams_may_be_named(largest: str) -> None:
    """As BN_EXT_CUDA_TEAMS does."""
    machine = Machine(H200.multiprocessors, H200.shared_bytes, True, True, True)
    kernels().device.call("batch_norm_limit_teams", largest, ctypes.byref(machine))
    shapes = [(32, 2048, 49), (32, 64, 56 * 56), (256, 64, 112 * 112)]
    teams = [kernels().make_plan(Shape(*s, False), 2, 16, machine, False, 1).team_name for s in shapes]
    most = ["none", "block", "cluster", "grid"].index(largest)
    assert teams[:most] == ["block", "cluster", "grid"][:most]
    assert teams[most:] == ["none"] * (3 - most)
    assert machine.pdl  # which BN_EXT_CUDA_PDL disables


def test_no_such_team() -> None:
    with pytest.raises(Fault, match="no such team"):
        kernels().device.call("batch_norm_limit_teams", "blocks", ctypes.byref(Machine(1)))


def plan_of(
    shape: Shape, value_bytes: int, machine: Machine, tiles: int, for_mask: bool = False, keeps_mask: bool = False
) -> Plan:
    """A plan that is one, with its shared memory within what two blocks of a multiprocessor may have."""
    plan = kernels().make_plan(shape, value_bytes, 16, machine, for_mask, tiles, keeps_mask)
    if plan.team_name == "none":
        check_plan(plan, shape, value_bytes, 16)
        return plan
    assert plan.rows_of_segment * plan.segments >= plan.rows
    assert (plan.segments - 1) * plan.rows_of_segment < plan.rows
    assert 0 <= plan.row_lanes * plan.rows_per_thread - plan.rows_of_segment < plan.row_lanes
    assert plan.columns > 1 or plan.rows_of_segment % 8 == 0
    assert 0 < plan.kept_rows <= plan.rows_per_thread <= 256
    assert 2 * (kernels().single_pass_bytes(plan, tiles, value_bytes) + KIB) <= machine.shared_bytes
    blocks = 2 * machine.multiprocessors
    assert (plan.segments == 1) == (plan.team_name == "block")
    if plan.team_name == "cluster":
        assert machine.clusters
        assert plan.segments <= min(8, blocks)
    if plan.team_name == "grid":
        assert machine.cooperative
        assert plan.teams == plan.teams_at_a_time
    else:
        assert plan.teams == plan.slices
    assert plan.teams_at_a_time == min(plan.slices, blocks // plan.segments)
    return plan


@pytest.mark.parametrize("value_bytes", [2, 4])
@pytest.mark.parametrize("n", [1, 8, 32, 128, 256])
def test_every_channel_of_resnet50_fits_on_an_h200(n: int, value_bytes: int) -> None:
    """NCHW: 2N forward and 3N backward, with masks and without; at N = 32 in 16 bits clusters do, but for one layer."""
    for (channels, size), tiles, for_mask in itertools.product(RESNET50, (1, 2), (False, True)):
        keeps_mask = for_mask and tiles == 2
        plan = plan_of(Shape(n, channels, size * size, False), value_bytes, H200, tiles, for_mask, keeps_mask)
        assert plan.keeps_mask == keeps_mask
        assert plan.team_name != "none"
        assert read_again(plan) == 0, (channels, size)
        if n == 32 and value_bytes == 2 and size < 112 and not keeps_mask:
            assert plan.team_name in ("block", "cluster")


def test_channels_last_on_an_h200() -> None:
    """bfloat16: all of N = 32 but the largest backward; at N = 256 all of 28 x 28, and of 56 x 56 a part."""

    def again(n: int, channels: int, size: int, tiles: int) -> float:
        return read_again(plan_of(Shape(n, channels, size * size, True), 2, H200, tiles))

    for (channels, size), tiles, n in itertools.product(RESNET50, (1, 2), (1, 8, 128)):
        assert (again(n, channels, size, tiles) == 0) == (n * size * size * tiles <= 32 * 112 * 112)
    for (channels, size), tiles in itertools.product(RESNET50, (1, 2)):
        assert (again(32, channels, size, tiles) == 0) == (size * tiles < 224)
        assert (again(256, channels, size, tiles) == 0) == (size < 56)
        assert (again(256, channels, size, tiles) < (0.5, 0.75)[tiles - 1]) == (size < 112)


def test_any_shape() -> None:
    """Random shapes of up to 2^40 values on random machines."""
    generator = torch.Generator().manual_seed(0)

    def draw(most: float) -> float:
        return float(torch.rand((), generator=generator)) * most

    for _ in range(10_000):
        value_bytes = (2, 4, 8)[int(draw(3))]
        n, c, s = (int(2 ** draw(13.5)) for _ in range(3))
        shared = int(draw(230)) * KIB
        machine = Machine((1, 16, 132)[int(draw(3))], shared, draw(1) < 0.5, draw(1) < 0.7)
        plan_of(
            Shape(n, c, s, draw(1) < 0.5 or s == 1),
            value_bytes,
            machine,
            1 + int(draw(2)),
            draw(1) < 0.3,
            draw(1) < 0.3,
        )


def test_rows_that_are_read_once_are_not_the_last_to_leave_the_cache() -> None:
    """Without dx no row of a backward pass is read again."""
    case = testing.Case((4, 64, 30, 30), torch.bfloat16, "channels_last")
    inputs = testing.make_inputs(case)
    for wants_dx in (True, False):
        operator = CudaOnCpu(Settings(Machine(4, 64 * KIB, False, True, evict_last=True)))
        x, weight = inputs.input.clone().requires_grad_(wants_dx), inputs.weight.clone().requires_grad_()
        y = operator(x, None, None, weight, inputs.bias, True, 0.1, 1e-5)
        torch.autograd.grad(y, [weight, *[x] * wants_dx], inputs.dy)
        assert operator.calls[1].plan.spilled_rows > 0
        assert operator.calls[1].plan.evicts_last == wants_dx
