"""The operator as a function: `batch_norm`."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from bn_ext import _extension, _fake, _onnx, _recompute
from bn_ext.activations import Activation, resolve


def _not_loaded(*_: object) -> Tensor:
    """Replaces the operator if the extension could not be loaded."""
    raise RuntimeError(_extension.reason)


# These bypass the dispatcher's overload resolution, which dominates the cost of a small call.
_direct: Callable[..., Tensor] = _not_loaded
_direct_and_saved: Callable[..., tuple[Tensor, Tensor | None]]

if _extension.module is not None:
    _fake.register()
    _onnx.register()
    _direct = _extension.module.batch_norm
    _direct_and_saved = _extension.module.batch_norm_and_saved

# The operator's arguments in order: the type of each, and whether it may be None.
_KINDS: dict[str, tuple[type, bool]] = {
    "input": (Tensor, False),
    "running_mean": (Tensor, True),
    "running_var": (Tensor, True),
    "weight": (Tensor, True),
    "bias": (Tensor, True),
    "training": (bool, False),
    "momentum": (float, True),
    "eps": (float, False),
    "num_batches_tracked": (Tensor, True),
    "residual": (Tensor, True),
    "activation": (str, True),
    "activation_parameter": (float, False),
    "skip_nonfinite": (bool, False),
    "skip_recomputed": (bool, False),
}
_NAMED = list(_KINDS)[8:]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    activation: Activation = None,
    residual: Tensor | None = None,
    skip_nonfinite: bool = False,
    skip_recomputed: bool = False,
) -> Tensor:
    """Normalise each channel of a batch; a drop-in for `torch.nn.functional.batch_norm`.

    Equivalent to:

        mean, var = input.mean(dims), input.var(dims, correction=0)  # in training; otherwise the running statistics
        output = activation((input - mean) / sqrt(var + eps) * weight + bias + residual)

    `dims` are all dimensions except the second. A call in training also updates, in place, with M values per channel:

        num_batches_tracked += 1
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * var * M / (M - 1)

    The (C,) tensors share one dtype: that of input, or float32 if input is float16 or bfloat16. With float32 running
    statistics, weight and bias may also have input's dtype, as in FSDP's mixed precision; arithmetic is then float32.

    Args:
        input: (N, C, ...), at least two dimensions; float32, float64, float16 or bfloat16; any strides.
        running_mean: (C,), or None. Training updates it, evaluation reads it.
        running_var: (C,), the unbiased variance; None if running_mean is None.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        training: Whether to normalise with the batch's statistics and update the running statistics. If False, the
            running statistics are used.
        momentum: Weight of this batch in the running statistics. None averages all batches (1 / num_batches_tracked)
            and requires `num_batches_tracked`.
        eps: Added to the variance; must be positive in training.
        num_batches_tracked: One value, usually int64, or None. Training increments it by 1.
        activation: Applied to the result: None, one of "relu", "leaky_relu", "relu6", "elu", "silu", "gelu",
            "gelu_tanh", "hardswish", "sigmoid", "tanh", "mish", a pair of a name and its parameter such as
            ("leaky_relu", 0.2), or a torch.nn module for one of these such as torch.nn.LeakyReLU(0.2).
        residual: Added before the activation: shape, dtype and device of input, any strides; or None.
        skip_nonfinite: Whether a channel keeps its running statistics if this batch would make one of them inf or NaN
            (in torch.nn they stay so permanently). The output does not change, and the batch is counted.
        skip_recomputed: Whether a forward pass inside a backward pass, as torch.utils.checkpoint runs it, updates and
            counts nothing, so that each batch counts once.

    Returns:
        A new tensor like input, in its memory format (contiguous, channels_last or channels_last_3d); contiguous if
            input is not dense.

    Raises:
        ValueError: If training has one value per channel, eps is out of range, only one running statistic is given,
            or the activation is unknown.
        RuntimeError: If a tensor has the wrong number of elements, dtypes do not match, devices differ, or residual
            differs from input in shape, dtype or device.
        NotImplementedError: If input has an integer or complex dtype.
        TypeError: If an argument has the wrong type.

    A failed call does not change the running statistics or num_batches_tracked.

    Numerics: sums are computed in float32 around a shift (in float64 for float64 input), and merged in float64 in a
    fixed order. Results are bit-equal from run to run and, on the CPU, for any number of threads. The activation
    receives the float32 value even if the output is float16 or bfloat16. The result is differentiable to any order in
    input, weight, bias and residual; at an activation's kinks, the subgradient is torch's.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), with torch's conventions.

    Examples:
        >>> x, mean, var = torch.randn(8, 3, 4, 4), torch.zeros(3), torch.ones(3)
        >>> y = bn_ext.batch_norm(x, mean, var, training=True, activation="relu")
        >>> torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True).relu(), atol=1e-5)
        True
    """
    name, parameter = (None, 0.0) if activation is None else resolve(activation)
    positional = (input, running_mean, running_var, weight, bias, training, momentum, eps)
    named: tuple[Any, ...] = (num_batches_tracked, residual, name, parameter, skip_nonfinite, skip_recomputed)
    if is_compiling() or has_torch_function_variadic(*positional[:5], residual):
        through_dispatcher: Callable[..., Tensor] = torch.ops.bn_ext.batch_norm
        return through_dispatcher(*positional, **dict(zip(_NAMED, named, strict=True)))
    if torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export():  # dynamo=False
        return _onnx.in_torchs_operators(*positional, **dict(zip(_NAMED, named, strict=True)))
    try:
        return _run(positional, named)
    except TypeError as error:
        raise (_type_error((*positional, *named)) or error) from None


# torch.jit.script calls the operator directly, just as torch.nn.functional.batch_norm becomes torch's operator.
torch.jit._builtins._register_builtin(batch_norm, "bn_ext::batch_norm")


def _run(positional: tuple[Any, ...], named: tuple[Any, ...]) -> Tensor:
    """Call the extension, and register the output with recompute() if it is active."""
    outputs = _recompute.current()
    if outputs is None:
        return _direct(*positional, *named)
    y, saved = _direct_and_saved(*positional, *named)
    if saved is not None and y.requires_grad:
        residual, *activation = named[1:4]
        outputs.add(y, positional[0], residual, saved, tuple(activation))
    return y


def _type_error(arguments: tuple[object, ...]) -> TypeError | None:
    """An error for the first argument of a wrong type, worded like torch's; None if all types are right."""
    for (name, (kind, optional)), value in zip(_KINDS.items(), arguments, strict=True):
        accepted = _is_number(value) if kind is float else isinstance(value, kind)
        if not (accepted or (value is None and optional)):
            return TypeError(f"batch_norm(): argument '{name}' must be {kind.__name__}, not {type(value).__name__}")
    return None


def _is_number(value: object) -> bool:
    """Whether torch accepts the value as a float."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad
    return isinstance(value, Real)
