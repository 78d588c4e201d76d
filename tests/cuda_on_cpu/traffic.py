"""What the kernels move, as traffic.h expects it and as the device counts it. Imports no torch."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import Counters


class Traffic(ctypes.Structure):
    """traffic.h."""

    _fields_ = [
        ("read", ctypes.c_int64),
        ("written", ctypes.c_int64),
        ("mask_read", ctypes.c_int64),
        ("mask_written", ctypes.c_int64),
        ("launches", ctypes.c_int),
    ]


@dataclass
class Moved:
    """What traffic.h leaves out of a pass, or puts in other words than the device, which counts every access."""

    numel: int
    accesses: int
    """That read a tensor once: each reads a byte of a mask too, or for a tile the word that has it."""
    accesses_again: int
    """Of rows that do not stay in tiles."""
    mask_bytes: int
    """That an access reads of a mask."""
    changed_words: int | None
    """Of a mask, by an atomic each, after it was cleared; None: whole bytes of it are stored."""
    beyond_float32: bool
    """Squares are, perhaps, so that channels may be read again."""

    @staticmethod
    def of(plan: Any, x: NDArray[Any], dtype: str, mask: NDArray[np.bool_] | None = None) -> "Moved":
        """Of a pass with this input, which wrote this mask."""
        changed = None
        if mask is not None and not plan.whole_bytes:
            changed = int(mask.reshape(-1, plan.vector).any(1).sum())
        accesses, single_pass = x.size // plan.vector, plan.team_name != "none"
        again = accesses // plan.rows * plan.spilled_rows if single_pass else 0
        return Moved(x.size, accesses, again, 4 if single_pass else 1, changed, _squares_are_beyond(x, dtype))


def check_traffic(counted: Counters, expected: Traffic, moved: Moved) -> None:
    """They agree to the byte."""
    mask = (moved.numel + 7) // 8
    masks_read, rest = divmod(expected.mask_read, mask)
    assert rest in (0, -(-moved.numel * moved.accesses_again // (8 * moved.accesses)))
    mask_read = (masks_read * moved.accesses + (rest > 0) * moved.accesses_again) * moved.mask_bytes
    mask_written = expected.mask_written
    if moved.changed_words is not None:
        assert (expected.mask_read, expected.mask_written) == (mask, 2 * mask)
        mask_read = 4 * moved.changed_words
        mask_written = moved.numel // 8 + 4 + 4 * moved.changed_words
    assert counted.bytes_written == expected.written - expected.mask_written + mask_written
    read = expected.read - expected.mask_read + mask_read
    assert counted.bytes_read == read or (moved.beyond_float32 and counted.bytes_read > read)


def _squares_are_beyond(x: NDArray[Any], dtype: str) -> bool:
    if dtype == "bfloat16":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    accumulate = np.float64 if dtype == "float64" else np.float32
    with np.errstate(all="ignore"):
        return not np.isfinite(np.square(x, dtype=accumulate).sum())
