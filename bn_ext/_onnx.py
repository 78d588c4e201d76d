"""The operator in torch's own, for what knows no others: torch.onnx. Everything else runs the kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_ext.activations import PARAMETERS, apply

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def in_torchs_operators(
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
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_parameter: float = 0.0,
    skip_nonfinite: bool = False,
    skip_recomputed: bool = False,
) -> Tensor:
    """bn_ext::batch_norm as torch.nn's modules do it: batch norm, addition and activation behind each other.

    Statistics are torch.nn's: nothing is skipped.
    """
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    factor = 0.0 if momentum is None else momentum
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    return _activated(y if residual is None else y + residual, activation, activation_parameter)


def _activated(u: Tensor, activation: str | None, parameter: float) -> Tensor:
    """The operators take a parameter beside any activation."""
    return apply(u, (activation, parameter) if activation in PARAMETERS else activation)


def register() -> None:
    """Tell torch about it; once, after the extension has been loaded.

    torch's table of decompositions would have served too, but with an entry there inductor refuses to call the kernels
    where the environment has CI set.
    """
    operator = torch.ops.bn_ext.batch_norm.default

    @operator.py_impl(_COMPOSITE)
    def batch_norm(*args: Any, **kwargs: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            return in_torchs_operators(*args, **kwargs)
        return operator._op_dk(_COMPOSITE, *args, **kwargs)
