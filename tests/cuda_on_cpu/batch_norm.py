"""The package's kernels on the simulated device, on raw numpy memory. Imports no torch."""

import ctypes
import functools
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import build
from .device import Buffer, Device
from .structs import (
    DTYPES,
    MULTI_KERNEL,
    NONE,
    SAVED,
    Activation,
    BackwardParams,
    ForwardParams,
    Machine,
    Plan,
    Request,
    Shape,
)
from .traffic import Moved, Traffic, check_traffic

CUDA = build.ROOT / "csrc" / "cuda"
KERNELS = sorted(CUDA.rglob("*.cu"))
KERNELS += [CUDA / name for name in ("machine.cpp", "plan.cpp", "plan_teams.cpp", "traffic.cpp")]
SOURCES = [build.HERE / "batch_norm.cpp", *KERNELS]


def memory_dtype(name: str) -> "np.dtype[Any]":
    """What numpy calls the memory of a dtype."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def statistics_dtype(name: str) -> str:
    """The dtype of mean and rstd for activations of a dtype."""
    return "float64" if name == "float64" else "float32"


MACHINE: ContextVar[Machine] = ContextVar("MACHINE", default=MULTI_KERNEL)
"""Of settings that name none."""


def with_multiprocessors(count: int) -> Machine:
    """That machine with so many of them."""
    machine = MACHINE.get()
    return Machine(count, machine.shared_bytes, machine.clusters, machine.cooperative, machine.pdl)


@dataclass(frozen=True)
class Settings:
    """The simulated machine, and how a call's memory lies in it."""

    machine: Machine = field(default_factory=lambda: MACHINE.get())
    policy: str = "priorities"
    seed: int = 0
    misalignment: int = 0
    """Bytes by which addresses of activations are past a multiple of 256 ..."""
    misaligned: tuple[str, ...] = ("x", "y", "z", "dx", "dy", "dz")
    """... which ones."""
    gap: int = 0
    """Values of reserved but unused memory between two images, as if the tensor had that many more channels."""

    resident_blocks: int | None = None
    """For which there is room, where other than a machine that has teams says."""
    refusal: tuple[str, int, int, int] | None = None
    """What the device is to refuse of a pass, as Device.refuse has it."""
    remembers: bool = False
    """Whether the thread launches by the plan of the last pass like this one, as the package does. Without a gap."""
    capture: tuple[bool, int] = (False, 13000)
    """Whether a graph is captured, and the driver's version, as Device.set_capture has them."""

    def misalignment_of(self, name: str) -> int:
        """Of the tensor of this name."""
        return self.misalignment if name in self.misaligned else 0

    def spread(self, plan: Plan) -> None:
        """Tell a plan of the gap."""
        plan.step_offset += plan.row_lanes // plan.image_rows * self.gap
        plan.wrap_offset += self.gap
        plan.pitch += self.gap


