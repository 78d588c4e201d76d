"""The CUDA kernels' own source, run on the CPU: results against float64 formulas, and what must not be touched."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bn_ext import testing

from . import build
from .batch_norm import Settings, kernels, with_multiprocessors
from .device import POLICIES
from .operators import CudaOnCpu, bits, memory_of, shape_of
from .structs import SAVED

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason=build.MISSING),
    pytest.mark.usefixtures("every_path"),
]

DTYPES = list(testing.TOLERANCE)
# Planes of 1, 3, 49, 65 and 127 values and of 392 bytes, wide odd ones; C = 1, 7, 64, 65, more than threads; N = 1.
SHAPES = [
    (37, 1),
    (70, 65),
    (9, 300),
    (2, 1031),
    (1, 7, 3),
    (65, 3, 4),
    (5, 64, 7, 7),
    (3, 65, 7, 7),
    (1, 7, 65),
    (4, 1, 127),
    (2, 6, 30, 30),
    (5, 20, 3, 3),
    (2, 10, 21),
    (2, 3, 1444),
    (3, 10, 196),
    (3, 7, 98),
    (2, 64, 49, 1),
    (1, 3, 49, 63),
    (2, 2, 40, 50),
    (3, 5, 289),
    (3, 4, 2, 9, 8),
]


def assert_within_tolerance(shares: dict[str, float]) -> None:
    """Every error is at most its tolerance."""
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_agrees_with_float64(dtype: torch.dtype, layout: str, training: bool) -> None:
    """Under changing thread orders and machines; both passes, every width of access that the shapes lead to."""
    widths = set()
    orders = itertools.cycle(POLICIES)
    for seed, shape in enumerate(SHAPES):
        if layout == "channels_last" and len(shape) < 4:
            continue
        operator = CudaOnCpu(Settings(with_multiprocessors(1 + seed % 3), policy=next(orders), seed=seed))
        case = testing.Case(shape, dtype, layout, training, eps=1e-3, mean=-3.0, seed=seed)
        assert_within_tolerance(testing.check(operator, case))
        widths |= {call.plan.vector for call in operator.calls}
    size = torch.finfo(dtype).bits // 8
    assert widths == {2**i for i in range(4) if 2**i * size <= 16}


@pytest.mark.parametrize("misalignment", [2, 4, 8, 14])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_memory(dtype: torch.dtype, layout: str, misalignment: int) -> None:
    """Narrower accesses where an address is no multiple of 16; the device refuses one at a wrong address."""
    size = torch.finfo(dtype).bits // 8
    if misalignment % size:
        pytest.skip("no tensor lies so")
    for shape in ((3, 16, 7, 7), (2, 8, 32, 20)):
        operator = CudaOnCpu(Settings(misalignment=misalignment))
        assert_within_tolerance(testing.check(operator, testing.Case(shape, dtype, layout)))
        access = misalignment & -misalignment
        assert all(call.plan.vector * size == access for call in operator.calls)


def random_call(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
    activation: str | None = None,
    residual: bool = False,
    **settings: Any,
) -> list[Tensor]:
    """Every result of a training step on random values: y, dx, dweight, dbias, dz, running statistics, count."""
    case = testing.Case(shape, dtype, layout)
    inputs = testing.make_inputs(case)
    leaves = [t.clone().requires_grad_() for t in (inputs.input, inputs.weight, inputs.bias)]
    if residual:
        leaves.append(torch.empty_like(inputs.input).copy_(inputs.dy.flip(0)).requires_grad_())
    mean, var, count = inputs.running_mean.clone(), inputs.running_var.clone(), torch.tensor(4)
    operator = CudaOnCpu(Settings(**settings))
    z = leaves[3] if residual else None
    y = operator(*(leaves[0], mean, var, *leaves[1:3], True, 0.1, 1e-5, count), activation=activation, residual=z)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy), mean, var, count]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 65, 7, 7), (3, 3, 40, 52), (9, 48, 9, 9)])
def test_bit_equal_whatever_the_order_of_threads_and_blocks(shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first = random_call(shape, dtype, layout, policy="ascending")
        assert first[-1].item() == 5  # one batch more, however many blocks
        for policy, seed in itertools.product(POLICIES, range(3)):
            for a, b in zip(first, random_call(shape, dtype, layout, policy=policy, seed=seed), strict=True):
                assert np.array_equal(bits(a), bits(b))


@pytest.mark.parametrize("params", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["", "wb", "w", "b"])
def test_parameters_of_any_dtype_or_none(params: torch.dtype, training: bool, given: str) -> None:
    dtype = torch.float64 if params == torch.float64 else torch.bfloat16
    if params == torch.float16:
        dtype = torch.float16
    x, dy = torch.randn(2, 4, 5, 12, 11).to(dtype).unbind()
    weight, bias, old_mean, old_var = torch.rand(4, 5).to(params) + 0.5
    mean, var = old_mean.clone(), old_var.clone()
    weight = weight.requires_grad_() if "w" in given else None
    bias = bias.requires_grad_() if "b" in given else None
    leaf = x.clone().requires_grad_()
    y = CudaOnCpu()(leaf, mean, var, weight, bias, training, 0.25)

    reference = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    their_mean, their_var = old_mean.double(), old_var.double()
    expected = torch.nn.functional.batch_norm(
        reference[0], their_mean, their_var, reference[1], reference[2], training, 0.25
    )
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.double(), expected, **close)
    for ours, theirs in ((mean, their_mean), (var, their_var)):
        torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(params).eps, atol=1e-6)
    present = [i for i, t in enumerate((leaf, weight, bias)) if t is not None]
    ours = torch.autograd.grad(y, [(leaf, weight, bias)[i] for i in present], dy)
    theirs = torch.autograd.grad(expected, [reference[i] for i in present], dy.double())
    for a, b in zip(ours, theirs, strict=True):
        limit = max(torch.finfo(a.dtype).eps, 1e-6)
        torch.testing.assert_close(a.double(), b, rtol=4 * limit, atol=8 * limit)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0, -0.5])
def test_running_statistics_and_count(momentum: float | None) -> None:
    """Like torch's module, over several batches; momentum None is the mean over all."""
    stock = torch.nn.BatchNorm2d(7, momentum=momentum)
    mean, var, count = torch.zeros(7), torch.ones(7), torch.tensor(0)
    for seed in range(4):
        x = torch.randn(3, 7, 6, 5) * (seed + 1) + seed
        CudaOnCpu(Settings(seed=seed))(x, mean, var, None, None, True, momentum, 1e-5, count)
        stock(x)
        assert count.item() == seed + 1
        torch.testing.assert_close(mean, stock.running_mean)
        torch.testing.assert_close(var, stock.running_var)


