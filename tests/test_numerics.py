"""Numbers at their limits: large means, constants, overflow, inf and NaN, every 16-bit value, bit-equality."""

import math

import pytest
import torch
from torch.nn import functional as F

import bn_ext
from bn_ext import testing

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def batch_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, mean and unbiased variance of one training step with momentum 1."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    var = torch.ones_like(mean)
    y = bn_ext.batch_norm(x, mean, var, training=True, momentum=1.0)
    return y, mean, var


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 8, 28, 28), (16, 40, 7, 7), (64, 3, 2, 2), (64, 5, 11, 11)])
def test_large_mean_small_deviation(device: str, memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
    """Mean 1e4, deviation 0.1: statistics exact to float32 rounding, the output no worse than torch's."""
    x = (torch.randn(shape) * 0.1 + 1e4).to(device).contiguous(memory_format=memory_format)
    y, mean, var = batch_statistics(x)
    exact = x.double()
    exact_var, exact_mean = torch.var_mean(exact, (0, 2, 3))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)
    expected = F.batch_norm(exact, None, None, training=True)
    theirs = F.batch_norm(x, None, None, training=True)
    error, their_error = ((t.double() - expected).abs().max() for t in (y, theirs))
    assert error <= max(their_error, 1e-6)
    assert error < 1e-5


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("position", [0, 5, 700])
def test_one_outlier_does_not_spoil_the_variance(
    device: str, memory_format: torch.memory_format, position: int
) -> None:
    x = torch.randn(4, 3, 20, 30).to(device).contiguous(memory_format=memory_format)
    x[position // 600, 1, position % 600 // 30, position % 30] = 1e6
    _, mean, var = batch_statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_first_image_unlike_the_rest(device: str, memory_format: torch.memory_format) -> None:
    """The values that a shift is taken from need not be like the others."""
    x = (torch.randn(1000, 4, 8, 8) * 0.1).to(device)
    x[0] = 1e4
    y, mean, var = batch_statistics(x.contiguous(memory_format=memory_format))
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    # The values are 300 times as far from the mean as the mean is from zero: rounding is measured against that.
    torch.testing.assert_close(mean.double(), exact_mean, rtol=0, atol=5e-8 * float(exact_var.sqrt().min()))
    torch.testing.assert_close(var.double(), exact_var, rtol=5e-7, atol=0)
    torch.testing.assert_close(y.double(), F.batch_norm(x.double(), None, None, training=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("dtype", list(testing.TOLERANCE))
@pytest.mark.parametrize("value", [0.0, 3.0, -1000.5])
def test_constant_input_is_the_bias(
    device: str, memory_format: torch.memory_format, dtype: torch.dtype, value: float
) -> None:
    x = torch.full((4, 3, 7, 9), value).to(device, dtype).contiguous(memory_format=memory_format).requires_grad_()
    params = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.tensor([0.5, -1.0, 2.0], dtype=params, device=device)
    y = bn_ext.batch_norm(x, None, None, None, bias, training=True)
    torch.testing.assert_close(y.double(), bias.double().view(1, 3, 1, 1).expand(4, 3, 7, 9), atol=1e-2, rtol=0)
    y.backward(torch.randn_like(y))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("scale", [1e25, 4e37])
def test_squares_beyond_float32(device: str, memory_format: torch.memory_format, scale: float) -> None:
    """Values whose squares overflow float32: torch normalises them on the CPU."""
    x = (torch.randn(4, 3, 6, 7).clamp(-4, 4) * scale).to(device).contiguous(memory_format=memory_format)
    y, _, _ = batch_statistics(x)
    torch.testing.assert_close(y.double(), F.batch_norm(x.double(), None, None, training=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("width", [3, 9, 33])
@pytest.mark.parametrize("training", [True, False])
def test_inf_and_nan_stay_in_their_channel(
    device: str, memory_format: torch.memory_format, bad: float, width: int, training: bool
) -> None:
    x = torch.randn(4, 5, 6, width).to(device).contiguous(memory_format=memory_format)
    clean = x.clone(memory_format=torch.preserve_format)
    x[-1, 2, -1, -1] = bad
    dy = torch.randn(4, 5, 6, width).to(device)
    results = {}
    for name, values in {"bad": x, "clean": clean}.items():
        leaf = values.requires_grad_()
        weight = torch.ones(5, device=device, requires_grad=True)
        mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
        y = bn_ext.batch_norm(leaf, mean, var, weight, None, training=training)
        dx, dweight = torch.autograd.grad(y, (leaf, weight), dy)
        results[name] = [y.detach(), dx, dweight.view(1, 5, 1, 1), mean.view(1, 5, 1, 1), var.view(1, 5, 1, 1)]
    others = [0, 1, 3, 4]
    for with_bad, without in zip(results["bad"], results["clean"], strict=True):
        assert torch.equal(with_bad[:, others], without[:, others])
        assert torch.isfinite(with_bad[:, others]).all()
    mean, var = torch.zeros(5), torch.ones(5)
    F.batch_norm(x.detach().cpu(), mean, var, training=training)
    # Whether a mean with inf in it is inf or NaN depends on the order of sums, which a GPU has its own of.
    kind = torch.isnan if device == "cpu" else lambda t: ~t.isfinite()
    assert torch.equal(kind(results["bad"][3].flatten().cpu()), kind(mean))
    assert torch.equal(kind(results["bad"][4].flatten().cpu()), kind(var))
    if not training:  # dx = dy * weight * rstd does not look at x
        assert torch.equal(results["bad"][1], results["clean"][1])


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit float type, (256, 256)."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)


def check_every_16_bit_value(device: str) -> None:
    """Eval with mean 0 and variance 1 is a multiplication and one rounding."""
    zero, one = torch.zeros(256, device=device), torch.ones(256, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        x = all_values(dtype).to(device)
        for scale in (1.0, 1 / 3, 3.0, 2.0**-12):
            weight = torch.full((256,), scale, device=device)
            for shape in ((256, 256), (1, 256, 256), (16, 256, 16)):
                y = bn_ext.batch_norm(x.view(shape), zero, one, weight, None, False, eps=0.0)
                expected = (x.view(shape).float() * weight.view(1, 256, *[1] * (len(shape) - 2))).to(dtype)
                same = (y == expected) | (y.isnan() & expected.isnan())
                assert same.all(), (dtype, scale, shape, (~same).sum())


def test_every_16_bit_value_is_right_on(device: str) -> None:
    check_every_16_bit_value(device)


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 30, 30), (64, 3, 50, 50), (16, 600, 7, 7), (4, 2, 300, 300)])
def test_bit_equal_from_run_to_run_and_for_any_number_of_threads(
    memory_format: torch.memory_format, shape: tuple[int, ...]
) -> None:
    """Of the CPU; test_cuda.py has the same for a GPU."""
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape).contiguous(memory_format=memory_format)
    weight = torch.rand(shape[1], requires_grad=True)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2, 3, 7):
            torch.set_num_threads(count)
            mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
            y = bn_ext.batch_norm(x, mean, var, weight, None, training=True)
            runs.append([y.detach(), mean, var, *torch.autograd.grad(y, (x, weight), dy)])
            y = bn_ext.batch_norm(x, None, None, weight, training=True, activation="relu", residual=dy)
            runs[-1] += [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ("bias",)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_beside_float32_statistics(
    device: str, dtype: torch.dtype, names: tuple[str, ...], training: bool
) -> None:
    """As FSDP makes them: the values are theirs, the arithmetic is float32, and the gradients have their dtype."""
    x, dy = (torch.randn(4, 6, 5, 7, device=device).to(dtype) for _ in range(2))
    values = {name: torch.rand(6, device=device).to(dtype).float() for name in ("weight", "bias")}

    def run(**narrow: torch.dtype) -> list[torch.Tensor]:
        statistics = torch.zeros(6, device=device), torch.ones(6, device=device)
        leaves = [values[name].to(narrow.get(name)).requires_grad_() for name in values]
        inputs = [x.clone().requires_grad_(), *leaves]
        y = bn_ext.batch_norm(inputs[0], *statistics, *leaves, training, activation="relu")
        return [y, *statistics, *torch.autograd.grad(y, inputs, dy)]

    actual, expected = run(**dict.fromkeys(names, dtype)), run()
    for name, index in {"weight": 4, "bias": 5}.items():
        if name in names:
            expected[index] = expected[index].to(dtype)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)
