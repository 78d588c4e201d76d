"""What the inner operators return, without doing the work: for torch.compile, torch.export and the meta device."""

import torch
from torch import Tensor

from bn_ext import _sharding


def _saved(input: Tensor) -> Tensor:
    """Mean, rstd, scale and offset, of the dtype that statistics have."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty((4, input.shape[1]), dtype=dtype)


def _mask(input: Tensor, wanted: bool) -> Tensor:
    """One bit per value, and a few bytes behind them: mask_bytes of csrc/params.h."""
    return input.new_empty((input.numel() // 8 + 4 if wanted else 0,), dtype=torch.uint8)


def _like(input: Tensor, mask_format: torch.memory_format | None = None) -> Tensor:
    """A tensor like input, in the memory format that the kernels write."""
    _sharding.register()  # a DTensor asks here for its result's shape, before it asks how to share the work
    memory_format = mask_format or torch._prims_common.suggest_memory_format(input)
    return torch.empty_like(input, memory_format=memory_format)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None = None,
    activation_parameter: float = 0.0,
    mask_format: torch.memory_format | None = None,
    skip_nonfinite: bool = False,
    skip_recomputed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(input, mask_format), _saved(input), _mask(input, mask_format is not None)


def _inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str | None = None,
    activation_parameter: float = 0.0,
    mask_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(input, mask_format), _saved(input), _mask(input, mask_format is not None)


def _repeat(
    input: Tensor,
    saved: Tensor,
    residual: Tensor | None,
    activation: str | None = None,
    activation_parameter: float = 0.0,
) -> Tensor:
    return _like(input)


def _backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    mask_format: torch.memory_format | None,
    training: bool,
    activation: str | None,
    activation_parameter: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameter = saved if weight is None else weight
    channels = input.shape[1]
    memory_format = None if mask is None else mask_format
    return (
        _like(input, memory_format) if output_mask[0] else input.new_empty((0,)),
        parameter.new_empty((channels if output_mask[1] else 0,)),
        parameter.new_empty((channels if output_mask[2] else 0,)),
        _like(input, memory_format) if output_mask[3] else input.new_empty((0,)),
    )


def register() -> None:
    """Tell torch about them; once, after the extension has been loaded."""
    torch.library.register_fake("bn_ext::batch_norm_forward", _forward)
    torch.library.register_fake("bn_ext::batch_norm_inference", _inference)
    torch.library.register_fake("bn_ext::batch_norm_repeat", _repeat)
    torch.library.register_fake("bn_ext::batch_norm_backward", _backward)