def test_running_statistics_may_be_absent() -> None:
    x = torch.randn(3, 7, 6, 5)
    y = CudaOnCpu()(x, None, None, None, None, True)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))


def test_eval_changes_nothing() -> None:
    mean, var, count = torch.randn(7), torch.rand(7) + 0.5, torch.tensor(3)
    before = [t.clone() for t in (mean, var, count)]
    CudaOnCpu()(torch.randn(3, 7, 6, 5), mean, var, None, None, False, 0.1, 1e-5, count)
    for a, b in zip((mean, var, count), before, strict=True):
        assert torch.equal(a, b)


def test_running_statistics_come_from_the_saved_ones_in_eval() -> None:
    """What the backward pass gets: mean and rstd of every channel, written once whichever thread comes first."""
    x = torch.randn(3, 70, 7, 7)
    vectors = {
        "weight": None,
        "bias": None,
        "running_mean": np.random.default_rng(0).normal(size=70).astype("float32"),
        "running_var": np.random.default_rng(1).random(70).astype("float32"),
        "num_batches_tracked": None,
    }
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = x.contiguous(memory_format=layout)
        results = kernels().forward(
            shape_of(laid), "float32", "float32", memory_of(laid), vectors, Settings(), training=False, eps=0.5
        )
        np.testing.assert_array_equal(results["mean"], vectors["running_mean"])
        np.testing.assert_allclose(results["rstd"], 1 / np.sqrt(vectors["running_var"] + 0.5), rtol=2e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_only_the_gradients_asked_for(
    wanted: tuple[bool, bool, bool], training: bool, layout: torch.memory_format
) -> None:
    """They are what they are together; a pass without sums has one launch, and nothing asked for none.

    A block that holds its slice reads all of it, whatever is asked for.
    """
    x, dy = (torch.randn(4, 5, 6, 7).contiguous(memory_format=layout) for _ in range(2))
    saved = {name: np.linspace(0.5, 2, 5, dtype="float32") for name in SAVED}

    def run(wanted: tuple[bool, bool, bool]) -> dict[str, Any]:
        return kernels().backward(
            *(shape_of(x), "float32", "float32", memory_of(dy), memory_of(x), saved, Settings()),
            training=training,
            wanted=(*wanted, False),
        )

    everything = run((True, True, True))
    results = run(wanted)
    device = kernels().device
    sums = wanted[1] or wanted[2] or (training and wanted[0])
    single_pass = results["plan"].team > 0
    assert device.launch_count() == (1 if single_pass else 2 * sums + (wanted[0] and (training or not sums)))
    # In eval dx is written along with the sums, and only dweight needs x.
    reads = 2 if single_pass else 4 if training and wanted[0] else any(wanted) + wanted[1]
    assert device.counters("activation").bytes_read == reads * x.numel() * 4
    assert device.counters("activation").bytes_written == wanted[0] * x.numel() * 4
    for name, asked in zip(("dx", "dweight", "dbias"), wanted, strict=True):
        assert (results[name] is not None) == asked
        assert not asked or np.array_equal(results[name], everything[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (3, 4, 30, 30)])
def test_one_gradient_for_all(shape: tuple[int, ...], training: bool) -> None:
    """What y.sum().backward() makes: dy is one value in memory, of any alignment."""
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(shape), torch.rand(shape[1]), torch.rand(shape[1])))
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    dy = torch.tensor(0.7).expand(shape)
    ours = torch.autograd.grad(CudaOnCpu()(x, mean, var, weight, bias, training), (x, weight, bias), dy)
    theirs = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training)
    for a, b in zip(ours, torch.autograd.grad(theirs, (x, weight, bias), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 8000), (2, 3, 7), (3, 64, 49)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Images 3 * 2^30 values apart, in memory that is reserved, not used."""
    operator = CudaOnCpu(Settings(gap=3 * 2**30))
    assert_within_tolerance(testing.check(operator, testing.Case(shape, dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("every_path", ["multi_kernel", "block"], indirect=True)  # the plan of block is the others' too
def test_more_than_65535_blocks() -> None:
    case = testing.Case((1, 66_000, 128), torch.float32)
    operator = CudaOnCpu()
    assert_within_tolerance(testing.check(operator, case))
    assert all(call.plan.slices * call.plan.segments > 65535 for call in operator.calls)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(32, 8, 28, 28), (16, 40, 7, 7), (64, 3, 2, 2)])
def test_large_mean_small_deviation(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Mean 1e4, deviation 0.1: statistics exact to float32 rounding."""
    x = (torch.randn(shape) * 0.1 + 1e4).contiguous(memory_format=layout)
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y = CudaOnCpu()(x, mean, var, None, None, True, 1.0)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)
    expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    assert (y.double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("unlike", [0, 3, 40])
def test_first_values_unlike_the_rest(layout: torch.memory_format, unlike: int) -> None:
    """The values that a shift is taken from need not be like the others."""
    x = torch.randn(1000, 4, 8, 8) * 0.1
    x[: unlike + 1] = 1e4
    mean, var = torch.zeros(4), torch.ones(4)
    CudaOnCpu()(x.contiguous(memory_format=layout), mean, var, None, None, True, 1.0)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=5e-7, atol=0)


