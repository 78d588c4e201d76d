"""What the CUDA kernels move: activations 3N forward and 5N backward, whole sectors, and little besides."""

import pytest
import torch

from bn_ext import testing

from . import build
from .batch_norm import Settings
from .fused import check
from .operators import Call, CudaOnCpu
from .structs import OF_H200, Machine

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

# Layers of ResNet-50 in small batches, and channels that do not fill a vector, on a device that they fill.
SHAPES = [(2, 64, 112, 112), (8, 64, 56, 56), (8, 128, 28, 28), (32, 128, 14, 14), (128, 64, 7, 7)]
ODD = [(8, 100, 21, 20), (64, 30, 9, 9), (4096, 250), (3, 20, 35, 35)]
LAYOUTS = ["contiguous", "channels_last"]


def passes(shape: tuple[int, ...], dtype: torch.dtype, layout: str, training: bool = True) -> tuple[Call, Call]:
    """A forward and a backward pass whose results are right."""
    operator = CudaOnCpu(Settings())
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared_bytes", [0, OF_H200])
def test_results_that_are_small_are_not_streamed(shared_bytes: int, training: bool) -> None:
    """By the multi-kernel path and by teams: y and dx, each to the byte."""
    shape = (8, 64, 28, 28)
    size = torch.Size(shape).numel() * 4
    for keeps in (False, True):
        operator = CudaOnCpu(Settings(Machine(12, shared_bytes, keep_results=keeps)))
        shares = testing.check(operator, testing.Case(shape, torch.float32, "contiguous", training))
        assert max(shares.values()) <= 1, shares
        assert [call.counters["activation"].bytes_streamed for call in operator.calls] == [size * (not keeps)] * 2
        # With a residual: y and the mask, dx, and dz unless a later kernel may read it.
        operator = CudaOnCpu(Settings(Machine(12, shared_bytes, keep_results=keeps)))
        check(operator, testing.Case(shape, torch.float32, "contiguous", training), "relu", True)
        streamed = [call.counters["activation"].bytes_streamed for call in operator.calls]
        of_backward = 2 if operator.calls[1].launches == 1 and training else 1
        assert streamed == [size * (not keeps) + size // 32, of_backward * size * (not keeps)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_as_an_h200_runs_it(layout: str) -> None:
    """132 multiprocessors: 3N and 5N, and a few per cent of N for everything else."""
    operator = CudaOnCpu(Settings(Machine(132)))
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


# A mask is counted as an activation: N / 16 of 16-bit values, N / 32 of 32-bit ones.
FUSED = [("relu", False), ("silu", False), (None, True), ("relu", True), ("silu", True)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "has_residual"), FUSED)
def test_activation_and_residual(
    name: str | None, has_residual: bool, dtype: torch.dtype, layout: str, training: bool
) -> None:
    """Plain batch norm's 3N and 5N (eval: 2N and 3N), and what z, dz and the mask add to it."""
    for shape in ((2, 16, 56, 56), (8, 32, 14, 14), (16, 16, 7, 7)):
        operator = CudaOnCpu(Settings())
        check(operator, testing.Case(shape, dtype, layout, training), name, has_residual)
        forward, backward = (call.counters["activation"] for call in operator.calls)
        size = torch.Size(shape).numel() * torch.finfo(dtype).bits // 8
        mask = torch.Size(shape).numel() // 8 if name == "relu" and has_residual else 0
        assert forward.bytes_read == (1 + training + has_residual) * size
        assert forward.bytes_written == size + mask
        if training:
            # dy and x, then dz and x. A silu's dz of 16 bits is rounded, so it is not read in dy's place.
            again = has_residual and name == "silu" and dtype == torch.bfloat16
            reads = 4 + (has_residual and name == "silu") + again
        else:
            reads = 2 + (has_residual and name == "silu")
        # A thread reads a byte of the mask for each of its accesses; a warp's are one.
        mask_read = torch.Size(shape).numel() // operator.calls[1].plan.vector if mask else 0
        assert backward.bytes_read == reads * size + mask_read
        has_dz = has_residual and name is not None  # without an activation it is dy
        assert backward.bytes_written == (1 + has_dz) * size
        assert [call.launches for call in operator.calls] == ([3, 3] if training else [1, 2])
        # Slices of four channels of 98 bytes, as a silu of 16 bits has them, begin within a sector.
        for moved in (forward, backward):
            assert moved.sector_bytes_written <= 1.2 * moved.bytes_written + mask
            assert moved.sector_bytes_read <= 1.2 * moved.bytes_read + mask


@pytest.mark.parametrize("layout", LAYOUTS)
def test_least_traffic_of_add_and_relu(layout: str) -> None:
    """BN + add + ReLU, 16 bits: 4N and a mask forward, 6N and a mask backward; in eval mode 3N forward."""
    shape = (8, 64, 28, 28)
    size = torch.Size(shape).numel() * 2
    operator = CudaOnCpu(Settings())
    for training in (True, False):
        check(operator, testing.Case(shape, torch.bfloat16, layout, training), "relu", True)
    moved = [c.counters["activation"].bytes_read + c.counters["activation"].bytes_written for c in operator.calls]
    assert moved == [4 * size + size // 16, 6 * size + size // 16, 3 * size + size // 16, 4 * size + size // 16]
