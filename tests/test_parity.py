"""The operator against float64 formulas, over random shapes, strides, offsets, dtypes and flags."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.nn import functional as F

import bn_ext
from bn_ext import testing

DTYPES = list(testing.TOLERANCE)


def assert_within_tolerance(shares: dict[str, float]) -> None:
    """Every error is at most its tolerance."""
    assert max(shares.values()) <= 1, shares


@st.composite
def cases(draw: st.DrawFn) -> testing.Case:
    """A call of the operator on up to a few ten thousand values."""
    dims = draw(st.integers(2, 5))
    channels = draw(st.integers(1, 140))
    spatial = [draw(st.integers(1, 40 if dims < 5 else 6)) for _ in range(dims - 2)]
    batch = draw(st.integers(1, max(1, min(64, 60000 // (channels * math.prod(spatial))))))
    training = draw(st.booleans()) and batch * math.prod(spatial) > 1
    return testing.Case(
        shape=(batch, channels, *spatial),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(["contiguous", "channels_last"])),
        training=training,
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, 0.37])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        mean=draw(st.sampled_from([0.0, 0.5, -20.0])),
        deviation=draw(st.sampled_from([1.0, 0.05, 30.0])),
        seed=draw(st.integers(0, 1000)),
    )


@hypothesis.given(case=cases())
@hypothesis.settings(max_examples=250, deadline=None)
def test_any_case_agrees_with_float64(case: testing.Case) -> None:
    for device in testing.devices():
        assert_within_tolerance(testing.check(bn_ext.batch_norm, case.__class__(**{**vars(case), "device": device})))


def scrambled(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory: another order of dimensions, gaps, an offset, or all of them."""
    if "transposed" in how:
        order = [*reversed(range(tensor.dim()))]
        tensor = tensor.permute(order).contiguous().permute(order)
    if "gaps" in how:
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * 2), math.nan)
        wide[..., ::2] = tensor
        tensor = wide[..., ::2]
    if "offset" in how:
        buffer = tensor.new_full((tensor.numel() + 3,), math.nan)
        shifted = buffer[3:].as_strided(tensor.shape, tensor.contiguous().stride(), 3)
        tensor = shifted.copy_(tensor)
    return tensor


@hypothesis.given(
    case=cases(),
    how_input=st.sampled_from(["transposed", "gaps", "offset", "transposed gaps", ""]),
    how_gradient=st.sampled_from(["transposed", "gaps", "offset", "transposed gaps", ""]),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_strides_and_offsets_agree_with_float64(case: testing.Case, how_input: str, how_gradient: str) -> None:
    def operator(x: torch.Tensor, *rest: object) -> torch.Tensor:
        y = bn_ext.batch_norm(scrambled(x, how_input), *rest)
        return Scrambled.apply(y, how_gradient)

    assert_within_tolerance(testing.check(operator, case))


class Scrambled(torch.autograd.Function):
    """Passes values through, and hands the gradient back in other memory."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, y: torch.Tensor, how: str) -> torch.Tensor:
        ctx.how = how
        return y.view_as(y)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scrambled(dy, ctx.how), None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 70000), (70000, 3), (2, 5, 300, 301), (1, 1, 9, 9), (300, 2, 1, 1), (7, 1)])
def test_extreme_shapes(device: str, dtype: torch.dtype, training: bool, shape: tuple[int, ...]) -> None:
    assert_within_tolerance(testing.check(bn_ext.batch_norm, testing.Case(shape, dtype, training=training)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("params", ["float32", "same"])
@pytest.mark.parametrize("given", ["", "weight", "bias", "weight bias"])
def test_absent_parameters(device: str, dtype: torch.dtype, training: bool, params: str, given: str) -> None:
    """As stock in float64; parameters may also have the 16-bit dtype of the input."""
    params_dtype = dtype if params == "same" or dtype == torch.float64 else torch.float32
    x = torch.randn(6, 5, 4, 7, device=device).to(dtype)
    vectors = {name: torch.rand(5, device=device).to(params_dtype) + 0.5 for name in ("weight", "bias", "mean", "var")}
    used = {name: vectors[name] for name in given.split()}
    ours = [vectors["mean"].clone(), vectors["var"].clone()]
    stock = [t.double() for t in ours]
    y = bn_ext.batch_norm(x, *ours, **used, training=training)
    expected = F.batch_norm(x.double(), *stock, **{k: v.double() for k, v in used.items()}, training=training)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype == params_dtype
        rounding = 2 * torch.finfo(params_dtype).eps
        torch.testing.assert_close(mine.double(), theirs, rtol=rounding, atol=rounding)


def test_strided_and_shaped_parameters(device: str) -> None:
    """Weight and statistics may be slices, and need not be one-dimensional, as in torch."""
    x = torch.randn(6, 3, 4, 7, device=device)
    weight = torch.rand(3, 2, device=device)[:, :1].requires_grad_()
    mean, var = torch.zeros(6, device=device)[::2], torch.ones(6, device=device)[::2]
    stock_mean, stock_var = mean.clone(), var.clone()
    y = bn_ext.batch_norm(x, mean, var, weight, None, training=True)
    expected = F.batch_norm(x, stock_mean, stock_var, weight.detach().squeeze(1), None, training=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, stock_mean)
    torch.testing.assert_close(var, stock_var)
    (gradient,) = torch.autograd.grad(y.sum() * 2, weight)
    assert gradient.shape == (3, 1)