RAMP = torch.linspace(0, 1, 40_000)
ORDERS = {
    "a ramp": RAMP,
    "a ramp far from 0": RAMP + 1e3,
    "sorted": torch.randn(40_000, generator=torch.Generator().manual_seed(0)).sort()[0] + 100,
    "two halves": torch.cat([RAMP[:20_000] + 50, RAMP[:20_000] - 50]),
    "in turns": torch.tensor([4.0, 2.0]).repeat(20_000),
    "constant": torch.full((40_000,), 1234.567),
}


@pytest.mark.parametrize("shape", [(4, 1, 100, 100), (40_000, 1), (2500, 1, 4, 4)])
@pytest.mark.parametrize("name", ORDERS)
def test_values_in_an_order(name: str, shape: tuple[int, ...]) -> None:
    """So that a mean of what was there so far is far from what comes."""
    x = ORDERS[name].view(shape).repeat_interleave(4, 1).contiguous()
    mean, var = torch.zeros(4), torch.ones(4)
    CudaOnCpu()(x, mean, var, None, None, True, 1.0)
    exact = ORDERS[name].double()
    torch.testing.assert_close(mean.double(), exact.mean().expand(4), rtol=1.2e-7, atol=3e-8 * float(exact.std()))
    torch.testing.assert_close(var.double(), exact.var().expand(4), rtol=2e-7, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 3, 6, 7), (40, 70, 3, 3), (8, 6, 12, 12)])
