"""The tensors of one case: drawn once, rounded to its dtype, given to every provider alike."""

from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Key
from .operations import OPERATIONS, PLAIN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROWS_LAYOUT = "(N, C)"
MEMORY_FORMATS = LAYOUTS | {ROWS_LAYOUT: torch.contiguous_format}
SEED = 2015
MOST_COPIES = 512


class Case(NamedTuple):
    """What the inputs depend on."""

    name: str
    size: tuple[int, ...]  # (N, C, H, W) or (N, C)
    dtype: str  # a key of DTYPES
    layout: str  # a key of MEMORY_FORMATS
    operation: str = PLAIN  # a key of OPERATIONS
    clock: str = "kernels"  # what is timed: kernels, as far as the device allows, or whole "calls", by the wall's clock

    @property
    def label(self) -> str:
        """Name the case in a line; plain batch norm goes without saying."""
        return " ".join([*[self.operation] * (self.operation != PLAIN), self.name, self.dtype, self.layout])

    def key(self, direction: str) -> Key:
        """Tell it from all other cases, in one direction."""
        return Key(self.operation, self.name, self.size, self.dtype, self.layout, direction, self.clock)

    @property
    def bytes(self) -> int:
        """Give the bytes of one activation tensor."""
        return prod(self.size) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Inputs:
    """Activations in the case's dtype and layout; the rest in float32, as in mixed precision."""

    x: list[Tensor]  # copies of one (N, C, H, W) tensor, each requiring a gradient
    z: list[Tensor]  # the residual: as x, or nothing where the operation has none
    dy: list[Tensor]  # copies of one (N, C, H, W) tensor
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    running_mean: Tensor  # (C,)
    running_var: Tensor  # (C,), positive

    def arguments(self) -> list[tuple[Tensor, ...]]:
        """Give what the operation is called with, (x,) or (x, z), for each copy."""
        return list(zip(self.x, self.z, strict=True)) if self.z else [(x,) for x in self.x]


def copies_needed(case: Case, device: torch.device) -> int:
    """Say how many copies of the activations a round goes through in turn.

    On a GPU as many as fill the L2 cache four times, so that a call finds it cold, but no more than can be told of in a
    graph without taking long; inputs so small stay in the cache, for all sides alike. On a CPU one: a
    tensor is as warm as the round before has left it, for both sides alike. Where only the cost of
    the call counts, one everywhere.
    """
    if device.type != "cuda" or case.clock == "calls":
        return 1
    return min(MOST_COPIES, ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / case.bytes))


def make_inputs(case: Case, device: torch.device, copies: int | None = None) -> Inputs:
    """Draw random inputs, the same ones on every call; in `copies` copies or as many as timing needs."""
    random = torch.Generator(device).manual_seed(SEED)
    channels = case.size[1]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    def activation(values: Tensor) -> Tensor:
        return values.to(DTYPES[case.dtype]).contiguous(memory_format=MEMORY_FORMATS[case.layout])

    count = copies or copies_needed(case, device)
    # Means and deviations that are neither 0 nor 1 and differ from channel to channel.
    of_channels = (1, channels, *[1] * (len(case.size) - 2))
    deviation = draw(*of_channels).abs_().add_(0.5)
    x = activation(draw(*case.size).mul_(deviation).add_(draw(*of_channels)))
    dy = activation(draw(*case.size))
    parameters = {
        "weight": draw(channels).add_(2.0),
        "bias": draw(channels),
        "running_mean": draw(channels),
        "running_var": draw(channels).abs_().add_(0.5),
    }
    z = activation(draw(*case.size)) if OPERATIONS[case.operation].residual else None
    return Inputs(
        x=[x.clone().requires_grad_() for _ in range(count)],
        z=[] if z is None else [z.clone().requires_grad_() for _ in range(count)],
        dy=[dy.clone() for _ in range(count)],
        **parameters,
    )
