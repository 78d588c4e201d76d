"""What the tests of the package's kernels have in common."""

from collections.abc import Iterator

import pytest

from .batch_norm import MACHINE
from .structs import MULTI_KERNEL, OF_H200, SMALL, Machine

PATHS = {
    "multi_kernel": MULTI_KERNEL,
    "block": Machine(1, OF_H200, pdl=True),
    "cluster": SMALL,
    "grid": Machine(SMALL.multiprocessors, SMALL.shared_bytes, False, True),
}


@pytest.fixture(params=PATHS)
def every_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """The multi-kernel path, and the single-pass path with teams of one block, of clusters and of a grid."""
    token = MACHINE.set(PATHS[request.param])
    yield
    MACHINE.reset(token)
