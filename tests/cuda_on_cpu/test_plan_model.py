"""The planner's choice of teams: the plan of the least time by its own model, and the switches for measurements."""

import ctypes
import itertools
import sys
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
    return kernels().make_plan(request.shape, request.value_bytes, 16, machine, False, request.single_pass_tiles)


def tuned(text: str) -> Machine:
    """An H200 with BN_EXT_CUDA_TUNING."""
    machine = Machine.from_buffer_copy(PACKAGE)
    kernels().device.call("batch_norm_tune", text, ctypes.byref(machine))
    return machine


def least_time(request: Request) -> int:
    """Of teams of every size, for the better of the two widths of slices."""
    of_widths = []
    for line in (128, 64):
        sizes = [(CLUSTER, size) for size in (1, 2, 4, 8)] + [(GRID, size) for size in range(2, BLOCKS + 1)]
        made = [kernels().with_teams(team, size, request, PACKAGE, line) for team, size in sizes]
        made = [plan for plan in made if plan.team_name != "none"]
        # Of teams that spill, one of all blocks keeps the most; in channels_last one of half of them comes next.
        largest = (BLOCKS // 2, BLOCKS) if request.shape.channels_last else (BLOCKS,)
        made = [plan for plan in made if plan.spilled_rows == 0 or plan.segments in largest]
        times = [(kernels().time_of(plan, request, PACKAGE), plan.spilled_rows > 0) for plan in made]
        of_widths += [min(times)] if times else []
    # The model trusts a width that spills nothing more than one that does.
    safe = [time for time, spills in of_widths if not spills]
    return min(safe or [time for time, _ in of_widths], default=sys.maxsize)


GRIDS_OF_CASES = list(itertools.product((32, 128, 256), (2, 4), (False, True)))


@pytest.mark.parametrize(("n", "value_bytes", "channels_last"), GRIDS_OF_CASES)
def test_clusters_fill_gpcs_and_teams_fit(n: int, value_bytes: int, channels_last: bool) -> None:
    for request in requests(n, value_bytes, channels_last):
        plan = planned(request)
        if plan.team_name == "none":
            continue
        assert plan.blocks_at_a_time <= BLOCKS
        assert plan.team_name != "cluster" or plan.segments in (2, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "value_bytes", "channels_last"), GRIDS_OF_CASES)
def test_the_plan_takes_the_least_time_of_all(n: int, value_bytes: int, channels_last: bool) -> None:
    """By the planner's own model, to half a per cent: of teams of all sizes and of three kernels."""
    for request in requests(n, value_bytes, channels_last):
        plan = planned(request)
        time = kernels().time_of(plan, request, PACKAGE)
        of_three = kernels().time_of(planned(request, PACKAGE.without_teams), request, PACKAGE)
        least = min(of_three, least_time(request))
        assert least <= time <= 1.005 * least
        assert (plan.team_name == "none") == (time == of_three)


def test_three_kernels_where_they_are_faster() -> None:
    """Backward for channels_last of 112 x 112 at N = 256, of which too little stays on chip; for many tiny slices."""
    request = Request(Shape(256, 64, 112 * 112, True), 2, 16, False, 2)
    assert planned(request).team_name == "none"
    # What is done once for each slice takes more time than another read of the tensor.
    many = Request(Shape(1, 1024, 28 * 28, False), 2, 16, False, 1)
    team = planned(many, tuned("three_kernels=0"))
    assert (planned(many).team_name, team.team_name) == ("none", "block")
    multi_kernel = planned(many, PACKAGE.without_teams)
    assert kernels().time_of(multi_kernel, many, PACKAGE) < kernels().time_of(team, many, PACKAGE)


def test_a_cluster_of_another_size_where_the_slice_would_spill() -> None:
    """On three multiprocessors six blocks fit: a slice that needs five has them all as a cluster, if not as a grid."""
    machine = Machine(3, PACKAGE.shared_bytes, True, False)
    request = Request(Shape(5 * 28 - 2, 2, 256 * 8, False), 2, 16, False, 1)
    plan = planned(request, machine)
    assert (plan.team_name, plan.segments, plan.spilled_rows) == ("cluster", 5, 0)


HALVES = Request(Shape(256, 512, 28 * 28, True), 2, 16, False, 2)  # spills from either half
WHOLE = Request(Shape(256, 256, 56 * 56, True), 2, 16, False, 1)  # spills from the whole chip
SEVERAL = Request(Shape(256, 256, 56 * 56, False), 2, 16, False, 1)
ALONE = Request(Shape(256, 64, 112 * 112, False), 4, 16, False, 2)


def test_half_of_the_teams_begin_later() -> None:
    for request in (HALVES, SEVERAL):
        plan = planned(request)
        assert 1 < plan.teams_at_a_time == plan.staggered_teams * 2 + plan.teams_at_a_time % 2
        assert 1000 < plan.stagger_ns <= 3000
        assert planned(request, tuned("stagger=0")).stagger_ns == 0
    for request in (WHOLE, ALONE):
        assert (planned(request).teams_at_a_time, planned(request).stagger_ns) == (1, 0)


def test_rows_that_are_read_again_leave_the_cache_last() -> None:
    for request in (HALVES, WHOLE):
        plan, other = planned(request), planned(request, tuned("evict_last=0"))
        assert plan.spilled_rows > 0
        assert (plan.evicts_last, other.evicts_last) == (True, False)
        other.evicts_last = True
        assert bytes(other) == bytes(plan)
    assert not planned(SEVERAL).evicts_last


@pytest.mark.parametrize(("n", "keeps"), [(32, True), (64, False)])
def test_small_results_stay_in_the_cache(n: int, keeps: bool) -> None:
    """Of 6 MB for each 16 images: an H200 keeps 19.8 MB."""
    for tiles in (0, 1, 2):
        request = Request(Shape(n, 64, 56 * 56, False), 2, 16, False, tiles)
        normal, first = 0x16F0000000000000, 0x12F0000000000000
        assert planned(request).result_policy == (normal if keeps else first)
        assert planned(request, tuned("keep_results=0")).result_policy == first


def test_half_the_chip_where_the_model_prefers_it() -> None:
    for request, segments in ((HALVES, BLOCKS // 2), (WHOLE, BLOCKS)):
        assert planned(request).segments == segments
        assert bytes(planned(request, tuned("half_chip=1"))) == bytes(planned(request))
        assert planned(request, tuned("half_chip=0")).segments > BLOCKS // 2
        assert planned(request, tuned("half_chip=always")).segments <= BLOCKS // 2
    assert bytes(planned(SEVERAL, tuned("half_chip=always"))) == bytes(planned(SEVERAL))


@pytest.mark.parametrize(
    "text", ["half_chip=2", "evict_last", "keep_results=2", "three_kernels=-1", "half_chip=1,evict=1"]
)
def test_no_such_choice(text: str) -> None:
    with pytest.raises(Fault, match="no such choice"):
        tuned(text)
