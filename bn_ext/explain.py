"""`explain`: the launch plans of a batch norm on a CUDA device, without running it."""

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
    """The properties of a GPU that a launch plan depends on."""

    name: str
    multiprocessors: int
    """Number of streaming multiprocessors."""
    shared_bytes: int
    """Shared memory per multiprocessor, in bytes; all blocks that are resident on it share it."""
    clusters: bool
    """Whether blocks can be launched in clusters (compute capability 9.0 and newer)."""


GPUS: dict[str, Gpu] = {
    "H200": Gpu("H200", 132, 228 * 1024, True),
    "H100": Gpu("H100", 132, 228 * 1024, True),
    "A100": Gpu("A100", 108, 164 * 1024, False),
}
"""The GPUs that `explain` accepts by name; H100 and A100 are the SXM modules.

Source: NVIDIA's H200 data sheet, H100 and A100 Tensor Core GPU architecture papers, CUDA C++ programming guide (shared
memory per multiprocessor by compute capability).
"""


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """The launch plan of one pass, with the bytes that it is expected to read and write.

    The tensor is cut into slices of whole adjacent channels. On the single-pass path, a team of blocks holds a slice in
    shared memory between the two uses of its values, so one kernel computes the pass. The multi-kernel path has no
    teams and launches one kernel per step. All counts of bytes concern activation tensors and masks; per-channel
    tensors and partial sums, a few per cent, are not counted.

    Examples:
        >>> plan = bn_ext.explain((32, 64, 56, 56), device="H200").forward
        >>> plan.direction, plan.launches, plan.bytes_moved == plan.bytes_read + plan.bytes_written
        ('forward', 1, True)
    """

    direction: str
    """"forward" or "backward"."""
    team: str
    """The team that holds a slice on chip: "block" (one block), "cluster" (a few, which access each other's shared
    memory), "grid" (many, which exchange sums through global memory and process slice after slice) or "none"."""
    launches: int
    """Number of kernels."""
    slices: int
    """Number of slices of the tensor."""
    slice_channels: int
    """Channels per slice; the last slice may have fewer."""
    slice_bytes: int
    """Bytes of one tensor per slice."""
    blocks_per_slice: int
    """Blocks of a team; without teams, blocks per slice on the multi-kernel path."""
    blocks: int
    """Blocks in the grid. A cooperative grid has fewer teams than slices if not all teams fit on the GPU together."""
    threads: int
    """Threads per block."""
    access_bytes: int
    """Bytes that a thread reads or writes in one access: 16, or fewer if the shape requires it."""
    shared_bytes: int
    """Shared memory per block of a team, in bytes; 0 without teams."""
    kept: float
    """Fraction of each slice that its team holds on chip, from 0 to 1. The remaining rows are read twice."""
    bytes_read: int
    """Bytes read from memory."""
    bytes_written: int
    """Bytes written to memory."""
    mask_bytes: int
    """Bytes of masks in `bytes_read` and `bytes_written` together: one bit per value, per read or write."""
    multi_kernel_launches: int
    """Number of kernels on the multi-kernel path."""
    multi_kernel_bytes: int
    """Bytes that the multi-kernel path would read and write."""
    can_have_team: bool
    """Whether a team could hold the tensors that this pass reads twice, on a sufficiently large GPU."""

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The launch plans of a batch norm, as attributes; `print` shows them as text.

    Examples:
        >>> explanation = bn_ext.explain((8, 64, 7, 7), activation="relu", device="A100")
        >>> explanation.activation, explanation.gpu.name, explanation.tensor_bytes == 4 * 8 * 64 * 7 * 7
        ('relu', 'A100', True)
    """

    input_shape: tuple[int, ...]
    """Shape of the input, (N, C, ...)."""
    dtype: torch.dtype
    """Dtype of the activation tensors."""
    memory_format: torch.memory_format
    """Memory format of the activation tensors."""
    training: bool
    """Whether the statistics are those of the batch; otherwise they are the running statistics."""
    activation: str
    """The activation as readable text; "None" if there is none."""
    residual: bool
    """Whether a residual is added."""
    gpu: Gpu
    """The GPU that the plans are for."""
    tensor_bytes: int
    """Bytes of one activation tensor; N in the printed text."""
    forward: PassPlan
    """Plan of the forward pass."""
    backward: PassPlan
    """Plan of the backward pass, with gradients of input, weight, bias and residual."""

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
    """Return the launch plans of batch_norm's CUDA kernels for an input shape, without a GPU and without running them.

    The code that plans a real call computes the plans. At the launch, the host code also asks CUDA whether all blocks
    of a cluster or cooperative grid can be resident together; if not, the multi-kernel path runs, which moves
    `multi_kernel_bytes`. The CPU kernels have no launch plan.

    The plans assume that addresses are multiples of 16 bytes, as torch allocates tensors; that the gradient of the
    output is a full tensor, not one expanded value; that momentum is a number; and that all gradients are needed, as in
    a training step (otherwise no mask is written).

    Args:
        input_shape: (N, C, ...), at least two dimensions, no zero.
        dtype: float32, float64, float16 or bfloat16.
        memory_format: torch.contiguous_format; also torch.channels_last for four and torch.channels_last_3d for five
            dimensions.
        training: Whether to use the statistics of the batch; otherwise the running statistics.
        activation: The activation, as for `bn_ext.batch_norm`.
        residual: Whether a residual is added before the activation.
        device: A CUDA device, whose properties torch reports; or "H200", "H100" or "A100", whose published properties
            are used. None means the current CUDA device if there is one, otherwise "H200".

    Returns:
        An `Explanation`; `print(bn_ext.explain(...))` shows it as text.

    Raises:
        ValueError: If training has one value per channel, the activation, memory format or GPU is unknown, or the
            tensor is empty.
        RuntimeError: If the shape has fewer than two dimensions or a negative size, torch does not see the device, or
            bn_ext is not built.
        NotImplementedError: If dtype is not float32, float64, float16 or bfloat16.
        TypeError: If input_shape is not a sequence of integers, dtype not a torch.dtype, or residual not a bool.

    Examples:
        >>> explanation = bn_ext.explain((32, 64, 56, 56), torch.bfloat16, activation="relu", device="H200")
        >>> explanation.forward.launches, explanation.backward.launches
        (1, 1)
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
    """Build a PassPlan from the numbers that the extension returns (csrc/explain.cpp)."""
    own = {field.name for field in dataclasses.fields(PassPlan)}
    kept = 1 - facts["spilled_rows"] / facts["rows"]
    given = {name: value for name, value in facts.items() if name in own}
    return PassPlan(direction=direction, kept=kept, can_have_team=facts["tiles"] > 0, **given)


