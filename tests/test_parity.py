"""The operator against float64 formulas: extreme shapes, absent and strided parameters."""

import pytest
import torch
from torch.nn import functional as F

import bn_ext
from bn_ext import testing

DTYPES = list(testing.TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 70000), (70000, 3), (2, 5, 300, 301), (1, 1, 9, 9), (300, 2, 1, 1), (7, 1)])
def test_extreme_shapes(device: str, dtype: torch.dtype, training: bool, shape: tuple[int, ...]) -> None:
    case = testing.Case(shape, dtype, training=training, device=device)
    shares = testing.check(bn_ext.batch_norm, case)
    assert max(shares.values()) <= 1, shares


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
