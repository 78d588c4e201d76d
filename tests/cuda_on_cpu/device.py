"""The simulated device for Python: a library made by build.py, loaded by ctypes. Imports no torch."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

POLICIES = ["ascending", "descending", "random", "priorities"]
KINDS = ["activation", "parameter", "workspace"]
CALLS = ["launch", "load", "allocate"]
CONTENTS = ["poison", "copied", "zero"]


class Fault(RuntimeError):  # noqa: N818 (as in C++)
    """What went wrong on the device: launch, block, thread and line where they are known."""


class Counters(ctypes.Structure):
    """As in cuda_on_cpu.h: what kernels moved, of one kind of memory.

    ``bytes_awaited_later`` and ``bytes_streamed`` are of all kinds, and counted with the activations.
    """

    _fields_ = [
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("sector_bytes_read", ctypes.c_uint64),
        ("sector_bytes_written", ctypes.c_uint64),
        ("bytes_awaited_later", ctypes.c_uint64),
        ("bytes_prefetched", ctypes.c_uint64),
        ("bytes_streamed", ctypes.c_uint64),
    ]


@dataclass
class Buffer:
    """Memory of the device; ``array`` is a view of it, good until the next reset."""

    address: int
    array: NDArray[Any]

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.address)


class Device:
    """The device of one library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def call(self, function: str, *arguments: Any) -> None:
        """Call an extern "C" function that returns null or a sentence, which is raised as Fault.

        Arguments: Buffer (a pointer), None (null), int (int64_t), str, or a ctypes object.
        """
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        sentence = entry(*(self._converted(argument) for argument in arguments))
        if sentence is not None:
            raise Fault(sentence.decode())

    @staticmethod
    def _converted(argument: Any) -> Any:
        if isinstance(argument, int):
            return ctypes.c_int64(argument)
        return argument.encode() if isinstance(argument, str) else argument

    def reset(self) -> None:
        """No buffers, counters at zero, default machine and order."""
        self.call("cuda_on_cpu_reset")

    def set_machine(self, resident_blocks: int = 4, shared_bytes: int = 48 * 1024, multiprocessors: int = 1) -> None:
        """How many blocks of a launch run at once, how much shared memory one may ask for, who shares them."""
        self.call("cuda_on_cpu_set_machine", resident_blocks, shared_bytes, multiprocessors)

    def set_order(self, policy: str, seed: int = 0) -> None:
        """Which of the threads that could run does."""
        self.call("cuda_on_cpu_set_order", seed, POLICIES.index(policy))

    def input(self, name: str, values: NDArray[Any], kind: str = "activation", misalignment: int = 0) -> Buffer:
        """A buffer with these values; its address is ``misalignment`` bytes past a multiple of 256."""
        values = np.ascontiguousarray(values)
        buffer = self._buffer(name, values.shape, values.dtype, kind, misalignment, "copied", values.ctypes.data)
        return buffer

    def output(
        self,
        name: str,
        shape: int | tuple[int, ...],
        dtype: DTypeLike,
        kind: str = "activation",
        misalignment: int = 0,
        contents: str = "poison",
    ) -> Buffer:
        """A buffer that kernels are to fill; ``contents="zero"`` costs no memory where nothing is touched."""
        shape = (shape,) if isinstance(shape, int) else shape
        return self._buffer(name, shape, np.dtype(dtype), kind, misalignment, contents, None)

    def _buffer(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: "np.dtype[Any]",
        kind: str,
        misalignment: int,
        contents: str,
        source: int | None,
    ) -> Buffer:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = ctypes.c_void_p()
        numbers = (KINDS.index(kind), size, misalignment, CONTENTS.index(contents))
        self.call("cuda_on_cpu_add_buffer", name, *numbers, ctypes.c_void_p(source), ctypes.byref(address))
        assert address.value is not None
        memory = (ctypes.c_char * size).from_address(address.value)
        array = np.frombuffer(memory, dtype).reshape(shape) if size else np.empty(shape, dtype)
        return Buffer(address.value, array)

    def counters(self, kind: str) -> Counters:
        """What was moved since the last reset."""
        counters = Counters()
        self.call("cuda_on_cpu_counters", KINDS.index(kind), ctypes.byref(counters))
        return counters

    def reset_counters(self) -> None:
        """Counters at zero."""
        self.call("cuda_on_cpu_reset_counters")

    def launch_count(self) -> int:
        """Launches since the last reset."""
        count = ctypes.c_int64()
        self.call("cuda_on_cpu_launch_count", ctypes.byref(count))
        return count.value

    def refuse(self, call: str, granted: int, refused: int, error: int) -> None:
        """Let calls after the next ``granted`` ones give this error: so many of one of CALLS, or all (-1)."""
        self.call("cuda_on_cpu_refuse", CALLS.index(call), granted, refused, error)

    def last_error(self) -> int:
        """What a failed call has left, and no one has taken; 0: nothing."""
        error = ctypes.c_int64()
        self.call("cuda_on_cpu_last_error", ctypes.byref(error))
        return error.value

    def set_capture(self, captures: bool, driver_version: int = 13000) -> None:
        """Whether a graph is captured, and the version of CUDA that the driver is of."""
        self.call("cuda_on_cpu_set_capture", int(captures), driver_version)

    def calls(self) -> list[str]:
        """The calls of CUDA's functions since the last reset or clear_calls; see cuda_on_cpu.h."""
        names = ctypes.c_char_p()
        self.call("cuda_on_cpu_calls", ctypes.byref(names))
        return (names.value or b"").decode().splitlines()

    def clear_calls(self) -> None:
        """None yet."""
        self.call("cuda_on_cpu_clear_calls")

    def check_written(self, *buffers: Buffer) -> None:
        """Raise if an element is still poison."""
        for buffer in buffers:
            self.call("cuda_on_cpu_check_written", buffer, buffer.array.itemsize)

    def check_guards(self) -> None:
        """Raise if memory beside a buffer has changed (each launch checks this too)."""
        self.call("cuda_on_cpu_check_guards")
