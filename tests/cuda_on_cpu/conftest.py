"""What the tests of the package's kernels have in common."""

from collections.abc import Iterator

import pytest

from .batch_norm import MACHINE
from .structs import GENERAL, OF_H200, SMALL, Machine

PATHS = {
    "general": GENERAL,
    "block": Machine(1, OF_H200, pdl=True),
    "cluster": SMALL,
    "grid": Machine(SMALL.multiprocessors, SMALL.shared_bytes, False, True),
}


@pytest.fixture(params=PATHS)
def every_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """By the general kernels; with slices kept on chip by one block, by clusters, by teams of a grid where they fit."""
    token = MACHINE.set(PATHS[request.param])
    yield
    MACHINE.reset(token)
