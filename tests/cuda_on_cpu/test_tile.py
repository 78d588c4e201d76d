"""Rows in shared memory: each is awaited, but not those that come after it."""

from pathlib import Path

import numpy as np
import pytest

from . import build
from .device import POLICIES, Device

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

GROUP_ROWS = 4
GROUPS = 8
"""Tile's kGroups: as many as are on their way when the first one is awaited. What is beyond is awaited early."""


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(build.library([Path(__file__).parent / "tile.cu"]))


def copied(device: Device, rows: int, policy: str, skipped: int = 0) -> bool:
    """Whether all rows of x came to y."""
    device.reset()
    device.set_order(policy)
    x = np.random.default_rng(rows).standard_normal((rows, 128), np.float32)
    y = device.output("y", x.shape, np.float32)
    device.call("rows", device.input("x", x), y, rows, skipped)
    return bool((y.array == x).all())


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 25, 32, 33, 47, 64])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_are_read_while_others_are_on_their_way(device: Device, rows: int, policy: str) -> None:
    assert copied(device, rows, policy)
    if policy in ("random", "priorities"):  # some copies are there at once
        return
    early = max(0, rows // GROUP_ROWS - GROUPS)
    left = sum(max(0, rows - GROUP_ROWS * (1 + early) - i) for i in range(0, rows, GROUP_ROWS))
    assert device.counters("activation").bytes_awaited_later == left * 128 * 4


@pytest.mark.parametrize("rows", [1, 5, 25, 64])
def test_a_group_too_few_is_noticed(device: Device, rows: int) -> None:
    for policy in ("ascending", "descending"):
        assert not copied(device, rows, policy, skipped=1)
