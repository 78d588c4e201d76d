"""The planner's choice of teams: the plan of the least time by its own model, and the switches for measurements."""

import ctypes
import itertools
from collections.abc import Iterator

import pytest

from . import build
from .batch_norm import kernels
from .device import Fault
from .structs import PACKAGE, TEAMS, Machine, Plan, Request, Shape
from .test_plan import RESNET50

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

BLOCKS = 2 * PACKAGE.multiprocessors
CLUSTER, GRID = TEAMS.index("cluster"), TEAMS.index("grid")


def requests(n: int, value_bytes: int, channels_last: bool) -> Iterator[Request]:
    """ResNet-50's layers, forward and backward."""
    for (channels, size), tiles in itertools.product(RESNET50, (1, 2)):
        yield Request(Shape(n, channels, size * size, channels_last), value_bytes, 16, False, tiles)


def planned(request: Request, machine: Machine = PACKAGE) -> Plan:
    """The planner's choice."""
    return kernels().make_plan(request.shape, request.value_bytes, 16, machine, False, request.resident_tiles)


def tuned(text: str) -> Machine:
    """An H200 with BN_EXT_CUDA_TUNING."""
    machine = Machine.from_buffer_copy(PACKAGE)
    kernels().device.call("batch_norm_tune", text, ctypes.byref(machine))
    return machine


def all_teams(request: Request) -> list[Plan]:
    """Of every size that the planner may choose, for slices of both widths."""
    plans = []
    for line in (128, 64):
        most = BLOCKS // 2 if request.shape.channels_last else BLOCKS
        sizes = [(CLUSTER, size) for size in (1, 2, 4, 8)] + [(GRID, size) for size in range(2, most + 1)]
        made = [kernels().with_teams(team, size, request, PACKAGE, line) for team, size in sizes]
        made = [plan for plan in made if plan.team_name != "none"]
        # Slices of one width spill where no team keeps them, and then by the largest team.
        plans += [p for p in made if p.spilled_rows == 0] or [p for p in made if p.segments == made[-1].segments]
    return [p for p in plans if p.spilled_rows == 0] or plans


GRIDS_OF_CASES = list(itertools.product((32, 128, 256), (2, 4), (False, True)))


@pytest.mark.parametrize(("n", "value_bytes", "channels_last"), GRIDS_OF_CASES)
def test_clusters_fill_gpcs_and_no_team_has_more_than_half_the_chip(
    n: int, value_bytes: int, channels_last: bool
) -> None:
    for request in requests(n, value_bytes, channels_last):
        plan = planned(request)
        if plan.team_name == "none":
            continue
        assert plan.blocks_at_a_time <= BLOCKS
        assert plan.team_name != "cluster" or plan.segments in (2, 4, 8)
        assert not channels_last or (plan.segments <= BLOCKS // 2 and plan.teams_at_a_time >= 2)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "value_bytes", "channels_last"), GRIDS_OF_CASES)
def test_the_plan_takes_the_least_time_of_all(n: int, value_bytes: int, channels_last: bool) -> None:
    """By the planner's own model, to half a per cent: of teams of all sizes and of three kernels."""
    for request in requests(n, value_bytes, channels_last):
        plan = planned(request)
        time = kernels().time_of(plan, request, PACKAGE)
        of_teams = min((kernels().time_of(p, request, PACKAGE) for p in all_teams(request)), default=None)
        of_three = kernels().time_of(planned(request, PACKAGE.without_teams), request, PACKAGE)
        least = min(of_three, of_three if of_teams is None else of_teams)
        assert least <= time <= 1.005 * least
        assert (plan.team_name == "none") == (time == of_three)


def test_three_kernels_where_they_are_faster() -> None:
    """For channels_last of 112 x 112 at N = 256, of which half the chip keeps too little, and for many tiny slices."""
    for tiles in (1, 2):
        request = Request(Shape(256, 64, 112 * 112, True), 2, 16, False, tiles)
        assert planned(request).team_name == "none"
    # What is done once for each slice takes more time than another read of the tensor.
    many = Request(Shape(1, 1024, 28 * 28, False), 2, 16, False, 1)
    team = planned(many, tuned("three_kernels=0"))
    assert (planned(many).team_name, team.team_name) == ("none", "block")
    general = planned(many, PACKAGE.without_teams)
    assert kernels().time_of(general, many, PACKAGE) < kernels().time_of(team, many, PACKAGE)


def test_a_cluster_of_another_size_where_the_slice_would_spill() -> None:
    """On three multiprocessors six blocks fit: a slice that needs five has them all as a cluster, if not as a grid."""
    machine = Machine(3, PACKAGE.shared_bytes, True, False)
    request = Request(Shape(5 * 28 - 2, 2, 256 * 8, False), 2, 16, False, 1)
    plan = planned(request, machine)
    assert (plan.team_name, plan.segments, plan.spilled_rows) == ("cluster", 5, 0)


SPILLING = Request(Shape(256, 256, 56 * 56, True), 2, 16, False, 1)
SEVERAL = Request(Shape(256, 256, 56 * 56, False), 2, 16, False, 1)
ALONE = Request(Shape(256, 64, 112 * 112, False), 4, 16, False, 2)


def test_half_of_the_teams_begin_later() -> None:
    for request in (SPILLING, SEVERAL):
        plan = planned(request)
        assert 1 < plan.teams_at_a_time == plan.staggered_teams * 2 + plan.teams_at_a_time % 2
        assert 1000 < plan.stagger_ns <= 3000
        assert planned(request, tuned("stagger=0")).stagger_ns == 0
    assert (planned(ALONE).teams_at_a_time, planned(ALONE).stagger_ns) == (1, 0)


def test_switches_of_the_cache_and_of_half_the_chip() -> None:
    plan, other = planned(SPILLING), planned(SPILLING, tuned("evict_last=0"))
    assert plan.spilled_rows > 0
    assert (plan.evicts_last, other.evicts_last) == (True, False)
    other.evicts_last = True
    assert bytes(other) == bytes(plan)
    assert not planned(SEVERAL).evicts_last
    assert planned(SPILLING, tuned("half_chip=0")).segments > BLOCKS // 2
    assert bytes(planned(SPILLING, tuned("half_chip=1"))) == bytes(plan)


@pytest.mark.parametrize("text", ["half_chip=2", "evict_last", "three_kernels=-1", "half_chip=1,evict=1"])
def test_no_such_choice(text: str) -> None:
    with pytest.raises(Fault, match="no such choice"):
        tuned(text)
