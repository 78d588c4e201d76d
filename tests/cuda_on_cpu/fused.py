"""What batch norm with an activation and a residual must give: float64 autograd, and how far a result may be off it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_ext import testing

from .operators import CudaOnCpu


@dataclass(frozen=True)
class Activation:
    """One by torch."""

    function: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()
    """Where the derivative jumps."""
    alpha: float = 0.0
    """What the operator gets."""


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(lambda u: u),
    "relu": Activation(F.relu, (0,)),
    "leaky_relu": Activation(partial(F.leaky_relu, negative_slope=0.2), (0,), 0.2),
    "relu6": Activation(F.relu6, (0, 6)),
    "elu": Activation(partial(F.elu, alpha=1.5), (0,), 1.5),
    "silu": Activation(F.silu),
    "gelu": Activation(F.gelu),
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh")),
    "hardswish": Activation(F.hardswish, (-3, 3)),
    "sigmoid": Activation(torch.sigmoid),
    "tanh": Activation(torch.tanh),
    "mish": Activation(F.mish),
}

ARITHMETIC = 8
"""Largest allowed error of what is computed in float32 (float64 for float64), in units of its eps and of the terms'
magnitude: 4 for batch norm, as in bn_ext.testing.TOLERANCE, times the steepest slope of any activation and of any
derivative, 1.5; and 2 for the activation's own arithmetic."""


def make_residual(case: testing.Case, x: Tensor) -> Tensor:
    """Random values laid out as x, for a case."""
    values = torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed + 1000))
    return torch.empty_like(x).copy_(values)


@dataclass
class Reference:
    """Float64 results, and the largest allowed error of each."""

    results: dict[str, Tensor]
    errors: dict[str, Tensor]
    before: Tensor
    """u + z."""
    near_kink: Tensor
    """Where rounding decides on which side of a kink u + z is; dy is taken as zero there."""


def reference(case: testing.Case, inputs: testing.Inputs, name: str | None, residual: Tensor | None) -> Reference:
    """By torch's batch_norm and activation; errors from the formulas on the absolute values of their terms."""
    activation = ACTIVATIONS[name]
    dims, per_channel = [0, *range(2, len(case.shape))], [1, -1] + [1] * (len(case.shape) - 2)
    leaves = [t.double().requires_grad_() for t in (inputs.input, inputs.weight, inputs.bias)]
    zeros = torch.zeros(case.shape, dtype=torch.float64)
    z = (zeros if residual is None else residual.double()).requires_grad_()
    running = [t.double().clone() for t in (inputs.running_mean, inputs.running_var)]
    before = F.batch_norm(leaves[0], *running, leaves[1], leaves[2], case.training, case.momentum, case.eps) + z
    y = activation.function(before)

    x, w, b = (t.detach() for t in leaves)
    mean, var = (
        (x.mean(dims), x.var(dims, correction=0)) if case.training else (inputs.running_mean, inputs.running_var)
    )
    mean, rstd = mean.double().view(per_channel), (var.double().view(per_channel) + case.eps).rsqrt()
    w, b = w.view(per_channel), b.view(per_channel)
    xhat_size = (x - mean).abs() * rstd + mean.abs() * rstd + 1
    size = xhat_size * w.abs() + b.abs() + z.detach().abs()
    arithmetic = ARITHMETIC * torch.finfo(case.params_dtype).eps
    near = torch.zeros(case.shape, dtype=torch.bool)
    for kink in activation.kinks:
        near |= (before.detach() - kink).abs() <= arithmetic * size

    dy = inputs.dy.double().masked_fill(near, 0)
    dx, dweight, dbias, dz = torch.autograd.grad(y, (*leaves, z), dy)
    average = partial(torch.mean, dim=dims, keepdim=True) if case.training else (lambda t: 0)
    sums = partial(torch.sum, dim=dims)
    dz_error = arithmetic * dy.abs() * (size + 1)
    terms = dz.abs() * arithmetic + dz_error
    through = terms + average(terms) + xhat_size * average(terms * xhat_size)
    # The one rounding to the activations' dtype: half a unit in the last place, of subnormal numbers the smallest step.
    limits = torch.finfo(case.dtype)
    rounding, step = 0.505 * limits.eps, limits.smallest_normal * limits.eps
    results = {"y": y.detach(), "dx": dx, "dweight": dweight, "dbias": dbias, "dz": dz}
    results |= {"running_mean": running[0], "running_var": running[1]}
    errors = {
        "y": arithmetic * (size + y.detach().abs()) + rounding * y.detach().abs() + step,
        "dx": (w * rstd).abs() * through + rounding * dx.abs() + step,
        "dweight": sums(terms * xhat_size),
        "dbias": sums(terms),
        "dz": dz_error + rounding * dz.abs() + step,
        "running_mean": arithmetic * (running[0].abs() + 1),
        "running_var": arithmetic * (running[1] + 1),
    }
    return Reference(results, errors, before.detach(), near)


def check(operator: CudaOnCpu, case: testing.Case, name: str | None, has_residual: bool) -> None:
    """Compare every result of both passes with the reference."""
    inputs = testing.make_inputs(case)
    residual = make_residual(case, inputs.input) if has_residual else None
    expected = reference(case, inputs, name, residual)
    dy = inputs.dy.masked_fill(expected.near_kink, 0)
    leaves = [t.clone().requires_grad_() for t in (inputs.input, inputs.weight, inputs.bias)]
    z = None if residual is None else residual.clone().requires_grad_()
    mean, var = inputs.running_mean.clone(), inputs.running_var.clone()
    y = operator(
        *(leaves[0], mean, var, leaves[1], leaves[2], case.training, case.momentum, case.eps),
        activation=name,
        alpha=ACTIVATIONS[name].alpha,
        residual=z,
    )
    gradients = torch.autograd.grad(y, [*leaves, *([] if z is None else [z])], dy)
    results = dict(zip(("dx", "dweight", "dbias", "dz"), gradients, strict=False))
    results |= {"y": y.detach(), "running_mean": mean, "running_var": var}
    for quantity, result in results.items():
        off = (result.double() - expected.results[quantity]).abs()
        share = (off / expected.errors[quantity]).max().item()
        assert math.isfinite(share), (name, has_residual, case, quantity)
        assert share <= 1, (name, has_residual, case, quantity, share)
