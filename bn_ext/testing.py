"""Check a batch-norm operator against float64 formulas: this package's own, or yours.

An operator is anything that is called like :func:`torch.nn.functional.batch_norm`::

    from bn_ext.testing import Case, check

    errors = check(my_batch_norm, Case(shape=(8, 64, 56, 56), dtype=torch.bfloat16))
    assert max(errors.values()) <= 1  # each is a share of its tolerance

`python -m bn_ext verify` runs :func:`verify` over dtypes and layouts on the devices of the machine.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bn_ext._build_info import build_info
from bn_ext.activations import Activation, apply, resolve
from bn_ext.functional import batch_norm

TOLERANCE = {
    # Float32 sums of up to some thousand values, merged in float64; rounding of mean, rstd and coefficients.
    torch.float32: 4.0,
    torch.float64: 4.0,
    # Computed as in float32; what counts is the one rounding to the output's dtype, half a unit in the last place.
    torch.float16: 1.0,
    torch.bfloat16: 1.0,
}
"""Largest allowed error of a result, in units of its dtype's eps times the magnitude of the terms it is made of."""

QUANTITIES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
"""What is compared, in the order of the tables; with a residual, dresidual too."""

STEEPEST = 1.5
"""No activation, and no activation's derivative, is steeper, up to its parameter."""

KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}
"""Where an activation's derivative jumps."""

