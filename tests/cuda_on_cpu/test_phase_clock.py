"""The marks of a build with BN_EXT_PHASE_CLOCK, by a clock that counts them: all of them, in order, teams together."""

import ctypes
import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from . import build
from .batch_norm import CUDA, SOURCES, Kernels, Settings, kernels
from .structs import MULTI_KERNEL, OF_H200, SAVED, Machine, Shape

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

# As in csrc/cuda/phase_clock.h.
PHASES = ["start", "fetch issued", "fetched", "summed", "first barrier", "coefficients", "gathered", "written"]
BLOCKS = [0, 1, 131, 132]
SLICES = 4
READ, CLEAR = "bn_ext_read_phase_times", "bn_ext_clear_phase_times"

KIB = 1024
MACHINES = {
    "none": MULTI_KERNEL,
    "block": Machine(1, OF_H200),
    "cluster": Machine(4, 64 * KIB, True, True),
    "grid": Machine(4, 64 * KIB, False, True),
}
SHAPES = {"contiguous": Shape(8, 7, 40 * 40, False), "channels_last": Shape(4, 96, 12 * 12, True)}


@functools.cache
def clocked() -> Kernels:
    """The kernels, of which those of one pass for float32 have the macro."""
    single_pass = [CUDA / "instantiations" / f"single_pass_{name}_float32.cu" for name in ("forward", "backward")]
    defined = [*single_pass, CUDA / "phase_clock.cu"]
    return Kernels(build.library(SOURCES, defines=["BN_EXT_PHASE_CLOCK"], defined=defined))


def clear(made: Kernels) -> None:
    assert getattr(made.device._library, CLEAR)() == 0


def times(made: Kernels) -> NDArray[np.uint64]:
    """Of (blocks, slices, phases)."""
    found = np.full((len(BLOCKS), SLICES, len(PHASES)), 7, np.uint64)
    assert getattr(made.device._library, READ)(ctypes.c_void_p(found.ctypes.data)) == 0
    return found


def passes(team: str, shape: Shape) -> list[tuple[int, int, int, NDArray[np.uint64]]]:
    """Blocks of a slice, teams, slices, times of a forward and of a backward pass."""
    made, settings = clocked(), Settings(MACHINES[team])
    x, dy = np.random.default_rng(0).standard_normal((2, shape.n * shape.c * shape.s), np.float32)
    vectors = dict.fromkeys(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
    at = (shape, "float32", "float32")
    clear(made)
    forward = made.forward(*at, x, vectors, settings, training=True)
    found = [(forward["plan"], times(made))]
    clear(made)
    backward = made.backward(*at, dy, x, {name: forward[name] for name in SAVED} | vectors, settings, training=True)
    found.append((backward["plan"], times(made)))
    assert [plan.team_name for plan, _ in found] == [team, team]
    return [(plan.segments, plan.teams, plan.slices, noted) for plan, noted in found]


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("team", ["block", "cluster", "grid"])
def test_every_phase_is_noted_in_order(team: str, layout: str) -> None:
    """Of the blocks and slices that there are, and of no others."""
    for segments, teams, slices, noted in passes(team, SHAPES[layout]):
        for i, block in enumerate(BLOCKS):
            first_slice = block // segments
            count = len(range(first_slice, slices, teams)) if block < teams * segments else 0
            assert (noted[i, min(count, SLICES) :] == 0).all()
            marks = noted[i, : min(count, SLICES)].ravel()
            assert (marks > 0).all()
            assert (np.diff(marks.astype(np.int64)) > 0).all()
        assert noted[0].any()


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("team", ["cluster", "grid"])
def test_no_block_is_past_a_barrier_before_its_team(team: str, layout: str) -> None:
    """Blocks 0 and 1 are of one team: sums of both are before the first barrier of either, which is their only one."""
    summed, barrier = (PHASES.index(name) for name in ("summed", "first barrier"))
    for segments, _, _, noted in passes(team, SHAPES[layout]):
        assert segments > 1
        reached = noted[:2, noted[0, :, 0] > 0]
        assert (reached[:, :, summed].max(0) < reached[:, :, barrier].min(0)).all()


def test_what_is_not_of_one_kernel_is_not_noted() -> None:
    for *_, noted in passes("none", SHAPES["contiguous"]):
        assert not noted.any()


def test_a_build_without_the_macro_has_no_clock() -> None:
    """Neither what reads the times nor the times themselves."""
    library = kernels().device._library
    assert [hasattr(library, name) for name in (READ, CLEAR)] == [False, False]
    assert [hasattr(clocked().device._library, name) for name in (READ, CLEAR)] == [True, True]
