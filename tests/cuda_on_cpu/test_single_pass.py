"""Passes of one kernel, whose teams of blocks hold a slice each: when they are chosen, and what they move."""

import itertools

import pytest
import torch

from bn_ext import testing

from . import build
from .batch_norm import Settings
from .device import POLICIES
from .fused import check
from .operators import Call, CudaOnCpu
from .structs import MULTI_KERNEL, OF_H200, Machine, Plan
from .tiles import awaited_later

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

LAYOUTS = ["contiguous", "channels_last"]
LAYOUTS_OF_TORCH = {"contiguous": "contiguous_format", "channels_last": "channels_last"}
KIB = 1024

# Small devices and tensors, by the teams that they lead to.
ONE = Machine(1, OF_H200, pdl=True)
CLUSTERS = Machine(4, 64 * KIB, True, False, True)
GRIDS = Machine(4, 64 * KIB, False, True)
TEAMS = {
    "block": (ONE, (8, 64, 14, 14), "contiguous"),
    "block, channels_last": (ONE, (3, 32, 6, 7), "channels_last"),
    "cluster": (CLUSTERS, (8, 6, 40, 40), "contiguous"),
    "cluster, narrow planes": (CLUSTERS, (64, 64, 7, 7), "contiguous"),
    "cluster, channels_last": (CLUSTERS, (8, 96, 12, 12), "channels_last"),
    "grid": (GRIDS, (8, 7, 40, 40), "contiguous"),
    "grid, narrow planes": (GRIDS, (64, 64, 7, 7), "contiguous"),
    "grid, channels_last": (GRIDS, (8, 96, 12, 12), "channels_last"),
    "grid, too large for clusters": (Machine(6, 48 * KIB, True, True), (12, 2, 64, 64), "contiguous"),
}
SPILLING = {
    "cluster": (Machine(2, 48 * KIB, True, True), (4, 3, 80, 80), "contiguous"),
    "cluster, channels_last": (Machine(2, 64 * KIB, True, True), (4, 96, 30, 30), "channels_last"),
    "grid": (Machine(5, 48 * KIB, True, True), (5, 3, 128, 128), "contiguous"),
    "grid, narrow planes": (Machine(2, 64 * KIB, False, True), (128, 64, 7, 7), "contiguous"),
    "grid, channels_last": (Machine(2, 64 * KIB, False, True), (4, 96, 30, 30), "channels_last"),
}
# Slices of so many channels that no block merges the sums of all blocks.
WAITING_TWICE = {
    "cluster, waits twice": (Machine(4, 128 * KIB, True, True), (8, 526, 6, 6), "channels_last"),
    "grid, waits twice": (Machine(4, 128 * KIB, False, True), (8, 526, 6, 6), "channels_last"),
}


def passes(case: testing.Case, settings: Settings) -> list[Call]:
    """A forward and a backward pass whose results are right."""
    operator = CudaOnCpu(settings)
    shares = testing.check(operator, case)
    assert max(shares.values()) <= 1, shares
    return operator.calls


def read_again(plan: Plan) -> float:
    """The part of each tensor that the teams do not keep."""
    return 1.0 if plan.team_name == "none" else plan.spilled_rows / plan.rows


def assert_moves_what_is_planned(calls: list[Call], size: int) -> None:
    """Each tensor once, and what does not fit twice; in one launch, with little besides."""
    for call, tensors in zip(calls, (1, 2), strict=True):
        assert call.launches == 1
        moved = call.counters["activation"]
        assert (moved.bytes_read, moved.bytes_written) == (round(tensors * size * (1 + read_again(call.plan))), size)
        assert moved.sector_bytes_read <= 1.06 * moved.bytes_read
        exchanged = call.counters["workspace"]
        assert exchanged.bytes_written <= 0.06 * size
        assert (exchanged.bytes_written > 0) == (call.plan.team_name == "grid")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(testing.TOLERANCE))
