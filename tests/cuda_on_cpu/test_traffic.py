"""What the CUDA kernels move: activations 3N forward and 5N backward, whole sectors, and little besides."""

import pytest
import torch

from bn_ext import testing

from . import build
from .batch_norm import Settings
from .operators import Call, CudaOnCpu

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

# Layers of ResNet-50 in small batches, and channels that do not fill a vector, on a device that they fill.
SHAPES = [(2, 64, 112, 112), (8, 64, 56, 56), (8, 128, 28, 28), (32, 128, 14, 14), (128, 64, 7, 7)]
ODD = [(8, 100, 21, 20), (64, 30, 9, 9), (4096, 250), (3, 20, 35, 35)]
LAYOUTS = ["contiguous", "channels_last"]


def passes(shape: tuple[int, ...], dtype: torch.dtype, layout: str, training: bool = True) -> tuple[Call, Call]:
    """A forward and a backward pass whose results are right."""
    operator = CudaOnCpu(Settings(multiprocessors=1))
    shares = testing.check(operator, testing.Case(shape, dtype, layout, training))
    assert max(shares.values()) <= 1, shares
    forward, backward = operator.calls
    return forward, backward


def small(call: Call) -> int:
    """Sectors moved for anything but activations, in bytes.

    What a warp's threads read alike counts once, what its block's warps do counts for each: a device's cache serves it.
    """
    counters = [call.counters[kind] for kind in ("parameter", "workspace")]
    return sum(c.sector_bytes_read + c.sector_bytes_written for c in counters)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_reads_and_writes_no_more_than_it_must(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    size = torch.Size(shape).numel() * torch.finfo(dtype).bits // 8
    forward, backward = passes(shape, dtype, layout)
    for call, read in ((forward, 2), (backward, 4)):
        moved = call.counters["activation"]
        assert (moved.bytes_read, moved.bytes_written) == (read * size, size)
        assert moved.sector_bytes_read <= 1.06 * read * size
        assert moved.sector_bytes_written <= 1.06 * size
        assert small(call) <= 0.13 * size
        assert call.launches == 3
        assert call.plan.vector * torch.finfo(dtype).bits == 128


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_as_an_h200_runs_it(layout: str) -> None:
    """132 multiprocessors: 3N and 5N, and a few per cent of N for everything else."""
    operator = CudaOnCpu(Settings(multiprocessors=132))
    shape = (32, 64, 112, 112)
    shares = testing.check(operator, testing.Case(shape, torch.bfloat16, layout))
    assert max(shares.values()) <= 1, shares
    size = torch.Size(shape).numel() * 2
    for call, moved in zip(operator.calls, (3, 5), strict=True):
        activation = call.counters["activation"]
        assert activation.bytes_read + activation.bytes_written == moved * size
        assert small(call) <= 0.05 * size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ODD)
def test_odd_shapes_move_the_same(shape: tuple[int, ...], layout: str) -> None:
    """Where a row is not made of whole vectors, accesses are narrower, not more."""
    forward, backward = passes(shape, torch.bfloat16, layout if len(shape) == 4 else "contiguous")
    size = torch.Size(shape).numel() * 2
    for call, read in ((forward, 2), (backward, 4)):
        moved = call.counters["activation"]
        assert (moved.bytes_read, moved.bytes_written) == (read * size, size)
        # Of single 16-bit values a warp reads 64 bytes, three sectors of 32 where they begin within one.
        single = call.plan.vector == 1
        assert moved.sector_bytes_read <= (1.51 if single else 1.25) * read * size
        assert small(call) <= (0.22 if single else 0.12) * size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval(layout: str) -> None:
    """One launch and 2N forward; two and 3N backward, gradients of the parameters included."""
    shape = (4, 64, 28, 28)
    size = torch.Size(shape).numel() * 2
    forward, backward = passes(shape, torch.bfloat16, layout, training=False)
    assert forward.launches == 1
    moved = forward.counters["activation"]
    assert (moved.bytes_read, moved.bytes_written) == (size, size)
    moved = backward.counters["activation"]
    assert (moved.bytes_read, moved.bytes_written) == (2 * size, size)
    assert backward.launches == 2
