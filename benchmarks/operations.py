"""The operations that are timed: what each adds to batch norm, and the least memory traffic of a direction."""

from math import prod
from typing import NamedTuple


class Traffic(NamedTuple):
    """What must be read or written once at the least, vectors of one value per channel left out."""

    tensors: int  # of activations
    bits: int = 0  # per value of an activation


class Operation(NamedTuple):
    """y = activation(batch_norm(x) + residual), and how it is timed."""

    activation: str | None
    residual: bool
    directions: tuple[str, ...]  # which of `least` the shapes of ResNet-50 are timed in
    least: dict[str, Traffic]  # by direction


PLAIN = "batch_norm"
OPERATIONS = {
    # Forward and eval read x and write y; backward reads x and dy and writes dx.
    PLAIN: Operation(
        activation=None,
        residual=False,
        directions=("forward", "backward", "eval"),
        least={"forward": Traffic(2), "backward": Traffic(3), "eval": Traffic(2), "forward+backward": Traffic(5)},
    ),
    # The same: where y is positive follows from x.
    "bn+relu": Operation(
        activation="relu",
        residual=False,
        directions=("forward+backward", "eval"),
        least={"eval": Traffic(2), "forward+backward": Traffic(5)},
    ),
    # Forward reads x and z, writes y and a bit that says where y is positive; backward reads x, dy and the bits, writes
    # dx and dz.
    "bn+add+relu": Operation(
        activation="relu",
        residual=True,
        directions=("forward+backward", "eval"),
        least={"eval": Traffic(3), "forward+backward": Traffic(7, bits=2)},
    ),
}
FUSED = tuple(name for name in OPERATIONS if name != PLAIN)


def least_bytes(operation: str, size: tuple[int, ...], element_bytes: int, direction: str) -> int:
    """Count the bytes that `direction` must move for activations of `size`."""
    tensors, bits = OPERATIONS[operation].least[direction]
    return prod(size) * tensors * element_bytes + prod(size) * bits // 8