_FORMATS = {
    "contiguous": {},
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operator: random values of the given mean and deviation, drawn from `seed`."""

    shape: tuple[int, ...]
    """Of input, (N, C, ...)."""
    dtype: torch.dtype = torch.float32
    """Of input; weight, bias and running statistics are float64 for float64, else float32."""
    layout: str = "contiguous"
    """Of input and gradient: "contiguous", or "channels_last" (4D and 5D input)."""
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    mean: float = 0.5
    deviation: float = 2.0
    device: str = "cpu"
    seed: int = 0
    activation: Activation = None
    residual: bool = False
    """Whether one is added."""

    @property
    def params_dtype(self) -> torch.dtype:
        """Of weight, bias and running statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of a case, rounded to their dtypes. None of them is changed by :func:`check`."""

    input: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None = None


def make_inputs(case: Case) -> Inputs:
    """Draw the tensors of a case; the same for the same case."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).to(case.device)

    def activation(values: Tensor) -> Tensor:
        memory_format = _FORMATS[case.layout].get(len(case.shape), torch.contiguous_format)
        return values.to(case.dtype).contiguous(memory_format=memory_format)

    channels = (case.shape[1],)
    values = normal(case.shape, torch.float64) * case.deviation + case.mean
    inputs = Inputs(
        input=activation(values),
        dy=activation(normal(case.shape, torch.float64)),
        weight=normal(channels, case.params_dtype),
        bias=normal(channels, case.params_dtype),
        running_mean=normal(channels, case.params_dtype),
        running_var=normal(channels, case.params_dtype).abs() + 0.5,
        residual=activation(normal(case.shape, torch.float64)) if case.residual else None,
    )
    # At a kink, rounding decides which derivative it is: no gradient comes from there.
    u = _Exact(case, inputs).u
    for kink in KINKS.get(resolve(case.activation)[0] or "", ()):
        inputs.dy[(u - kink).abs() < 1e-3] = 0
    return inputs


def reference(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute every quantity in float64 from its formula.

    Returns:
        For each quantity its value, and its magnitude: the same formula on the absolute values of its terms,
        which is what rounding errors are proportional to.
    """
    e = _Exact(case, inputs)
    activation = resolve(case.activation)
    steepest = STEEPEST * max(1.0, abs(activation[1])) if activation[0] else 1.0
    u = e.u.clone().requires_grad_()
    y = apply(u, activation)
    (g,) = torch.autograd.grad(y, u, inputs.dy.double())
    # The batch's mean is off by rounding errors of values as large as the mean and the deviation.
    u_size = (e.xhat_size + (1 if case.training else 0)) * e.weight.abs() + e.bias.abs() + e.residual.abs()
    g_size = inputs.dy.double().abs() * (1 if activation[0] is None else steepest * (1 + u_size))

    def average(t: Tensor) -> Tensor:
        return t.mean(e.dims, keepdim=True) if case.training else torch.zeros_like(e.rstd)

    dx = e.weight * e.rstd * (g - average(g) - e.xhat * average(g * e.xhat))
    dx_size = (e.weight * e.rstd).abs() * (g_size + average(g_size) + e.xhat_size * average(g_size * e.xhat_size))
    momentum = case.momentum if case.training else 0.0
    count = math.prod(case.shape) // case.shape[1]
    unbiased = e.var * count / max(count - 1, 1)
    old_mean, old_var = inputs.running_mean.double(), inputs.running_var.double()
    return {
        "y": (y.detach(), steepest * u_size + (0 if activation[0] is None else y.detach().abs())),
        "dx": (dx, dx_size),
        "dweight": ((g * e.xhat).sum(e.dims), (g_size * e.xhat_size).sum(e.dims)),
        "dbias": (g.sum(e.dims), g_size.sum(e.dims)),
        "running_mean": (
            (1 - momentum) * old_mean + momentum * e.mean,
            (1 - momentum) * old_mean.abs() + abs(momentum) * (e.mean.abs() + e.var.sqrt()),
        ),
        "running_var": (
            (1 - momentum) * old_var + momentum * unbiased,
            (1 - momentum) * old_var + abs(momentum) * (unbiased + _rounding_of_variance(case, e.mean, e.var)),
        ),
        **({"dresidual": (g, g_size)} if case.residual else {}),
    }


class _Exact:
    """What a case's formulas have in common, in float64; all but mean and var with the input's dimensions."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.dims = [0, *range(2, len(case.shape))]
        per_channel = [1, -1] + [1] * (len(case.shape) - 2)
        x = inputs.input.double()
        self.weight, self.bias = (t.double().view(per_channel) for t in (inputs.weight, inputs.bias))
        self.residual = torch.zeros_like(self.bias) if inputs.residual is None else inputs.residual.double()
        if case.training:
            self.mean = x.mean(self.dims)
            self.var = (x - self.mean.view(per_channel)).square().mean(self.dims)
        else:
            self.mean, self.var = inputs.running_mean.double(), inputs.running_var.double()
        mean = self.mean.view(per_channel)
        self.rstd = (self.var + case.eps).rsqrt().view(per_channel)
        self.xhat = (x - mean) * self.rstd
        # The mean is kept in float32: its rounding shows in xhat, and so in the gradients.
        self.xhat_size = self.xhat.abs() + mean.abs() * self.rstd
        self.u = self.xhat * self.weight + self.bias + self.residual


def _rounding_of_variance(case: Case, mean: Tensor, var: Tensor) -> Tensor:
    """What rounded means add to the variance's magnitude.

    Deviations are taken from a mean that is rounded to the dtype of statistics, so equal values need not give a
    variance of exactly zero; and means of parts, which are merged, are rounded to float64.
    """
    rounding = torch.finfo(case.params_dtype).eps * mean
    share_of_parts = torch.finfo(torch.float64).eps / torch.finfo(case.params_dtype).eps
    return rounding.square() + share_of_parts * mean.abs() * var.sqrt()


def run(operator: Callable[..., Tensor], case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Call the operator on copies of a case's tensors, forward and backward."""
    given = [t for t in (inputs.input, inputs.weight, inputs.bias, inputs.residual) if t is not None]
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
    x, w, b, *residual = leaves
    mean, var = inputs.running_mean.clone(), inputs.running_var.clone()
    more: dict[str, Any] = {"residual": residual[0]} if residual else {}
    if case.activation is not None:
        more["activation"] = case.activation
    y = operator(x, mean, var, w, b, case.training, case.momentum, case.eps, **more)
    dx, dweight, dbias, *dresidual = torch.autograd.grad(y, leaves, inputs.dy)
    results = dict(zip(QUANTITIES, (y.detach(), dx, dweight, dbias, mean, var), strict=True))
    return results | ({"dresidual": dresidual[0]} if dresidual else {})


def check(operator: Callable[..., Tensor], case: Case) -> dict[str, float]:
    """Compare an operator with the float64 reference.

    Args:
        operator: Called like :func:`torch.nn.functional.batch_norm`; differentiable. Where the case has them, with the
            keyword arguments activation and residual of :func:`bn_ext.batch_norm`.
        case: What to call it on.

    Returns:
        For each of `QUANTITIES`, and for dresidual where there is a residual, the largest error as a share of its
        tolerance: at most 1 if right, inf where a value is not finite or has the wrong shape or dtype.
    """
    inputs = make_inputs(case)
    results = run(operator, case, inputs)
    dtypes = dict.fromkeys(QUANTITIES, case.params_dtype) | dict.fromkeys(("y", "dx", "dresidual"), case.dtype)
    shares = {}
    for name, (value, magnitude) in reference(case, inputs).items():
        result = results[name]
        if result.shape != value.shape or result.dtype != dtypes[name]:
            shares[name] = math.inf
            continue
        limits = torch.finfo(result.dtype)
        # A subnormal result is rounded to a whole number of the smallest steps there are.
        tolerance = TOLERANCE[result.dtype] * limits.eps * magnitude + limits.smallest_normal * limits.eps
        share = ((result.double() - value).abs() / tolerance).max().item()
        shares[name] = share if math.isfinite(share) else math.inf
    return shares


SHAPES = ((64, 32), (16, 24, 50), (8, 64, 28, 28), (4, 512, 7, 7), (2, 3, 33, 35), (2, 16, 4, 9, 10))
"""What verify runs: (N, C), (N, C, L), wide and narrow planes, odd sizes, 3D."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The outcome of verify for one device, dtype, layout and mode."""

    device: str
    dtype: torch.dtype
    layout: str
    training: bool
    shares: dict[str, float]
    """For each of `QUANTITIES` the worst error of all shapes, as a share of its tolerance."""

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance."""
        return all(share <= 1 for share in self.shares.values())


def devices() -> list[str]:
    """The devices of this machine that bn_ext has kernels for."""
    return ["cpu", "cuda"] if build_info().cuda and torch.cuda.is_available() else ["cpu"]


def verify(
    operator: Callable[..., Tensor] = batch_norm,
    on: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> Iterator[Row]:
    """Check an operator over dtypes, layouts and modes.

    Args:
        operator: See :func:`check`.
        on: Devices; those of this machine that bn_ext has kernels for, if None.
        shapes: Of input.

    Yields:
        One :class:`Row` after another, as they are done.
    """
    for device in devices() if on is None else on:
        for dtype in TOLERANCE:
            for layout, formats in _FORMATS.items():
                fitting = [shape for shape in shapes if not formats or len(shape) in formats]
                for training in (True, False):
                    worst = dict.fromkeys(QUANTITIES, 0.0)
                    for seed, shape in enumerate(fitting):
                        case = Case(shape, dtype, layout, training, device=device, seed=seed)
                        for name, share in check(operator, case).items():
                            worst[name] = max(worst[name], share)
                    yield Row(device, dtype, layout, training, worst)
