"""The operators in torch's own, for what knows no others: torch.onnx. Everything else runs the kernels."""

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from bn_ext import _fake
from bn_ext.activations import PARAMETERS, apply

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def composed(
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


def inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str | None = None,
    activation_parameter: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """bn_ext::batch_norm_inference, which a program holds after run_decompositions()."""
    u = F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if residual is not None:
        u = u + residual
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean, rstd = running_mean.to(wide), (running_var.to(wide) + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.to(wide)
    offset = torch.zeros_like(mean) if bias is None else bias.to(wide)
    saved = torch.stack([mean, rstd, scale, offset])
    mask = _mask(u, input, activation) if save_mask else input.new_empty((0,), dtype=torch.uint8)
    return _activated(u, activation, activation_parameter), saved, mask


def _activated(u: Tensor, activation: str | None, parameter: float) -> Tensor:
    """The operators take a parameter beside any activation."""
    return apply(u, (activation, parameter) if activation in PARAMETERS else activation)


def _mask(u: Tensor, input: Tensor, activation: str | None) -> Tensor:
    """One bit per value that relu, leaky_relu or relu6 lets pass, in the order of memory; see csrc/params.h."""
    blocked = u.le(0) | u.ge(6) if activation == "relu6" else u.le(0)
    if suggest_memory_format(input) != torch.contiguous_format:
        blocked = blocked.movedim(1, -1)
    count = input.numel()
    bits = F.pad(blocked.logical_not().flatten().long(), (0, 8 * (count // 8 + 4) - count)).view(-1, 8)
    return (bits << torch.arange(8, device=input.device)).sum(1).to(torch.uint8)


def register() -> None:
    """Tell torch about them; once, after the extension has been loaded."""
    outer, inner = torch.ops.bn_ext.batch_norm.default, torch.ops.bn_ext.batch_norm_inference.default

    @outer.py_impl(_COMPOSITE)
    def batch_norm(*args: Any, **kwargs: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            return composed(*args, **kwargs)
        return outer._op_dk(_COMPOSITE, *args, **kwargs)

    torch._decomp.register_decomposition(inner)(inference)
    # With an entry in this table too, fake tensors go on asking the function in _fake.py, which knows the strides.
    torch._decomp.register_decomposition(inner, type="meta")(_fake._inference)