@pytest.mark.parametrize("scale", [1e25, 4e37])
def test_squares_beyond_float32(shape: tuple[int, ...], layout: torch.memory_format, scale: float) -> None:
    """Some channels overflow, their neighbours do not; neither do sums of values near the greatest number."""
    x = torch.randn(shape).clamp(-4, 4)
    x[:, ::2] *= scale
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y = CudaOnCpu()(x.contiguous(memory_format=layout), mean, var, None, None, True, 1.0)
    expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("training", [True, False])
def test_inf_and_nan_stay_in_their_channel(layout: torch.memory_format, bad: float, training: bool) -> None:
    for width in (3, 9, 33):
        clean = torch.randn(4, 5, 6, width).contiguous(memory_format=layout)
        x = clean.clone()
        x[-1, 2, -1, -1] = bad
        dy = torch.randn(4, 5, 6, width)
        results = []
        for values in (x, clean):
            leaf = values.requires_grad_()
            mean, var = torch.zeros(5), torch.ones(5)
            y = CudaOnCpu()(leaf, mean, var, None, None, training)
            (dx,) = torch.autograd.grad(y, leaf, dy)
            results.append([y.detach(), dx, mean.view(1, 5, 1, 1), var.view(1, 5, 1, 1)])
        others = [0, 1, 3, 4]
        for with_bad, without in zip(*results, strict=True):
            assert torch.equal(with_bad[:, others], without[:, others])
        if training:
            assert not torch.isfinite(results[0][2][:, 2]).any()
        else:  # dx = dy * weight * rstd does not look at x
            assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_input_is_the_bias(dtype: torch.dtype) -> None:
    for value in (0.0, 3.0, -1000.5):
        x = torch.full((4, 3, 7, 9), value, dtype=dtype).requires_grad_()
        bias = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        y = CudaOnCpu()(x, None, None, None, bias, True)
        torch.testing.assert_close(y.double(), bias.double().view(1, 3, 1, 1).expand(y.shape), atol=1e-2, rtol=0)
        y.backward(torch.randn_like(y))
        assert torch.isfinite(x.grad).all()
