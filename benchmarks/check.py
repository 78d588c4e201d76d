"""Refuse a wrong result: compare each provider with float64 arithmetic before it is timed."""

from math import isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import DTYPES, Case, Inputs
from .names import COMPILED
from .operations import OPERATIONS
from .providers import Subject

EPS = 1e-5
MOMENTUM = 0.1

# (dtype, kind of result): |result - reference| <= absolute + relative * |reference|. About three
# times what torch.nn's channels_last on a CPU needs at N = 32, which adds up in float32 one pixel
# after the other; its contiguous float32 results are ten times nearer and more. With a residual `relative` refers to
# |batch norm| + |sum| (plus_residual): torch's separate modules round both, a fused kernel only the sum.
TOLERANCES = {
    # Stored in float32 after sums over M values (up to 4e5 at N = 32).
    ("float32", "activation"): {"relative": 2e-4, "absolute": 2e-4},
    # Stored in bfloat16, which rounds by up to 2^-8 of the value; twice that, and the float32 part.
    ("bfloat16", "activation"): {"relative": 2**-7, "absolute": 2e-4},
    # Stored in float16, which rounds by up to 2^-11; as bfloat16.
    ("float16", "activation"): {"relative": 2**-10, "absolute": 2e-4},
    # Means over M values, held in float32 for any dtype.
    **{(dtype, "statistic"): {"relative": 1e-4, "absolute": 1e-4} for dtype in DTYPES},
    # Sums of M values of either sign, which grow as sqrt(M), errors too: `absolute` is per sqrt(M).
    **{(dtype, "sum"): {"relative": 1e-5, "absolute": 2e-4} for dtype in DTYPES},
}
# torch.compile keeps intermediate values of 16-bit activations in 16 bits: its dx was seen 28 times the tolerances
# above away from float64, its dweight 80 times (torch 2.13, CPU). Not fine, but what there is to compare with.
COMPILED_ABSOLUTE = {"bfloat16": 2e-2, "float16": 2.5e-3}
KINDS = {
    "y": "activation",
    "dx": "activation",
    "dz": "activation",
    "y in eval": "activation",
    "running_mean": "statistic",
    "running_var": "statistic",
    "dweight": "sum",
    "dbias": "sum",
}


def tolerance_of(provider: str, dtype: str, kind: str) -> dict[str, float]:
    """Say how far from float64 a provider's result may be."""
    tolerance = TOLERANCES[dtype, kind]
    if provider == COMPILED and kind != "statistic":
        return tolerance | {"absolute": COMPILED_ABSOLUTE.get(dtype, tolerance["absolute"])}
    return tolerance


class WrongResultError(Exception):
    """A provider's result is not what float64 arithmetic gives; it must not be timed."""


class Expected(NamedTuple):
    """A result in float64, and what its relative tolerance is relative to."""

    value: Tensor
    size: Tensor  # at least |value|

    def allowed(self, tolerance: dict[str, float], scale: float = 1.0) -> Tensor:
        """Say how far from `value` a result may be; `scale` multiplies the absolute part."""
        return self.size * tolerance["relative"] + tolerance["absolute"] * scale


def alone(value: Tensor) -> Expected:
    """Take a tolerance relative to the value itself."""
    return Expected(value, value.abs())


def plus_residual(normalised: Tensor, z: Tensor | None) -> Expected:
    """Add the residual; separate modules have rounded `normalised` before, by a share of its own size."""
    if z is None:
        return alone(normalised)
    total = normalised + z
    return Expected(total, normalised.abs().add_(total.abs()))