class Kernels:
    """The kernels of one library."""

    def __init__(self, library: Path) -> None:
        self.device = Device(library)
        sizes = self.device._library.batch_norm_sizes
        sizes.restype = ctypes.c_int64
        expected = [ctypes.sizeof(struct) for struct in (ForwardParams, BackwardParams, Plan)]
        assert sizes() == expected[0] << 32 | expected[1] << 16 | expected[2], "a struct here differs from csrc's"

    def make_plan(
        self,
        shape: Shape,
        value_bytes: int,
        alignment: int = 16,
        machine: Machine = MULTI_KERNEL,
        for_mask: bool = False,
        single_pass_tiles: int = 0,
        keeps_mask: bool = False,
    ) -> Plan:
        """make_plan of plan.h."""
        plan = Plan()
        request = Request(shape, value_bytes, alignment, for_mask, single_pass_tiles, keeps_mask)
        at = (ctypes.byref(request), ctypes.byref(machine), ctypes.byref(plan))
        self.device.call("batch_norm_make_plan", *at)
        return plan

    def with_teams(self, team: int, segments: int, request: Request, machine: Machine, line: int) -> Plan:
        """with_teams of plan_teams.h, of slices of ``line`` bytes at least."""
        plan = Plan()
        at = (ctypes.byref(request), ctypes.byref(machine), ctypes.byref(plan))
        self.device.call("batch_norm_with_teams", team, segments, line, *at)
        return plan

    def time_of(self, plan: Plan, request: Request, machine: Machine) -> int:
        """Nanoseconds by the planner's model."""
        time = ctypes.c_int64()
        at = (ctypes.byref(plan), ctypes.byref(request), ctypes.byref(machine), ctypes.byref(time))
        self.device.call("batch_norm_time_of", *at)
        return time.value

    def single_pass_bytes(self, plan: Plan, tiles: int, value_bytes: int) -> int:
        """Shared memory of a block: SinglePassMemory of plan.h."""
        count = ctypes.c_int64()
        self.device.call("batch_norm_single_pass_bytes", ctypes.byref(plan), tiles, value_bytes, ctypes.byref(count))
        return count.value

    def _start(self, settings: Settings) -> None:
        self.device.reset()
        machine = settings.machine
        shared_bytes = max(48 * 1024, machine.shared_bytes)
        if machine.blocks_may_wait:
            resident_blocks = settings.resident_blocks or 2 * machine.multiprocessors
            self.device.set_machine(resident_blocks, shared_bytes, machine.multiprocessors)
        else:
            self.device.set_machine(shared_bytes=shared_bytes)
        self.device.set_order(settings.policy, settings.seed)
        self.device.set_capture(*settings.capture)

    def _run(self, direction: str, params: ForwardParams | BackwardParams, settings: Settings) -> Plan:
        plan = Plan()
        at = (ctypes.byref(params), ctypes.byref(settings.machine), ctypes.byref(plan))
        if not settings.remembers:
            self.device.call(f"batch_norm_plan_{direction}", *at)
            settings.spread(plan)
        self.device.reset_counters()
        if settings.refusal is not None:
            self.device.refuse(*settings.refusal)
        self.device.call(f"batch_norm_{'known_' if settings.remembers else ''}{direction}", *at)
        return plan

    def _check_traffic(self, direction: str, params: ForwardParams | BackwardParams, plan: Plan, moved: Moved) -> None:
        traffic = Traffic()
        at = (ctypes.byref(params), ctypes.byref(plan), ctypes.byref(traffic))
        self.device.call(f"batch_norm_traffic_{direction}", *at)
        assert self.device.launch_count() == traffic.launches
        check_traffic(self.device.counters("activation"), traffic, moved)

    def forward(
        self,
        shape: Shape,
        dtype: str,
        params_dtype: str,
        x: NDArray[Any],
        vectors: dict[str, NDArray[Any] | None],
        settings: Settings,
        *,
        training: bool,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        activation: Activation = NONE,
        z: NDArray[Any] | None = None,
        masks: bool = False,
        saved: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, Any]:
        """Run the forward pass on memory as it lies, once more where `saved` is given.

        `vectors`: weight, bias, running_mean, running_var, num_batches_tracked. Returns copies of y, of what is saved
        and of what the vectors are afterwards, the mask as booleans if it is asked for, and the plan.
        """
        self._start(settings)
        inputs = {name: self._vector(name, value) for name, value in vectors.items()}
        tensors = {
            "x": self._activation("x", x, shape, settings),
            "z": None if z is None else self._activation("z", z, shape, settings),
            "y": self._result("y", x, shape, settings),
            "mask": self._mask(shape, settings) if masks else None,
        }
        kept = {name: self._saved(name, shape, dtype, saved) for name in SAVED}
        params = ForwardParams(
            shape=shape,
            dtype=DTYPES.index(dtype),
            params_dtype=DTYPES.index(params_dtype),
            training=training,
            recompute=saved is not None,
            activation=activation,
            cumulative=momentum is None,
            momentum=momentum or 0.0,
            eps=eps,
            **_addresses(**tensors, **kept, **inputs),
        )
        plan = self._run("forward", params, settings)
        self.device.check_written(*kept.values(), *([] if settings.gap else [tensors["y"]]))
        copies = {name: buffer and buffer.array.copy() for name, buffer in (kept | inputs).items()}
        mask = _get_bits(tensors["mask"].array, shape, settings) if masks else None
        self._check_traffic("forward", params, plan, Moved.of(plan, x, dtype, None if saved else mask))
        return {"y": _gathered(tensors["y"], x, shape), **copies, "mask": mask, "plan": plan}

    def backward(
        self,
        shape: Shape,
        dtype: str,
        params_dtype: str,
        dy: NDArray[Any],
        x: NDArray[Any],
        saved: dict[str, NDArray[Any]],
        settings: Settings,
        *,
        training: bool,
        wanted: Sequence[bool] = (True, True, True, False),
        activation: Activation = NONE,
        z: NDArray[Any] | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> dict[str, Any]:
        """Run the backward pass on memory as it lies; a dy of one value stands for all.

        Returns copies of dx, dweight, dbias and dz, None where not `wanted`, and the plan.
        """
        self._start(settings)
        inputs = {name: self._vector(name, saved[name]) for name in SAVED}
        is_scalar = dy.size == 1 and x.size != 1
        dy_of_all = self.device.input("dy", dy, "parameter") if is_scalar else None
        buffers = {
            "x": self._activation("x", x, shape, settings),
            "dy": dy_of_all or self._activation("dy", dy, shape, settings),
            "z": None if z is None else self._activation("z", z, shape, settings),
            "mask": None if mask is None else self._mask(shape, settings, mask),
        }
        channels = ((shape.c,), memory_dtype(params_dtype), "parameter")
        tensors = {
            "dx": self._result("dx", x, shape, settings) if wanted[0] else None,
            "dz": self._result("dz", x, shape, settings) if wanted[3] else None,
        }
        outputs = {
            "dweight": self.device.output("dweight", *channels) if wanted[1] else None,
            "dbias": self.device.output("dbias", *channels) if wanted[2] else None,
        }
        params = BackwardParams(
            shape=shape,
            dtype=DTYPES.index(dtype),
            params_dtype=DTYPES.index(params_dtype),
            training=training,
            activation=activation,
            dy_is_scalar=is_scalar,
            **_addresses(**inputs, **buffers, **tensors, **outputs),
        )
        plan = self._run("backward", params, settings)
        self._check_traffic("backward", params, plan, Moved.of(plan, x, dtype))
        written = [*outputs.values(), *([] if settings.gap else tensors.values())]
        self.device.check_written(*(buffer for buffer in written if buffer))
        gradients = {name: buffer and _gathered(buffer, x, shape) for name, buffer in tensors.items()}
        copies = {name: buffer and buffer.array.copy() for name, buffer in outputs.items()}
        return {**gradients, **copies, "plan": plan}

    def _activation(self, name: str, values: NDArray[Any], shape: Shape, settings: Settings) -> Buffer:
        if settings.gap == 0:
            return self.device.input(name, values, misalignment=settings.misalignment_of(name))
        buffer = self._result(name, values, shape, settings)
        _images(buffer.array, shape)[:] = values.reshape(shape.n, -1)
        return buffer

    def _result(self, name: str, like: NDArray[Any], shape: Shape, settings: Settings) -> Buffer:
        if settings.gap == 0:
            return self.device.output(name, like.shape, like.dtype, misalignment=settings.misalignment_of(name))
        size = like.size + (shape.n - 1) * settings.gap
        return self.device.output(name, size, like.dtype, misalignment=settings.misalignment_of(name), contents="zero")

    def _mask(self, shape: Shape, settings: Settings, bits: NDArray[np.bool_] | None = None) -> Buffer:
        """As large as mask_bytes of params.h."""
        size = (shape.n * shape.c * shape.s + (shape.n - 1) * settings.gap) // 8 + 4
        if bits is not None and not settings.gap:
            values = np.full(size, 0xFF, np.uint8)
            _set_bits(values, bits, shape, settings)
            return self.device.input("mask", values)
        mask = self.device.output("mask", size, np.uint8, contents="zero" if settings.gap else "poison")
        if bits is not None:
            _set_bits(mask.array, bits, shape, settings)
        return mask

    def _saved(self, name: str, shape: Shape, dtype: str, values: dict[str, NDArray[Any]] | None) -> Buffer:
        if values is not None:
            return self.device.input(name, values[name], "parameter")
        return self.device.output(name, (shape.c,), memory_dtype(statistics_dtype(dtype)), "parameter")

    def _vector(self, name: str, values: NDArray[Any] | None) -> Buffer | None:
        return None if values is None else self.device.input(name, values, "parameter")


def _images(memory: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """The images in memory where there may be gaps between them, as rows."""
    values = shape.c * shape.s
    pitch = (memory.size - values) // max(shape.n - 1, 1)
    return np.lib.stride_tricks.as_strided(memory, (shape.n, values), (pitch * memory.itemsize, memory.itemsize))


def _gathered(buffer: Buffer, like: NDArray[Any], shape: Shape) -> NDArray[Any]:
    return _images(buffer.array, shape).copy().reshape(like.shape)


def _images_of_mask(shape: Shape, settings: Settings) -> list[tuple[slice, slice]]:
    """For each image of a mask the bytes that it touches, and where its bits are among theirs."""
    values = shape.c * shape.s
    begins = [image * (values + settings.gap) for image in range(shape.n)]
    return [(slice(i // 8, (i + values + 7) // 8), slice(i % 8, i % 8 + values)) for i in begins]


def _get_bits(mask: NDArray[np.uint8], shape: Shape, settings: Settings) -> NDArray[np.bool_]:
    pieces = _images_of_mask(shape, settings)
    return np.concatenate([np.unpackbits(mask[own], bitorder="little")[place] for own, place in pieces]).astype(bool)


def _set_bits(mask: NDArray[np.uint8], bits: NDArray[np.bool_], shape: Shape, settings: Settings) -> None:
    for (own, place), values in zip(_images_of_mask(shape, settings), bits.reshape(shape.n, -1), strict=True):
        unpacked = np.unpackbits(mask[own], bitorder="little")
        unpacked[place] = values
        mask[own] = np.packbits(unpacked, bitorder="little")


def _addresses(**buffers: Buffer | None) -> dict[str, int | None]:
    return {name: buffer.address if buffer else None for name, buffer in buffers.items()}


@functools.cache
def kernels(variant: str = "plain") -> Kernels:
    """The kernels, compiled for the simulated device."""
    return Kernels(build.library(SOURCES, variant))
