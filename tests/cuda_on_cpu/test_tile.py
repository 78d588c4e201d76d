"""Rows in shared memory: each is awaited, but not those that come after it."""

from pathlib import Path

import numpy as np
import pytest

from . import build
from .device import POLICIES, Device
from .tiles import awaited_later, stages

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

GROUP_ROWS = 4
ALL_KEPT = [(n, n) for n in (1, 3, 4, 5, 8, 25, 32, 33, 47, 64)]
SPILLING = [(2, 1), (9, 1), (7, 3), (5, 4), (8, 7), (29, 8), (26, 13), (40, 13), (57, 28), (150, 72)]
"""Rows, and of them those that stay."""


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(build.library([Path(__file__).parent / "tile.cu"]))


def copied(device: Device, rows: int, kept: int, policy: str, group_of: int = -1, stage: int = -1) -> tuple[bool, bool]:
    """Whether all rows of x came to y, and back to z; without a wait for a group or a stage if so wished."""
    device.reset()
    device.set_order(policy)
    x = np.random.default_rng(rows).standard_normal((rows, 128), np.float32)
    y, z = (device.output(name, x.shape, np.float32) for name in "yz")
    device.call("rows", device.input("x", x), y, z, rows, kept, group_of, stage)
    return bool((y.array == x).all()), bool((z.array == x).all())


@pytest.mark.parametrize(("rows", "kept"), [*ALL_KEPT, *SPILLING])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_are_read_while_others_are_on_their_way(device: Device, rows: int, kept: int, policy: str) -> None:
    assert copied(device, rows, kept, policy) == (True, True)
    assert device.counters("activation").bytes_read == (2 * rows - kept) * 128 * 4
    if policy in ("random", "priorities"):  # some copies are there at once
        return
    assert device.counters("activation").bytes_awaited_later == awaited_later(rows, kept, GROUP_ROWS) * 128 * 4


def test_a_stage_is_on_its_way_while_another_one_is_read() -> None:
    """In the sums and on the way back, of 13 rows at a time: 8 of each 13, or the other 5."""
    assert stages(26, 13, GROUP_ROWS) == [8, 5, 8, 5]
    there = awaited_later(26, 13, GROUP_ROWS, goes_back=False)
    assert (there, awaited_later(26, 13, GROUP_ROWS) - there) == (4 + 5 + 5 + 8 + 8 + 5 + 5, 5 + 8)
    assert awaited_later(13, 13, GROUP_ROWS) == 9 + 5 + 1


@pytest.mark.parametrize(("rows", "kept"), [(1, 1), (5, 5), (25, 25), (64, 64), *SPILLING[:-1]])
def test_a_wait_too_few_is_noticed(device: Device, rows: int, kept: int) -> None:
    sizes = stages(rows, kept, GROUP_ROWS)
    for i in (i for i, size in enumerate(sizes) if size > 0):
        for policy in ("ascending", "descending"):
            assert not copied(device, rows, kept, policy, group_of=i)[0]
            refetched = i < len(sizes) - 2
            assert copied(device, rows, kept, policy, stage=i) == (True, not refetched)
