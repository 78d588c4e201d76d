"""Passes of one kernel, whose blocks hold a slice each: when they are chosen, and that every tensor is read once."""

import itertools
from dataclasses import replace

import pytest
import torch

from bn_ext import testing

from . import build
from .batch_norm import OF_H200, Settings
from .device import POLICIES
from .fused import check
from .operators import Call, CudaOnCpu

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

H200 = Settings(multiprocessors=132, shared_bytes=OF_H200)
LAYOUTS = ["contiguous", "channels_last"]


def passes(case: testing.Case, settings: Settings = H200) -> list[Call]:
    """A forward and a backward pass whose results are right."""
    operator = CudaOnCpu(settings)
    shares = testing.check(operator, case)
    assert max(shares.values()) <= 1, shares
    return operator.calls


# Where a slice is the channels of 128 bytes, as in channels_last, fewer of their values fit.
FITTING = [
    *itertools.product([(8, 64, 14, 14), (16, 64, 7, 7), (4, 16, 28, 28), (100, 64)], ["contiguous"]),
    *itertools.product([(2, 64, 8, 8), (3, 32, 6, 7)], ["channels_last"]),
]


@pytest.mark.parametrize("dtype", list(testing.TOLERANCE))
@pytest.mark.parametrize(("shape", "layout"), FITTING)
def test_every_tensor_is_read_once(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """2N forward, 3N backward, in one launch without workspace; little besides."""
    size = torch.Size(shape).numel() * torch.finfo(dtype).bits // 8
    for seed, policy in enumerate(POLICIES):
        calls = passes(testing.Case(shape, dtype, layout), replace(H200, policy=policy, seed=seed))
        for call, read in zip(calls, (1, 2), strict=True):
            assert call.plan.resident
            assert call.launches == 1
            moved = call.counters["activation"]
            assert (moved.bytes_read, moved.bytes_written) == (read * size, size)
            assert moved.sector_bytes_read <= 1.06 * read * size
            assert call.counters["workspace"].bytes_read == call.counters["workspace"].bytes_written == 0


@pytest.mark.parametrize("shape", [(8, 100, 21, 20), (24, 30, 9, 9), (2, 1031), (5, 20, 3, 3), (3, 65, 7, 7)])
@pytest.mark.parametrize("misalignment", [0, 2])
def test_odd_shapes_too(shape: tuple[int, ...], misalignment: int) -> None:
    """Accesses of two bytes, which cannot be asynchronous, among them."""
    case = testing.Case(shape, torch.bfloat16)
    size = torch.Size(shape).numel() * 2
    for call, read in zip(passes(case, replace(H200, misalignment=misalignment)), (1, 2), strict=True):
        assert call.plan.resident
        assert call.counters["activation"].bytes_read == read * size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "has_residual"), [("relu", False), ("silu", False), (None, True), ("relu", True)])
def test_activation_and_residual(name: str | None, has_residual: bool, dtype: torch.dtype, layout: str) -> None:
    """The residual is read once more, dz written; a mask is read twice in backward."""
    shape = (8, 32, 14, 14) if layout == "contiguous" else (4, 32, 5, 5)
    operator = CudaOnCpu(H200)
    check(operator, testing.Case(shape, dtype, layout), name, has_residual)
    size = torch.Size(shape).numel() * torch.finfo(dtype).bits // 8
    has_mask = has_residual and name == "relu"
    mask = torch.Size(shape).numel() // 8 if has_mask else 0
    forward, backward = (call.counters["activation"] for call in operator.calls)
    assert (forward.bytes_read, forward.bytes_written) == ((1 + has_residual) * size, size + mask)
    mask_read = 2 * torch.Size(shape).numel() // operator.calls[1].plan.vector if has_mask else 0
    assert (backward.bytes_read, backward.bytes_written) == (2 * size + mask_read, (1 + has_mask) * size)
    assert [call.launches for call in operator.calls] == [1, 1]


def test_what_needs_the_general_kernels() -> None:
    """The mean over all batches, eval mode, a dy of one value, a residual behind a smooth activation."""
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    z = torch.randn(4, 8, 6, 6)
    operator = CudaOnCpu(H200)
    mean, var, count = torch.zeros(8), torch.ones(8), torch.tensor(3)
    operator(x, mean, var, None, None, True, None, 1e-5, count)
    assert count.item() == 4
    operator(x, mean, var)
    operator(x, None, None, None, None, True).sum().backward()
    operator(x, None, None, None, None, True, activation="silu", residual=z).backward(z)
    resident = [call.plan.resident for call in operator.calls]
    assert resident == [False, False, True, False, True, False]


def test_a_slice_stays_on_chip_where_three_fit_on_a_multiprocessor() -> None:
    """On an H200 a channel of 28 x 28 bfloat16 at N = 32 forward, not its dy and x; on less memory, less."""
    case = testing.Case((32, 16, 28, 28), torch.bfloat16)
    smaller = replace(case, shape=(16, 16, 14, 14))

    def chosen(shared_kib: int, case: testing.Case) -> list[bool]:
        return [call.plan.resident for call in passes(case, replace(H200, shared_bytes=shared_kib * 1024))]

    assert [chosen(kib, case) for kib in (228, 164, 0)] == [[True, False], [False, False], [False, False]]
    assert [chosen(kib, smaller) for kib in (228, 164, 140)] == [[True, True], [True, False], [False, False]]


def test_plans_are_alike_but_for_the_segments() -> None:
    """A slice is the same whether a block holds it or reads it twice."""
    case = testing.Case((16, 64, 14, 14), torch.bfloat16)
    on_chip, general = (passes(case, replace(H200, shared_bytes=b))[0].plan for b in (OF_H200, 0))
    assert (on_chip.segments, on_chip.resident) == (1, True)
    for name in ("slices", "slice_width", "columns", "row_lanes", "vector", "threads"):
        assert getattr(on_chip, name) == getattr(general, name)
    assert on_chip.row_lanes * on_chip.rows_per_thread >= on_chip.rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_equal_whatever_the_order_of_threads_and_blocks(layout: str) -> None:
    case = testing.Case((6, 65, 7, 7), torch.float32, layout)
    inputs = testing.make_inputs(case)

    def run(policy: str, seed: int) -> list[torch.Tensor]:
        leaf = inputs.input.clone().requires_grad_()
        mean, var = inputs.running_mean.clone(), inputs.running_var.clone()
        y = CudaOnCpu(replace(H200, policy=policy, seed=seed))(leaf, mean, var, inputs.weight, inputs.bias, True)
        return [y.detach(), *torch.autograd.grad(y, leaf, inputs.dy), mean, var]

    first = run("ascending", 0)
    for policy, seed in itertools.product(POLICIES, range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, run(policy, seed), strict=True))
