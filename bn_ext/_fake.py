"""What the inner operators return, without doing the work: for torch.compile, torch.export and the meta device."""

import torch
from torch import Tensor


def _statistics(input: Tensor) -> Tensor:
    """A (C,) vector of the dtype that statistics have."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty((input.shape[1],), dtype=dtype)


def _activation(input: Tensor) -> Tensor:
    """A tensor like input, in the memory format that the kernels write."""
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _activation(input), _statistics(input), _statistics(input)


def _inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _activation(input), _statistics(input), _statistics(input)


def _backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = mean if weight is None else weight
    channels = input.shape[1]
    return (
        _activation(input) if output_mask[0] else input.new_empty((0,)),
        parameter.new_empty((channels if output_mask[1] else 0,)),
        parameter.new_empty((channels if output_mask[2] else 0,)),
    )


def register() -> None:
    """Tell torch about them; once, after the extension has been loaded."""
    torch.library.register_fake("bn_ext::batch_norm_forward", _forward)
    torch.library.register_fake("bn_ext::batch_norm_inference", _inference)
    torch.library.register_fake("bn_ext::batch_norm_backward", _backward)
