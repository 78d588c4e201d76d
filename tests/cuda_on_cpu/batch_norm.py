"""The package's kernels on the simulated device, on raw numpy memory. Imports no torch."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import build
from .device import Buffer, Device

CUDA = build.ROOT / "csrc" / "cuda"
KERNELS = [*sorted(CUDA.glob("*.cu")), CUDA / "plan.cpp"]
SOURCES = [build.HERE / "batch_norm.cpp", *KERNELS]

DTYPES = ["float32", "float64", "float16", "bfloat16"]
"""In the order of DType in params.h. Memory of bfloat16 is uint16."""


def memory_dtype(name: str) -> "np.dtype[Any]":
    """What numpy calls the memory of a dtype."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def statistics_dtype(name: str) -> str:
    """The dtype of mean and rstd for activations of a dtype."""
    return "float64" if name == "float64" else "float32"


class Shape(ctypes.Structure):
    """params.h: N images, C channels, S positions."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("s", ctypes.c_int64),
        ("channels_last", ctypes.c_bool),
    ]


class ForwardParams(ctypes.Structure):
    """params.h."""

    _fields_ = [
        ("shape", Shape),
        ("dtype", ctypes.c_int),
        ("params_dtype", ctypes.c_int),
        ("training", ctypes.c_bool),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("running_mean", ctypes.c_void_p),
        ("running_var", ctypes.c_void_p),
        ("num_batches_tracked", ctypes.c_void_p),
        ("cumulative", ctypes.c_bool),
        ("momentum", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("y", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
    ]


class BackwardParams(ctypes.Structure):
    """params.h."""

    _fields_ = [
        ("shape", Shape),
        ("dtype", ctypes.c_int),
        ("params_dtype", ctypes.c_int),
        ("training", ctypes.c_bool),
        ("dy", ctypes.c_void_p),
        ("dy_is_scalar", ctypes.c_bool),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("dweight", ctypes.c_void_p),
        ("dbias", ctypes.c_void_p),
    ]


_INT64 = ["channels", "pitch", "slice_width", "slices", "rows", "image_rows", "segments", "step_offset", "wrap_offset"]
_INT = ["step_rows", "vector", "columns", "row_lanes", "rows_per_thread", "threads", "slice_channels", "plane"]
_INT += ["partials_per_row", "partial_values", "merge_lanes"]


class Plan(ctypes.Structure):
    """plan.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INT64),
        *((name, ctypes.c_int) for name in _INT),
        ("one_channel", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class Settings:
    """The simulated machine, and how a call's memory lies in it."""

    multiprocessors: int = 1
    policy: str = "priorities"
    seed: int = 0
    misalignment: int = 0
    """Bytes by which the address of every activation is past a multiple of 256."""
    gap: int = 0
    """Values of reserved but unused memory between two images, as if the tensor had that many more channels."""

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

    def make_plan(self, shape: Shape, value_bytes: int, alignment: int = 16, multiprocessors: int = 132) -> Plan:
        """make_plan of plan.h."""
        plan = Plan()
        self.device.call(
            "batch_norm_make_plan", ctypes.byref(shape), value_bytes, alignment, multiprocessors, ctypes.byref(plan)
        )
        return plan

    def _start(self, settings: Settings) -> None:
        self.device.reset()
        self.device.set_order(settings.policy, settings.seed)

    def _run(self, direction: str, params: ForwardParams | BackwardParams, settings: Settings) -> Plan:
        plan = Plan()
        at, plan_at = ctypes.byref(params), ctypes.byref(plan)
        self.device.call(f"batch_norm_plan_{direction}", at, settings.multiprocessors, plan_at)
        settings.spread(plan)
        self.device.reset_counters()
        self.device.call(f"batch_norm_{direction}", at, plan_at)
        return plan

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
    ) -> dict[str, Any]:
        """Run the forward pass on memory as it lies.

        `vectors`: weight, bias, running_mean, running_var, num_batches_tracked. Returns copies of y, mean, rstd and of
        what the vectors are afterwards, and the plan.
        """
        self._start(settings)
        inputs = {name: self._vector(name, value) for name, value in vectors.items()}
        statistics = memory_dtype(statistics_dtype(dtype))
        x_buffer = self._activation("x", x, shape, settings)
        y = self._result("y", x, shape, settings)
        mean, rstd = (self.device.output(name, (shape.c,), statistics, "parameter") for name in ("mean", "rstd"))
        params = ForwardParams(
            shape=shape,
            dtype=DTYPES.index(dtype),
            params_dtype=DTYPES.index(params_dtype),
            training=training,
            cumulative=momentum is None,
            momentum=momentum or 0.0,
            eps=eps,
            **_addresses(x=x_buffer, y=y, mean=mean, rstd=rstd, **inputs),
        )
        plan = self._run("forward", params, settings)
        self.device.check_written(mean, rstd, *([] if settings.gap else [y]))
        results = {"mean": mean, "rstd": rstd, **inputs}
        copies = {name: buffer and buffer.array.copy() for name, buffer in results.items()}
        return {"y": _gathered(y, x, shape), **copies, "plan": plan}

    def backward(
        self,
        shape: Shape,
        dtype: str,
        params_dtype: str,
        dy: NDArray[Any],
        x: NDArray[Any],
        vectors: dict[str, NDArray[Any] | None],
        settings: Settings,
        *,
        training: bool,
        wanted: tuple[bool, bool, bool] = (True, True, True),
    ) -> dict[str, Any]:
        """Run the backward pass on memory as it lies; a dy of one value stands for all.

        `vectors`: weight, mean, rstd. Returns copies of dx, dweight and dbias, None where not wanted, and the plan.
        """
        self._start(settings)
        inputs = {name: self._vector(name, value) for name, value in vectors.items()}
        is_scalar = dy.size == 1 and x.size != 1
        buffers = {
            "x": self._activation("x", x, shape, settings),
            "dy": self.device.input("dy", dy) if is_scalar else self._activation("dy", dy, shape, settings),
        }
        channels = ((shape.c,), memory_dtype(params_dtype), "parameter")
        outputs = {
            "dx": self._result("dx", x, shape, settings) if wanted[0] else None,
            "dweight": self.device.output("dweight", *channels) if wanted[1] else None,
            "dbias": self.device.output("dbias", *channels) if wanted[2] else None,
        }
        params = BackwardParams(
            shape=shape,
            dtype=DTYPES.index(dtype),
            params_dtype=DTYPES.index(params_dtype),
            training=training,
            dy_is_scalar=is_scalar,
            **_addresses(**inputs, **buffers, **outputs),
        )
        plan = self._run("backward", params, settings)
        self.device.check_written(*(b for name, b in outputs.items() if b and not (name == "dx" and settings.gap)))
        dx = outputs.pop("dx")
        copies = {name: buffer and buffer.array.copy() for name, buffer in outputs.items()}
        return {"dx": dx and _gathered(dx, x, shape), **copies, "plan": plan}

    def _activation(self, name: str, values: NDArray[Any], shape: Shape, settings: Settings) -> Buffer:
        if settings.gap == 0:
            return self.device.input(name, values, misalignment=settings.misalignment)
        buffer = self._result(name, values, shape, settings)
        _images(buffer.array, shape)[:] = values.reshape(shape.n, -1)
        return buffer

    def _result(self, name: str, like: NDArray[Any], shape: Shape, settings: Settings) -> Buffer:
        if settings.gap == 0:
            return self.device.output(name, like.shape, like.dtype, misalignment=settings.misalignment)
        size = like.size + (shape.n - 1) * settings.gap
        return self.device.output(name, size, like.dtype, misalignment=settings.misalignment, contents="zero")

    def _vector(self, name: str, values: NDArray[Any] | None) -> Buffer | None:
        return None if values is None else self.device.input(name, values, "parameter")


def _images(memory: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """The images in memory where there may be gaps between them, as rows."""
    values = shape.c * shape.s
    pitch = (memory.size - values) // max(shape.n - 1, 1)
    return np.lib.stride_tricks.as_strided(memory, (shape.n, values), (pitch * memory.itemsize, memory.itemsize))


def _gathered(buffer: Buffer, like: NDArray[Any], shape: Shape) -> NDArray[Any]:
    return _images(buffer.array, shape).copy().reshape(like.shape)


def _addresses(**buffers: Buffer | None) -> dict[str, int | None]:
    return {name: buffer.address if buffer else None for name, buffer in buffers.items()}


@functools.cache
def kernels(variant: str = "plain") -> Kernels:
    """The kernels, compiled for the simulated device."""
    return Kernels(build.library(SOURCES, variant))
