"""bn_ext::batch_norm composed of torch's operators for torch.onnx, which cannot export others."""

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
    """bn_ext::batch_norm in torch's operators: batch norm, then addition, then activation.

    The running statistics are updated as in torch.nn: `skip_nonfinite` and `skip_recomputed` have no effect.
    """
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    factor = 0.0 if momentum is None else momentum
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    return _activated(y if residual is None else y + residual, activation, activation_parameter)


def _activated(u: Tensor, activation: str | None, parameter: float) -> Tensor:
    """Apply the activation; the operator passes a parameter even if the activation takes none."""
    return apply(u, (activation, parameter) if activation in PARAMETERS else activation)


def register() -> None:
    """Register the decomposition with torch; call it once, after the extension has been loaded.

    An entry in torch's table of decompositions would also work for ONNX, but if the environment variable CI is set,
    inductor then refuses to call the kernels.
    """
    operator = torch.ops.bn_ext.batch_norm.default

    @operator.py_impl(_COMPOSITE)
    def batch_norm(*args: Any, **kwargs: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            return in_torchs_operators(*args, **kwargs)
        return operator._op_dk(_COMPOSITE, *args, **kwargs)
