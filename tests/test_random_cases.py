"""The operator against float64 formulas, over random shapes, strides, offsets, dtypes and flags."""

import dataclasses
import math

import pytest
import torch

import bn_ext
from bn_ext import testing

hypothesis = pytest.importorskip("hypothesis", reason="draws its cases with hypothesis, which is not installed")
st = hypothesis.strategies

# The device is the same for all examples of a test.
SETTINGS = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture]}


def assert_within_tolerance(shares: dict[str, float]) -> None:
    """Every error is at most its tolerance."""
    assert max(shares.values()) <= 1, shares


@st.composite
def cases(draw: "st.DrawFn") -> testing.Case:
    """A call of the operator on up to a few ten thousand values."""
    dims = draw(st.integers(2, 5))
    channels = draw(st.integers(1, 140))
    spatial = [draw(st.integers(1, 40 if dims < 5 else 6)) for _ in range(dims - 2)]
    batch = draw(st.integers(1, max(1, min(64, 60000 // (channels * math.prod(spatial))))))
    training = draw(st.booleans()) and batch * math.prod(spatial) > 1
    return testing.Case(
        shape=(batch, channels, *spatial),
        dtype=draw(st.sampled_from(list(testing.TOLERANCE))),
        layout=draw(st.sampled_from(["contiguous", "channels_last"])),
        training=training,
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, 0.37])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        mean=draw(st.sampled_from([0.0, 0.5, -20.0])),
        deviation=draw(st.sampled_from([1.0, 0.05, 30.0])),
        seed=draw(st.integers(0, 1000)),
    )


@hypothesis.given(case=cases())
@hypothesis.settings(max_examples=250, **SETTINGS)
def test_any_case_agrees_with_float64(device: str, case: testing.Case) -> None:
    assert_within_tolerance(testing.check(bn_ext.batch_norm, dataclasses.replace(case, device=device)))


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
@hypothesis.settings(max_examples=100, **SETTINGS)
def test_any_strides_and_offsets_agree_with_float64(
    device: str, case: testing.Case, how_input: str, how_gradient: str
) -> None:
    def operator(x: torch.Tensor, *rest: object) -> torch.Tensor:
        y = bn_ext.batch_norm(scrambled(x, how_input), *rest)
        return Scrambled.apply(y, how_gradient)

    assert_within_tolerance(testing.check(operator, dataclasses.replace(case, device=device)))


class Scrambled(torch.autograd.Function):
    """Passes values through, and hands the gradient back in other memory."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, y: torch.Tensor, how: str) -> torch.Tensor:
        ctx.how = how
        return y.view_as(y)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scrambled(dy, ctx.how), None
