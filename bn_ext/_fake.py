"""Fake implementations of the inner operators, for torch.compile, torch.export and the meta device."""

import torch
from torch import Tensor

from bn_ext import _sharding


def _check_devices(input: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors on several devices: torch calls a fake implementation if a single tensor is on meta.

    As in torch.nn, the count may be on the CPU if the other tensors are on a GPU.
    """
    for name, tensor in others.items():
        if tensor is None or tensor.device == input.device:
            continue
        if name == "num_batches_tracked" and "meta" not in (tensor.device.type, input.device.type):
            continue
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but input is on {input.device} and {name} is on "
            f"{tensor.device}"
        )


def _saved(input: Tensor) -> Tensor:
    """The saved statistics: mean, rstd, scale and offset, in the dtype of statistics."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty((4, input.shape[1]), dtype=dtype)


def _mask(input: Tensor, wanted: bool) -> Tensor:
    """One bit per value, followed by a few bytes; see mask_bytes in csrc/params.h."""
    return input.new_empty((input.numel() // 8 + 4 if wanted else 0,), dtype=torch.uint8)


def _memory_format(input: Tensor) -> torch.memory_format:
    """The same choice as memory_format_of in csrc/arguments.h."""
    prims = torch._prims_common
    if prims.is_contiguous_or_false(input):
        return torch.contiguous_format
    if prims.is_channels_last_contiguous_or_false_3d(input):
        return torch.channels_last_3d
    if prims.is_channels_last_contiguous_or_false_2d(input):
        return torch.channels_last
    return prims.suggest_memory_format(input)


def _like(input: Tensor, mask_format: torch.memory_format | None = None) -> Tensor:
    """A tensor like input, in the memory format that the kernels write."""
    _sharding.register()  # DTensor infers the result's shape here before it looks up the sharding
    memory_format = mask_format or _memory_format(input)
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
    _check_devices(
        input,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
        residual=residual,
    )
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
    _check_devices(
        input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var, residual=residual
    )
    return _like(input, mask_format), _saved(input), _mask(input, mask_format is not None)


def _repeat(
    input: Tensor,
    saved: Tensor,
    residual: Tensor | None,
    activation: str | None = None,
    activation_parameter: float = 0.0,
) -> Tensor:
    _check_devices(input, saved=saved, residual=residual)
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
    _check_devices(input, grad_output=dy, weight=weight, saved=saved, residual=residual, mask=mask)
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
    """Register the fake implementations with torch; call once, after the extension is loaded."""
    torch.library.register_fake("bn_ext::batch_norm_forward", _forward)
    torch.library.register_fake("bn_ext::batch_norm_inference", _inference)
    torch.library.register_fake("bn_ext::batch_norm_repeat", _repeat)
    torch.library.register_fake("bn_ext::batch_norm_backward", _backward)