def _shape_of(input_shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(torch.Size(input_shape))
    except (TypeError, OverflowError):
        raise TypeError(f"explain(): input_shape must be integers such as (N, C, H, W), got {input_shape!r}") from None
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
    """Raise batch_norm's own errors: call it on meta tensors, which have no memory."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"explain(): dtype must be torch.dtype, not {type(dtype).__name__}")
    if not isinstance(residual, bool):
        raise TypeError(f"explain(): residual must be True or False, not {type(residual).__name__}")
    dimensions = {torch.contiguous_format: len(shape), torch.channels_last: 4, torch.channels_last_3d: 5}
    known = isinstance(memory_format, torch.memory_format)
    if not known or dimensions.get(memory_format) != len(shape):
        raise ValueError(
            "memory_format must be torch.contiguous_format, torch.channels_last for 4 dimensions (N, C, H, W) or "
            f"torch.channels_last_3d for 5, got {memory_format} and input_shape {shape}"
        )
    x = torch.empty(shape, dtype=dtype, device="meta")
    vector: Tensor | None = None
    if not training and len(shape) > 1:
        vector = torch.empty(shape[1], dtype=dtype, device="meta")
    batch_norm(x, vector, vector, training=training, activation=activation, residual=x if residual else None)
    if 0 in shape:
        raise ValueError(f"input_shape must have no zero, because an empty tensor needs no plan, got {shape}")


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
        raise RuntimeError(f"torch sees no CUDA device: pass the name of a GPU as device instead ({', '.join(GPUS)})")
    found = torch.cuda.get_device_properties(asked)
    shared = found.shared_memory_per_multiprocessor
    return Gpu(found.name, found.multi_processor_count, shared, found.major >= 9)
