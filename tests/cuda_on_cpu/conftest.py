"""What the tests of the package's kernels have in common."""

from collections.abc import Iterator

import pytest

from .batch_norm import OF_H200, SHARED_BYTES


@pytest.fixture(params=[0, OF_H200], ids=["general", "resident"])
def either_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once by the general kernels, and once with slices kept on chip where they fit."""
    token = SHARED_BYTES.set(request.param)
    yield
    SHARED_BYTES.reset(token)
