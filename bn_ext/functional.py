"""The operator as a function: `batch_norm`."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from bn_ext import _decompositions, _extension, _fake, _recompute
from bn_ext.activations import Activation, resolve


def _not_loaded(*_: object) -> Tensor:
    """Stand in for the extension that could not be loaded."""
    raise RuntimeError(_extension.reason)


# Without the dispatcher's search for an overload: most of what a small call costs.
_direct: Callable[..., Tensor] = _not_loaded
_direct_and_saved: Callable[..., tuple[Tensor, Tensor | None]]

if _extension.module is not None:
    _fake.register()
    _decompositions.register()
    _direct = _extension.module.batch_norm
    _direct_and_saved = _extension.module.batch_norm_and_saved

_TENSORS = ("input", "running_mean", "running_var", "weight", "bias", "num_batches_tracked", "residual")


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

    The (C,) vectors share one dtype: that of input, or float32 beside a float16 or bfloat16 input.

    Returns:
        A new tensor like input, in its memory format (contiguous, channels_last or channels_last_3d); contiguous
        where input is not dense.

    Raises:
        ValueError: One value per channel in training; eps out of range; only one running statistic given; an unknown
            activation.
        RuntimeError: Wrong number of elements, dtypes that do not go together, devices mixed; a residual of another
            shape, dtype or device than input.
        NotImplementedError: Integer or complex input.
        TypeError: An argument that is no tensor or number.
        A failed call leaves running statistics and num_batches_tracked as they were.

    Numerics: sums are taken in float32 around a shift (in float64 for float64 input), merged in float64 and in a
    fixed order: results are bit-equal from run to run and for any number of threads. The activation sees the float32
    value also where output is float16 or bfloat16. Differentiable to any order in input, weight, bias and residual; at
    an activation's kinks with torch's subgradient.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), with torch's conventions.
    """
    name, parameter = (None, 0.0) if activation is None else resolve(activation)
    arguments = (input, running_mean, running_var, weight, bias)
    if is_compiling() or has_torch_function_variadic(*arguments, residual):
        through_dispatcher: Callable[..., Tensor] = torch.ops.bn_ext.batch_norm
        return through_dispatcher(
            *(*arguments, training, momentum, eps),
            num_batches_tracked=num_batches_tracked,
            residual=residual,
            activation=name,
            activation_parameter=parameter,
        )
    outputs = _recompute.current()
    try:
        if outputs is None:
            return _direct(*arguments, training, momentum, eps, num_batches_tracked, residual, name, parameter)
        y, saved = _direct_and_saved(
            *(*arguments, training, momentum, eps, num_batches_tracked, residual, name, parameter)
        )
        if saved is not None and y.requires_grad:
            outputs.add(y, input, residual, saved, (name, parameter))
        return y
    except TypeError as error:
        tensors = dict(zip(_TENSORS, (*arguments, num_batches_tracked, residual), strict=True))
        raise (_type_error(tensors, training, momentum, eps) or error) from None


def _type_error(tensors: Mapping[str, object], training: object, momentum: object, eps: object) -> TypeError | None:
    """The sentence for an argument of a wrong type, in torch's words; None if there is none."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and (value is not None or name == "input"):
            return TypeError(f"batch_norm(): argument '{name}' must be Tensor, not {type(value).__name__}")
    if not isinstance(training, bool):
        return TypeError(f"batch_norm(): argument 'training' must be bool, not {type(training).__name__}")
    for name, value in {"momentum": momentum, "eps": eps}.items():
        if not isinstance(value, int | float) and (value is not None or name == "eps"):
            return TypeError(f"batch_norm(): argument '{name}' must be float, not {type(value).__name__}")
    return None
