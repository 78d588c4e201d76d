"""Check a batch-norm operator, this package's or yours, against float64 formulas.

An operator is any callable with the signature of `torch.nn.functional.batch_norm`. `check` runs it on one `Case`;
`verify`, or `python -m bn_ext verify`, runs it over dtypes and layouts on the devices of this machine. The examples
assume `from bn_ext.testing import *`.
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
    # Float32 sums of a few thousand values, merged in float64; rounding of mean, rstd and coefficients.
    torch.float32: 4.0,
    torch.float64: 4.0,
    # Computed as in float32; the single rounding to the output's dtype dominates: half a unit in the last place.
    torch.float16: 1.0,
    torch.bfloat16: 1.0,
}
"""Largest allowed error of a result, in units of its dtype's eps times the magnitude of its terms."""

QUANTITIES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
"""The results that are compared, in the order of the tables; with a residual, dresidual is added."""

STEEPEST = 1.5
"""An upper bound of the slope of every activation and of its derivative, up to a factor of its parameter."""

KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}
"""The points at which an activation's derivative jumps."""

_FORMATS = {"contiguous": {}, "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d}}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator: input has random values of the given mean and deviation, drawn from `seed`."""

    shape: tuple[int, ...]
    """Shape of input, (N, C, ...)."""
    dtype: torch.dtype = torch.float32
    """Dtype of input; weight, bias and running statistics are float64 if it is float64, else float32."""
    layout: str = "contiguous"
    """Layout of input and gradient: "contiguous", or "channels_last" (4D and 5D input)."""
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    mean: float = 0.5
    deviation: float = 2.0
    device: str = "cpu"
    seed: int = 0
    activation: Activation = None
    residual: bool = False
    """Whether a residual is added."""

    @property
    def params_dtype(self) -> torch.dtype:
        """Dtype of weight, bias and running statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of a case, rounded to their dtypes; `check` changes none of them."""

    input: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None = None


def make_inputs(case: Case) -> Inputs:
    """Draw the tensors of a case; equal cases get equal tensors.

    Args:
        case: Shapes, dtypes, device and seed.

    Returns:
        The `Inputs` of the case.

    Examples:
        >>> inputs = make_inputs(Case((8, 3, 4, 4), layout="channels_last"))
        >>> inputs.input.is_contiguous(memory_format=torch.channels_last)
        True
    """
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
    # Near a kink, rounding decides which derivative applies, so the incoming gradient there is 0.
    u = _Exact(case, inputs).u
    for kink in KINKS.get(resolve(case.activation)[0] or "", ()):
        inputs.dy[(u - kink).abs() < 1e-3] = 0
    return inputs


def reference(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute every quantity in float64 from its formula.

    Args:
        case: The call.
        inputs: The tensors of the case.

    Returns:
        A dict from each quantity to its value and its magnitude: the same formula on the absolute values of its terms.
            Rounding errors are proportional to the magnitude.

    Examples:
        >>> case = Case((8, 3, 4, 4))
        >>> list(reference(case, make_inputs(case)))
        ['y', 'dx', 'dweight', 'dbias', 'running_mean', 'running_var']
    """
    e = _Exact(case, inputs)
    activation = resolve(case.activation)
    steepest = STEEPEST * max(1.0, abs(activation[1])) if activation[0] else 1.0
    u = e.u.clone().requires_grad_()
    y = apply(u, activation)
    (g,) = torch.autograd.grad(y, u, inputs.dy.double())
    # The batch's mean has rounding errors proportional to the mean and to the deviation.
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
    """The float64 terms that a case's formulas share; all but mean and var have the input's number of dimensions."""

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
        # The mean is stored in float32: its rounding affects xhat, and thereby the gradients.
        self.xhat_size = self.xhat.abs() + mean.abs() * self.rstd
        self.u = self.xhat * self.weight + self.bias + self.residual


def _rounding_of_variance(case: Case, mean: Tensor, var: Tensor) -> Tensor:
    """The part of the variance's magnitude that comes from rounded means.

    Deviations are taken from a mean that is rounded to the dtype of the statistics, so the variance of equal values
    need not be exactly zero. The means of segments are rounded to float64 before they are merged.
    """
    rounding = torch.finfo(case.params_dtype).eps * mean
    segment_share = torch.finfo(torch.float64).eps / torch.finfo(case.params_dtype).eps
    return rounding.square() + segment_share * mean.abs() * var.sqrt()


def run(operator: Callable[..., Tensor], case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Call an operator on copies of a case's tensors, forward and backward.

    Args:
        operator: As for `check`.
        case: The call.
        inputs: The tensors of the case.

    Returns:
        A dict from each quantity to the operator's result.

    Examples:
        >>> case = Case((8, 3, 4, 4))
        >>> run(bn_ext.batch_norm, case, make_inputs(case))["dx"].shape
        torch.Size([8, 3, 4, 4])
    """
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
        operator: A differentiable callable with the signature of `torch.nn.functional.batch_norm`. If the case has
            them, the keyword arguments activation and residual of `bn_ext.batch_norm` are passed too.
        case: The call.

    Returns:
        A dict from each of `QUANTITIES`, and dresidual if there is a residual, to its largest error as a fraction of
            its tolerance: at most 1 if correct, inf if a value is not finite or has the wrong shape or dtype.

    Examples:
        >>> max(check(bn_ext.batch_norm, Case((8, 3, 4, 4))).values()) <= 1
        True
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
        # A subnormal result is rounded to a multiple of the smallest subnormal number.
        tolerance = TOLERANCE[result.dtype] * limits.eps * magnitude + limits.smallest_normal * limits.eps
        share = ((result.double() - value).abs() / tolerance).max().item()
        shares[name] = share if math.isfinite(share) else math.inf
    return shares


SHAPES = ((64, 32), (16, 24, 50), (8, 64, 28, 28), (4, 512, 7, 7), (2, 3, 33, 35), (2, 16, 4, 9, 10))
"""The shapes that `verify` checks: (N, C), (N, C, L), wide and narrow planes, odd sizes, 3D."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The outcome of `verify` for one device, dtype, layout and mode."""

    device: str
    dtype: torch.dtype
    layout: str
    training: bool
    shares: dict[str, float]
    """For each of `QUANTITIES`, the largest error over all shapes as a fraction of its tolerance."""

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance."""
        return all(share <= 1 for share in self.shares.values())


def devices() -> list[str]:
    """Return the devices of this machine that bn_ext has kernels for: "cpu", and "cuda" if torch sees a GPU.

    Examples:
        >>> "cpu" in devices()
        True
    """
    return ["cpu", "cuda"] if build_info().cuda and torch.cuda.is_available() else ["cpu"]


def verify(
    operator: Callable[..., Tensor] = batch_norm,
    on: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> Iterator[Row]:
    """Check an operator over dtypes, layouts and modes.

    Args:
        operator: As for `check`.
        on: Devices to check; None means `devices()`.
        shapes: Shapes of input.

    Yields:
        One `Row` for each device, dtype, layout and mode, as soon as it is complete.

    Examples:
        >>> all(row.passed for row in verify(on=["cpu"], shapes=[(8, 3, 4, 4)]))
        True
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