@pytest.mark.parametrize("name", TEAMS)
def test_every_tensor_is_read_once(name: str, dtype: torch.dtype) -> None:
    """2N forward, 3N backward, by all teams, several of them at a time and one after the other."""
    machine, shape, layout = TEAMS[name]
    if dtype in (torch.float32, torch.float64):
        shape = (max(1, shape[0] * 2 // dtype.itemsize), *shape[1:])  # as many bytes
    for seed, policy in enumerate(POLICIES):
        calls = passes(testing.Case(shape, dtype, layout), Settings(machine, policy, seed))
        assert_moves_what_is_planned(calls, torch.Size(shape).numel() * dtype.itemsize)
        assert [read_again(call.plan) for call in calls] == [0, 0]
        assert calls[1].plan.team_name == name.split(",")[0]


@pytest.mark.parametrize("name", [*TEAMS, *SPILLING, *WAITING_TWICE])
def test_how_often_a_team_waits(name: str) -> None:
    """Once for each slice if every block merges all sums, which are few in most shapes; it is right either way."""
    machine, shape, layout = (TEAMS | SPILLING | WAITING_TWICE)[name]
    for seed, policy in enumerate(POLICIES):
        for call in passes(testing.Case(shape, torch.float32, layout), Settings(machine, policy, seed)):
            assert call.plan.every_block_merges == (name not in WAITING_TWICE)
            assert call.plan.team_name == name.split(",")[0] or name not in WAITING_TWICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPILLING)
def test_what_does_not_fit_is_read_again(name: str, dtype: torch.dtype) -> None:
    """And nothing else."""
    machine, shape, layout = SPILLING[name]
    if dtype == torch.bfloat16 and layout == "contiguous":  # there a slice of channels_last has as many rows
        shape = (shape[0] * 2, *shape[1:])
    for seed, policy in enumerate(POLICIES):
        calls = passes(testing.Case(shape, dtype, layout), Settings(machine, policy, seed))
        assert_moves_what_is_planned(calls, torch.Size(shape).numel() * dtype.itemsize)
        assert 0 < read_again(calls[1].plan) < 0.9
        assert calls[1].plan.team_name == name.split(",")[0]


def awaited_later_of(plan: Plan, group_rows: int, goes_back: bool = True) -> int:
    """Rows that are on their way still after a wait for others, of all threads."""
    total = 0
    for first_row in range(0, plan.rows, plan.rows_of_segment):
        rows = min(plan.rows - first_row, plan.rows_of_segment)
        for lane in range(plan.row_lanes):
            of_thread = len(range(lane, rows, plan.row_lanes))
            total += awaited_later(of_thread, plan.kept_rows, group_rows, goes_back)
    return total * (plan.slices if plan.columns == 1 else -(-plan.pitch // plan.vector))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("machine", "shape", "layout"),
    [
        (ONE, (6, 4, 40, 40), "contiguous"),
        (ONE, (2, 64, 13, 13), "channels_last"),
        (Machine(2, OF_H200, True, True), (21, 3, 40, 40), "contiguous"),
        (Machine(2, OF_H200, False, True), (8, 64, 13, 13), "channels_last"),
    ],
    ids=["block", "block, channels_last", "cluster", "grid, channels_last"],
)
def test_no_sum_waits_for_rows_it_does_not_need(
    machine: Machine, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    """Copies that end as late as they may leave all rows of later groups on their way."""
    case = testing.Case((shape[0] * 4 // dtype.itemsize, *shape[1:]), dtype, layout)
    for call, tensors in zip(passes(case, Settings(machine, "ascending")), (1, 2), strict=True):
        plan = call.plan
        assert plan.vector * dtype.itemsize == 16
        group_rows = 4 if tensors == 2 or plan.one_channel else 8
        assert group_rows < plan.kept_rows <= 32
        rows = awaited_later_of(plan, group_rows)
        assert call.counters["activation"].bytes_awaited_later == rows * tensors * 16 > 0


@pytest.mark.parametrize("shape", [(8, 100, 21, 20), (24, 30, 9, 9), (2, 1031), (5, 20, 3, 3), (3, 65, 7, 7)])
@pytest.mark.parametrize("misalignment", [0, 2])
@pytest.mark.parametrize("machine", [ONE, CLUSTERS, GRIDS], ids=["block", "cluster", "grid"])
def test_odd_shapes_too(shape: tuple[int, ...], misalignment: int, machine: Machine) -> None:
    """Accesses of two bytes, which cannot be asynchronous, among them."""
    case = testing.Case(shape, torch.bfloat16)
    size = torch.Size(shape).numel() * 2
    for call, tensors in zip(passes(case, Settings(machine, misalignment=misalignment)), (1, 2), strict=True):
        assert call.launches == 1
        assert call.counters["activation"].bytes_read == round(tensors * size * (1 + read_again(call.plan)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "has_residual"), [("relu", False), ("silu", False), (None, True), ("relu", True)])
@pytest.mark.parametrize("machine", [ONE, CLUSTERS, GRIDS], ids=["block", "cluster", "grid"])
def test_activation_and_residual(
    machine: Machine, name: str | None, has_residual: bool, dtype: torch.dtype, layout: str
) -> None:
    """The residual is read once more, and asked for before; dz is written; a mask is read once in backward."""
    shape = (8, 32, 14, 14) if layout == "contiguous" else (4, 32, 5, 5)
    operator = CudaOnCpu(Settings(machine))
    check(operator, testing.Case(shape, dtype, layout), name, has_residual)
    size = torch.Size(shape).numel() * dtype.itemsize
    has_mask = has_residual and name == "relu"
    mask = torch.Size(shape).numel() // 8 if has_mask else 0
    forward, backward = (call.counters["activation"] for call in operator.calls)
    assert (forward.bytes_read, forward.bytes_written) == ((1 + has_residual) * size, size + mask)
    assert forward.bytes_prefetched == has_residual * size
    # For each access the word that has its bits.
    mask_read = 4 * torch.Size(shape).numel() // operator.calls[1].plan.vector if has_mask else 0
    assert (backward.bytes_read, backward.bytes_written) == (2 * size + mask_read, (1 + has_mask) * size)
    assert [call.launches for call in operator.calls] == [1, 1]


@pytest.mark.parametrize("quarters", [1, 4])
@pytest.mark.parametrize(("shape", "layout"), [((8, 7, 40, 40), "contiguous"), ((8, 160, 12, 12), "channels_last")])
def test_the_next_slice_is_prefetched(shape: tuple[int, ...], layout: str, quarters: int) -> None:
    """Of each slice but a team's first one, as many rows as planned; results and bytes that are moved stay the same."""
    case = testing.Case(shape, torch.float32, layout)
    plain = passes(case, Settings(GRIDS))
    machine = Machine(4, 64 * KIB, False, True, False, True, quarters)
    for call, before, tensors in zip(passes(case, Settings(machine, "priorities", 3)), plain, (1, 2), strict=True):
        plan, moved = call.plan, call.counters["activation"]
        assert plan.teams < plan.slices
        # A thread has its segment's rows behind its own first one, row_lanes apart.
        lanes = range(plan.row_lanes)
        segment_rows = plan.rows_of_segment
        rows = sum(
            min(plan.prefetched_rows, -(-(min(segment_rows, plan.rows - i * segment_rows) - lane) // plan.row_lanes))
            for i in range(plan.segments)
            for lane in lanes
        )
        columns = [min(plan.slice_width, plan.pitch - i * plan.slice_width) for i in range(plan.teams, plan.slices)]
        width = sum(columns) if plan.image_rows == 1 else len(columns) * plan.vector
        assert moved.bytes_prefetched == 4 * tensors * rows * width > 0
        assert (moved.bytes_read, moved.bytes_written) == (
            before.counters["activation"].bytes_read,
            before.counters["activation"].bytes_written,
        )


@pytest.mark.parametrize("shape", [(4, 128, 12, 12), (4, 64, 30, 30)])
def test_two_teams_of_half_the_chip(shape: tuple[int, ...]) -> None:
    """With all choices of the package: results are right, rows that fit are read once, others twice."""
    machine = Machine(4, 64 * KIB, False, True, False, True, 2, True, True)
    case = testing.Case(shape, torch.bfloat16, "channels_last")
    for policy in POLICIES:
        calls = passes(case, Settings(machine, policy, 5))
        assert_moves_what_is_planned(calls, torch.Size(shape).numel() * 2)
        for call in calls:
            assert (call.plan.team_name, call.plan.segments <= 4, call.plan.teams_at_a_time) == ("grid", True, 2)
            assert call.plan.evicts_last == (read_again(call.plan) > 0) == (shape[1] == 64)


@pytest.mark.parametrize("name", ["cluster", "grid, channels_last"])
def test_mask_and_residual_of_rows_that_do_not_fit(name: str) -> None:
    """The bits of a mask are read again with their rows; the residual is asked for of the rows that are kept."""
    machine, shape, layout = SPILLING[name]
    operator = CudaOnCpu(Settings(machine, "descending"))
    check(operator, testing.Case(shape, torch.float32, layout), "relu", True)
    plan, moved = operator.calls[0].plan, operator.calls[0].counters["activation"]
    values = torch.Size(shape).numel()
    assert moved.bytes_prefetched == 4 * (values - values // plan.rows * plan.spilled_rows) > 0
    plan, moved = operator.calls[1].plan, operator.calls[1].counters["activation"]
    accesses = torch.Size(shape).numel() // plan.vector
    again = accesses // plan.rows * plan.spilled_rows
    assert 0 < again < accesses
    assert plan.team_name == name.split(",")[0]
    assert moved.bytes_read == (accesses + again) * (2 * 16 + 4)
    assert moved.sector_bytes_read <= 1.2 * 2 * 16 * (accesses + again)


def test_passes_without_teams_take_the_multi_kernel_path() -> None:
    """The mean over all batches, eval mode, a dy of one value, a residual behind a smooth activation."""
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    z = torch.randn(4, 8, 6, 6)
    operator = CudaOnCpu(Settings(ONE))
    mean, var, count = torch.zeros(8), torch.ones(8), torch.tensor(3)
    operator(x, mean, var, None, None, True, None, 1e-5, count)
    assert count.item() == 4
    operator(x, mean, var)
    operator(x, None, None, None, None, True).sum().backward()
    operator(x, None, None, None, None, True, activation="silu", residual=z).backward(z)
    teams = [call.plan.team_name for call in operator.calls]
    assert teams == ["none", "none", "block", "none", "block", "none"]


@pytest.mark.parametrize("machine", [CLUSTERS, GRIDS], ids=["cluster", "grid"])
def test_teams_that_the_device_has_no_room_for(machine: Machine) -> None:
    """It is asked: with half as many blocks at a time these teams could not run, and nothing waits for ever."""
    case = testing.Case((12, 2, 64, 64), torch.float32)
    size = 12 * 2 * 64 * 64 * 4
    for call, moved in zip(passes(case, Settings(machine, resident_blocks=4)), (3, 5), strict=True):
        assert call.plan.team_name == "none"
        counted = call.counters["activation"]
        assert counted.bytes_read + counted.bytes_written == moved * size
    assert [call.launches for call in passes(case, Settings(machine))] == [1, 1]


def test_plans_are_alike_but_for_the_segments() -> None:
    """A slice is the same whether a team holds it or it is read twice."""
    case = testing.Case((16, 64, 14, 14), torch.bfloat16)
    on_chip, multi_kernel = (passes(case, Settings(machine))[0].plan for machine in (ONE, MULTI_KERNEL))
    for name in ("slices", "slice_width", "columns", "row_lanes", "vector", "threads"):
        assert getattr(on_chip, name) == getattr(multi_kernel, name)
    assert (on_chip.team_name, multi_kernel.team_name) == ("block", "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEAMS, *(f"{name}: spills" for name in SPILLING), *WAITING_TWICE])
def test_bit_equal_whatever_the_order_of_threads_and_blocks(name: str) -> None:
    machine, shape, layout = (TEAMS | WAITING_TWICE).get(name) or SPILLING[name.split(":")[0]]
    inputs = testing.make_inputs(testing.Case(shape, torch.float32, layout))

    def run(policy: str, seed: int) -> list[torch.Tensor]:
        leaf = inputs.input.clone().requires_grad_()
        mean, var = inputs.running_mean.clone(), inputs.running_var.clone()
        operator = CudaOnCpu(Settings(machine, policy, seed))
        y = operator(leaf, mean, var, inputs.weight, inputs.bias, True)
        results = [y.detach(), *torch.autograd.grad(y, leaf, inputs.dy), mean, var]
        assert all(call.launches == 1 for call in operator.calls)
        return results

    first = run("ascending", 0)
    for policy, seed in itertools.product(POLICIES, range(2)):
        assert all(torch.equal(a, b) for a, b in zip(first, run(policy, seed), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "machine", [MULTI_KERNEL, ONE, CLUSTERS, GRIDS], ids=["multi_kernel", "block", "cluster", "grid"]
)
def test_statistics_of_a_large_mean(machine: Machine, layout: str) -> None:
    """Mean 1e4, deviation 0.1: the variance of the values as they are, to float32's rounding, on every path."""
    x = (1e4 + 0.1 * torch.randn(8, 24, 10, 10)).to(memory_format=getattr(torch, LAYOUTS_OF_TORCH[layout]))
    mean, var = torch.zeros(24), torch.zeros(24)
    operator = CudaOnCpu(Settings(machine))
    operator(x, mean, var, None, None, True, 1.0)
    exact = x.double().transpose(0, 1).reshape(24, -1)
    assert (operator.calls[0].plan.team_name == "none") == (machine is MULTI_KERNEL)
    assert torch.allclose(mean.double(), exact.mean(1), rtol=1e-7, atol=0)
    assert torch.allclose(var.double(), exact.var(1), rtol=3e-7, atol=0)
