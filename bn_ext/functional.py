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
    """Stand in for the extension that could not be loaded."""
    raise RuntimeError(_extension.reason)


# Without the dispatcher's search for an overload: most of what a small call costs.
_direct: Callable[..., Tensor] = _not_loaded
_direct_and_saved: Callable[..., tuple[Tensor, Tensor | None]]

if _extension.module is not None:
    _fake.register()
    _onnx.register()
    _direct = _extension.module.batch_norm
    _direct_and_saved = _extension.module.batch_norm_and_saved

# The operator's arguments in its order: what each must be, and whether it may be None.
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
    """Normalise each channel of a batch; a drop-in for :func:`torch.nn.functional.batch_norm`.

    Equivalent to::

        mean, var = input.mean(dims), input.var(dims, correction=0)  # training; else the running statistics
        output = activation((input - mean) / sqrt(var + eps) * weight + bias + residual)

    where `dims` are all dimensions but the second, and in training, in place::

        num_batches_tracked += 1
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * var * M / (M - 1)

    Args:
        input: (N, C, ...), at least two dimensions; float32, float64, float16 or bfloat16; any strides.
        running_mean: (C,), or None. Updated in training, read in evaluation.
        running_var: (C,), or None where running_mean is None. The unbiased variance.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        training: Normalise with the statistics of the batch and update the running ones; otherwise with the
            running ones.
        momentum: Weight of this batch in the running statistics. None: their mean over all batches
            (1 / num_batches_tracked), which needs `num_batches_tracked`.
        eps: Added to the variance; positive in training.
        num_batches_tracked: One value, int64 as a rule, or None. Raised by one in training.
        activation: Applied to the result: None, one of "relu", "leaky_relu", "relu6", "elu", "silu", "gelu",
            "gelu_tanh", "hardswish", "sigmoid", "tanh", "mish", a pair of a name and its parameter, as
            ("leaky_relu", 0.2), or a module of one of these kinds, as torch.nn.LeakyReLU(0.2).
        residual: Added before the activation: shape, dtype and device of input, any strides; or None.
        skip_nonfinite: A channel keeps its running statistics where this batch would make one of them inf or NaN
            (torch.nn's stay so for good). The output is what it is, and the batch is counted.
        skip_recomputed: Within a backward pass, as where torch.utils.checkpoint runs a forward pass again, nothing is
            updated or counted: each batch counts once.

    The (C,) vectors share one dtype: that of input, or float32 beside a float16 or bfloat16 input; weight and bias may
    have input's beside float32 statistics, as under FSDP's mixed precision, and are computed with in float32.

    Returns:
        A new tensor like input, in its memory format (contiguous, channels_last or channels_last_3d); contiguous
        where input is not dense.

    Raises:
        ValueError: One value per channel in training; eps out of range; only one running statistic given; an unknown
            activation.
        RuntimeError: Wrong number of elements, dtypes that do not go together, devices mixed; a residual of another
            shape, dtype or device than input.
        NotImplementedError: `input` has an integer or complex dtype.
        TypeError: An argument that is no tensor or number.
        A failed call leaves running statistics and num_batches_tracked as they were.

    Numerics: sums are taken in float32 around a shift (in float64 for float64 input), merged in float64 and in a
    fixed order: results are bit-equal from run to run and for any number of threads. The activation sees the float32
    value also where output is float16 or bfloat16. Differentiable to any order in input, weight, bias and residual; at
    an activation's kinks with torch's subgradient.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), with torch's conventions.
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


# torch.jit.script calls the operator, as it calls torch's for torch.nn.functional.batch_norm.
torch.jit._builtins._register_builtin(batch_norm, "bn_ext::batch_norm")


def _run(positional: tuple[Any, ...], named: tuple[Any, ...]) -> Tensor:
    """Call the extension, and let recompute() know of the output."""
    outputs = _recompute.current()
    if outputs is None:
        return _direct(*positional, *named)
    y, saved = _direct_and_saved(*positional, *named)
    if saved is not None and y.requires_grad:
        residual, *activation = named[1:4]
        outputs.add(y, positional[0], residual, saved, tuple(activation))
    return y


def _type_error(arguments: tuple[object, ...]) -> TypeError | None:
    """The sentence for an argument of a wrong type, in torch's words; None if there is none."""
    for (name, (kind, optional)), value in zip(_KINDS.items(), arguments, strict=True):
        accepted = _is_number(value) if kind is float else isinstance(value, kind)
        if not (accepted or (value is None and optional)):
            return TypeError(f"batch_norm(): argument '{name}' must be {kind.__name__}, not {type(value).__name__}")
    return None


def _is_number(value: object) -> bool:
    """Whether torch takes it for a float."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad
    return isinstance(value, Real)
