"""What a batch norm does on a CUDA device, before it runs: `explain`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bn_ext import _extension, _plan_text
from bn_ext.activations import Activation, describe, resolve
from bn_ext.functional import batch_norm


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a plan depends on besides the tensor."""

    name: str
    multiprocessors: int
    """The GPU's number of them."""
    shared_bytes: int
    """Shared memory of a multiprocessor, in bytes, for all blocks that it runs at a time."""
    clusters: bool
    """Whether blocks can be launched in clusters (compute capability 9.0 and newer)."""


GPUS: dict[str, Gpu] = {
    "H200": Gpu("H200", 132, 228 * 1024, True),
    "H100": Gpu("H100", 132, 228 * 1024, True),
    "A100": Gpu("A100", 108, 164 * 1024, False),
}
"""GPUs that `explain` knows by name, H100 and A100 as SXM modules.

Source: NVIDIA's H200 data sheet, H100 and A100 Tensor Core GPU architecture papers, CUDA C++ programming guide (shared
memory per multiprocessor by compute capability).
"""


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """The plan of one pass, and what it is expected to move.

    The tensor is cut into slices of whole adjacent channels. A *team* of blocks keeps a slice in their shared memory
    between the two uses of its values, so that one kernel does the pass; where there is no team, the pass takes the
    multi-kernel path: one kernel for each use.
    """

    direction: str
    """"forward" or "backward"."""
    team: str
    """Who keeps a slice on chip: "block" (one), "cluster" (a few, which see each other's shared memory), "grid" (many,
    which exchange by global memory and take slice after slice) or "none"."""
    launches: int
    """Kernels."""
    slices: int
    """Of the tensor."""
    slice_channels: int
    """Channels of a slice; the last one may have fewer."""
    slice_bytes: int
    """Of one tensor, in a slice."""
    blocks_per_slice: int
    """The team's, or those that the multi-kernel path has for a slice."""
    blocks: int
    """In the grid. A grid's teams are fewer than slices where the GPU cannot run them all at a time."""
    threads: int
    """Of a block."""
    access_bytes: int
    """That a thread reads or writes at a time: 16, or less where the shape allows no more."""
    shared_bytes: int
    """Shared memory that a block of a team takes, in bytes; 0 where there is no team."""
    kept: float
    """The part of every slice that its team keeps on chip, 0 to 1. The rest of what is kept is read twice."""
    bytes_read: int
    """From memory: activation tensors and masks. Vectors of channels and partial sums, a few per cent, are not
    counted, here and below."""
    bytes_written: int
    """To memory: activation tensors and masks."""
    mask_bytes: int
    """Of these, both together, those of the mask: one bit per value, as often as it is read or written."""
    multi_kernel_launches: int
    """Kernels, where no team keeps anything."""
    multi_kernel_bytes: int
    """What they would read and write, in bytes."""
    can_have_team: bool
    """Whether a team could keep what this pass needs twice, on a GPU that is large enough."""

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` tells; `print` it, or use its attributes."""

    input_shape: tuple[int, ...]
    """(N, C, ...)."""
    dtype: torch.dtype
    """Of activation tensors."""
    memory_format: torch.memory_format
    """Of activation tensors."""
    training: bool
    """Statistics of the batch, or running ones."""
    activation: str
    """In words, "None" for none."""
    residual: bool
    """Whether there is one."""
    gpu: Gpu
    """That the plans are for."""
    tensor_bytes: int
    """N of the words: bytes of one activation tensor."""
    forward: PassPlan
    """The forward pass."""
    backward: PassPlan
    """The backward pass, with gradients of input, weight, bias and residual."""

    def __str__(self) -> str:
        """Several lines of plain words."""
        return _plan_text.text_of(self)


def explain(
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    training: bool = True,
    activation: Activation = None,
    residual: bool = False,
    device: str | torch.device | int | None = None,
) -> Explanation:
    """Tell how batch_norm's CUDA kernels would go about an input, and what they would move; nothing runs.

    It is what is planned, by the very code that plans a call. At the launch CUDA is asked whether it has room for teams
    of several blocks at a time; if not, the pass takes the multi-kernel path, which moves `multi_kernel_bytes`.
    CPU tensors have no such plan.

    Assumed are tensors whose addresses are multiples of 16 bytes, as torch allocates them; a gradient of the output
    that is a whole tensor, not one value expanded; a momentum that is a number; and that all gradients are wanted, as
    in a training step (without them no mask is written).

    Args:
        input_shape: (N, C, ...), at least two dimensions, none of them zero.
        dtype: float32, float64, float16 or bfloat16.
        memory_format: torch.contiguous_format; torch.channels_last of four, torch.channels_last_3d of five dimensions.
        training: Statistics of the batch; otherwise running ones.
        activation: As batch_norm's.
        residual: Whether one is added before the activation.
        device: A CUDA device, of which torch is asked; or "H200", "H100" or "A100", whose published figures are used.
            None: the current CUDA device if there is one, otherwise "H200".

    Returns:
        An :class:`Explanation`; `print(bn_ext.explain(...))` shows it.

    Raises:
        ValueError: One value per channel in training; an unknown activation, memory format or GPU; an empty tensor.
        RuntimeError: Fewer than two dimensions; a negative one; a device that torch cannot ask; bn_ext is not built.
        NotImplementedError: `dtype` is not float32, float64, float16 or bfloat16.
        TypeError: A shape that is not made of numbers, a dtype that is none.
    """
    if _extension.module is None:
        raise RuntimeError(_extension.reason)
    shape = _shape_of(input_shape)
    _check(shape, dtype, memory_format, training, activation, residual)
    gpu = _gpu_of(device)
    name, parameter = resolve(activation)
    values = torch.Size(shape).numel()
    facts = _extension.module.explain(
        n=shape[0],
        c=shape[1],
        s=values // (shape[0] * shape[1]),
        channels_last=memory_format != torch.contiguous_format,
        dtype=dtype,
        training=training,
        activation=name,
        activation_parameter=parameter,
        residual=residual,
        multiprocessors=gpu.multiprocessors,
        shared_bytes=gpu.shared_bytes,
        clusters=gpu.clusters,
    )
    forward, backward = (_pass_plan(of, given) for of, given in zip(("forward", "backward"), facts, strict=True))
    rest = (describe(activation), residual, gpu, values * dtype.itemsize, forward, backward)
    return Explanation(shape, dtype, memory_format, training, *rest)


def _pass_plan(direction: str, facts: dict[str, Any]) -> PassPlan:
    """From what the extension tells (csrc/explain.cpp)."""
    own = {field.name for field in dataclasses.fields(PassPlan)}
    kept = 1 - facts["spilled_rows"] / facts["rows"]
    given = {name: value for name, value in facts.items() if name in own}
    return PassPlan(direction=direction, kept=kept, can_have_team=facts["tiles"] > 0, **given)


def _shape_of(input_shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(torch.Size(input_shape))
    except (TypeError, OverflowError):
        raise TypeError(f"explain(): input_shape must be numbers as (N, C, H, W), got {input_shape!r}") from None
    if any(size >= 2**63 for size in shape):
        raise ValueError(f"input_shape must have sizes below 2^63, got {shape}")
    return shape


def _check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    training: bool,
    activation: Activation,
    residual: bool,
) -> None:
    """What batch_norm refuses is refused here, in its own words: it is asked, with tensors without memory."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"explain(): dtype must be torch.dtype, not {type(dtype).__name__}")
    if not isinstance(residual, bool):
        raise TypeError(f"explain(): residual must be bool, whether there is one, not {type(residual).__name__}")
    dimensions = {torch.contiguous_format: len(shape), torch.channels_last: 4, torch.channels_last_3d: 5}
    known = isinstance(memory_format, torch.memory_format)
    if not known or dimensions.get(memory_format) != len(shape):
        raise ValueError(
            "memory_format must be torch.contiguous_format, torch.channels_last of 4 dimensions (N, C, H, W) or "
            f"torch.channels_last_3d of 5, got {memory_format} and input_shape {shape}"
        )
    x = torch.empty(shape, dtype=dtype, device="meta")
    vector: Tensor | None = None
    if not training and len(shape) > 1:
        vector = torch.empty(shape[1], dtype=dtype, device="meta")
    batch_norm(x, vector, vector, training=training, activation=activation, residual=x if residual else None)
    if 0 in shape:
        raise ValueError(f"input_shape must have no zero, for an empty tensor there is nothing to plan, got {shape}")


def _gpu_of(device: str | torch.device | int | None) -> Gpu:
    if device is None:
        device = torch.device("cuda") if torch.cuda.is_available() else "H200"
    if isinstance(device, str) and device.upper() in GPUS:
        return GPUS[device.upper()]
    try:
        asked = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        asked = torch.device("cpu")
    if asked.type != "cuda":
        raise ValueError(f"device must be a CUDA device or one of {', '.join(GPUS)}, got {str(device)!r}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch sees no CUDA device here, name a GPU instead: {', '.join(GPUS)}")
    found = torch.cuda.get_device_properties(asked)
    shared = found.shared_memory_per_multiprocessor
    return Gpu(found.name, found.multi_processor_count, shared, found.major >= 9)