def reference(case: Case, inputs: Inputs) -> dict[str, Expected]:
    """Compute all results in float64 from the same rounded inputs, by the textbook formulas.

    ReLU's gradient jumps where its argument is 0. Nearer to 0 than the tolerance of y a result may fall on either side,
    so there dy is set to 0 in `inputs`, and neither side is wrong.
    """
    relu = OPERATIONS[case.operation].activation == "relu"
    x = inputs.x[0].detach().double().contiguous()
    z = inputs.z[0].detach().double().contiguous() if inputs.z else None
    count = x.numel() // x.size(1)

    def column(vector: Tensor) -> Tensor:
        return vector.double().view(1, -1, *[1] * (x.dim() - 2))

    def per_channel(values: Tensor) -> Tensor:
        return values.sum(dim=[d for d in range(x.dim()) if d != 1])

    def activated(before: Expected) -> Expected:
        return Expected(before.value.clamp(min=0), before.size) if relu else before

    weight, bias = column(inputs.weight), column(inputs.bias)
    eval_rstd = (column(inputs.running_var) + EPS).rsqrt()
    y_eval = plus_residual((x - column(inputs.running_mean)) * (eval_rstd * weight) + bias, z)
    mean = per_channel(x) / count
    centred = x.sub_(column(mean))
    var = per_channel(centred.square()) / count
    rstd = column((var + EPS).rsqrt())
    xhat = centred.mul_(rstd)
    y = plus_residual(xhat * weight + bias, z)
    if relu:
        undecided = y.value.abs() <= y.allowed(TOLERANCES[case.dtype, "activation"])
        for each in inputs.dy:
            each.masked_fill_(undecided, 0)
    dy = inputs.dy[0].double().contiguous()
    if relu:
        dy.masked_fill_(y.value <= 0, 0)  # from here on: the gradient of what ReLU was given, which is dz too
    dbias, dweight = per_channel(dy), per_channel(dy * xhat)
    values = {
        "dx": (dy - column(dbias / count) - xhat * column(dweight / count)) * (weight * rstd),
        "running_mean": torch.lerp(inputs.running_mean.double(), mean, MOMENTUM),
        "running_var": torch.lerp(inputs.running_var.double(), var * count / (count - 1), MOMENTUM),
        "dweight": dweight,
        "dbias": dbias,
        "dz": dy,
    }
    expected = {name: alone(value) for name, value in values.items()}
    return expected | {"y": activated(y), "y in eval": activated(y_eval)}


def results(subject: Subject, residual: bool) -> list[tuple[str, Tensor]]:
    """Make the provider's own calls, each for the first time, and name what they give."""
    first: dict[str, Any] = {direction: calls[0]() for direction, calls in subject.calls.items()}
    gradients = ("dx", "dweight", "dbias") + ("dz",) * residual
    return [
        ("y", first["forward"].detach()),
        ("running_mean", subject.trained_norm.running_mean),
        ("running_var", subject.trained_norm.running_var),
        ("y in eval", first["eval"]),
        *zip(gradients, first["backward"], strict=True),
        *zip(gradients, first["forward+backward"], strict=True),
    ]


def check(provider: str, case: Case, inputs: Inputs, subject: Subject, expected: dict[str, Expected]) -> None:
    """Raise WrongResultError unless every result has the right shape, dtype, layout and values."""
    where = f"{provider} is wrong on {case.label}, N = {case.size[0]}"
    end = "; it is not timed"
    root_m = (inputs.x[0].numel() / inputs.x[0].size(1)) ** 0.5
    for name, got in results(subject, OPERATIONS[case.operation].residual):
        kind = KINDS[name]
        alike = inputs.x[0] if kind == "activation" else inputs.weight
        if got.dtype != alike.dtype or got.shape != alike.shape or got.stride() != alike.stride():
            raise WrongResultError(f"{where}: {name} must be {describe(alike)}, got {describe(got)}{end}")
        allowed = expected[name].allowed(tolerance_of(provider, case.dtype, kind), root_m if kind == "sum" else 1.0)
        worst = ((got.double() - expected[name].value).abs() / allowed).max().item()
        if not worst <= 1.0:  # so written that NaN is wrong
            off = "NaN" if isnan(worst) else f"{worst:.3g} times its tolerance away from float64"
            raise WrongResultError(f"{where}: {name} is {off}{end}")


def describe(tensor: Tensor) -> str:
    """Name shape, dtype and strides of a tensor, for a message."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{tuple(tensor.shape)} {dtype} with strides {tensor.stride()}"
