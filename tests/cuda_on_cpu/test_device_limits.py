"""The kernels that benchmarks/device_limits measures a GPU with: what they write, and that they wait as they must."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_on_cpu import build
from cuda_on_cpu.device import POLICIES, Buffer, Device

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HERE = Path(__file__).parent
THREADS = 256
ROW = THREADS * 4  # words
KINDS = ["none", "block", "cluster", "grid"]  # as enum class Team
BARRIERS = ["block", "cluster", "one_fence", "counter", "cooperative"]
HINTS = range(3)

Words = NDArray[np.uint32]


@pytest.fixture(scope="module")
def loaded() -> Device:
    return Device(build.library([HERE / "device_limits.cpp"]))


@pytest.fixture
def device(loaded: Device) -> Iterator[Device]:
    loaded.reset()
    loaded.set_machine(resident_blocks=16, shared_bytes=64 * 1024, multiprocessors=8)
    yield loaded
    loaded.reset()


def random_words(vectors: int, first: int = 0) -> Words:
    """The data of random_data.cuh, in NumPy."""
    i = np.arange(first + 1, first + vectors + 1, dtype=np.uint32)
    i ^= i >> 16
    i *= np.uint32(0x7FEB352D)
    i ^= i >> 15
    i *= np.uint32(0x846CA68B)
    i ^= i >> 16
    factors = np.array([1, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D], dtype=np.uint32)
    return (i[:, None] * factors).ravel()


def total(words: Words) -> int:
    return int(words.sum(dtype=np.uint64) % 2**32)


def key_of(words: int, blocks: int) -> int:
    return (words + blocks * 0x9E3779B1) % 2**32


class Shape(NamedTuple):
    """As TeamShape."""

    kind: str
    blocks: int
    teams: int
    slices: int
    threads: int = 64
    rows: int = 3
    channels: int = 1

    def numbers(self) -> "ctypes.Array[ctypes.c_int64]":
        return (ctypes.c_int64 * len(self))(KINDS.index(self.kind), *self[1:])


SHAPES = [
    Shape("block", 1, 5, 5),
    Shape("block", 1, 3, 8, rows=5),
    Shape("block", 1, 2, 2, threads=512, rows=1),
    *(Shape("cluster", blocks, 3, 3) for blocks in (2, 3, 8)),
    Shape("grid", 2, 5, 12),
    Shape("grid", 16, 1, 4, rows=7),
]


def test_random_words(device: Device) -> None:
    y = device.output("y", 4 * 1000, np.uint32)
    device.call("limits_fill", y, 1000, 2)
    assert (y.array == random_words(1000)).all()
    assert np.unique(y.array).size > 3990


def count_wrong(device: Device, y: Buffer, second: int = 0, keys: Buffer | None = None, slice_vectors: int = 1) -> int:
    wrong = device.output("wrong", 1, np.uint32, kind="workspace", contents="zero")
    device.call("limits_count_wrong", y, y.array.size // 4, second, keys, slice_vectors, wrong)
    return int(wrong.array[0])


def test_what_is_wrong_is_counted(device: Device) -> None:
    y = device.input("y", random_words(1000))
    assert count_wrong(device, y) == 0
    y.array[[5, 6, 3999]] += 1
    assert count_wrong(device, y) == 2
    both = device.input("both", random_words(600) + random_words(600, first=700))
    assert count_wrong(device, both, second=700) == 0
    assert count_wrong(device, both, second=701) == 600
    keys = np.array([7, 8], dtype=np.uint32)
    keyed = device.input("keyed", random_words(600) + keys.repeat(1200))
    assert count_wrong(device, keyed, keys=device.input("keys", keys), slice_vectors=300) == 0
    assert count_wrong(device, keyed, keys=device.input("sevens", keys * 0 + 7), slice_vectors=300) == 300


def stream(device: Device, what: str, hint: int = 0, backwards: bool = False, rows: int = 4, blocks: int = 3) -> Buffer:
    """The result, or the sums that blocks have left."""
    vectors = 8 * THREADS * 4
    a = device.input("a", random_words(vectors)) if what != "write" else None
    b = device.input("b", random_words(vectors, first=vectors)) if what == "add" else None
    reads = what == "read"
    y = device.output("sums" if reads else "y", blocks * THREADS // 32 if reads else 4 * vectors, np.uint32)
    result = (None, y) if reads else (y, None)
    device.call("limits_stream", what, hint, a, b, *result, vectors, int(backwards), rows, blocks)
    device.check_written(y)
    read, written = {"read": (1, 0), "write": (0, 1), "copy": (1, 1), "add": (2, 1)}[what]
    moved = device.counters("activation")
    assert moved.bytes_read == moved.sector_bytes_read == read * 16 * vectors
    assert moved.bytes_written - reads * y.array.nbytes == written * 16 * vectors
    return y


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 3), (4, 3), (4, 8), (1, 40)])
def test_streams(device: Device, rows: int, blocks: int, backwards: bool) -> None:
    for what in ("copy", "write", "read", "add"):
        device.reset()
        y = stream(device, what, backwards=backwards, rows=rows, blocks=blocks)
        if what == "read":
            assert total(y.array) == total(random_words(8 * THREADS * 4))
        else:
            assert count_wrong(device, y, second=8 * THREADS * 4 * (what == "add")) == 0


@pytest.mark.parametrize("hint", HINTS)
def test_hints_change_nothing(device: Device, hint: int) -> None:
    assert count_wrong(device, stream(device, "copy", hint)) == 0


@pytest.mark.parametrize("width", [2, 4, 8, 16])
@pytest.mark.parametrize("copies", [False, True])
def test_slices(device: Device, width: int, copies: bool) -> None:
    pitch, rows = 16, 8
    pixels = rows * THREADS // 2
    words = random_words(pixels * pitch)
    x = device.input("x", words)
    blocks = pixels // (rows * THREADS // width) * (pitch // width)
    y = device.output("y", words.size, np.uint32) if copies else None
    sums = None if copies else device.output("sums", blocks * THREADS // 32, np.uint32)
    device.call("limits_slices", x, y, sums, pixels, pitch, width, rows)
    assert device.counters("activation").sector_bytes_read == words.nbytes
    if y is not None:
        assert count_wrong(device, y) == 0
    if sums is not None:
        assert total(sums.array) == total(words)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("barrier", "blocks", "team"),
    [
        ("block", 4, 1),
        ("cluster", 6, 2),
        ("cluster", 16, 8),
        ("one_fence", 8, 4),
        ("counter", 16, 4),
        ("counter", 15, 5),
        ("counter", 16, 16),
        ("cooperative", 16, 16),
    ],
)
def test_barriers(device: Device, policy: str, barrier: str, blocks: int, team: int) -> None:
    for seed in range(4):
        device.set_order(policy, seed)
        counters = device.output("counters", (blocks // team, 32), np.uint32, kind="workspace", contents="zero")
        progress = device.output("progress", blocks, np.uint32, kind="workspace")
        wrong = device.output("wrong", 1, np.uint32, kind="workspace", contents="zero")
        numbers = (BARRIERS.index(barrier), blocks, 64, team, 5)
        device.call("limits_barriers", *numbers, counters, progress, wrong)
        assert wrong.array[0] == 0
        assert (progress.array == 4).all()
        assert (counters.array[:, 0] == 7 * team * (barrier == "counter")).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 5, 64])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.teams == shape.slices])
def test_exchange(device: Device, policy: str, channels: int, shape: Shape) -> None:
    rounds, blocks = 4, shape.blocks
    shape = shape._replace(channels=channels, rows=1)
    segment, place, round_ = np.ogrid[:blocks, :channels, :rounds]
    of_teams = ((segment + 1) * (place + 1) + round_).sum(0).astype(np.uint64)
    expected = int((of_teams + np.uint64(blocks * 0x9E3779B1)).sum() % 2**32)
    for seed in range(3):
        device.set_order(policy, seed)
        sums = device.output("sums", (blocks * shape.teams, shape.threads // 32), np.uint32, kind="workspace")
        device.call("limits_exchange", shape.numbers(), rounds, sums)
        assert (sums.array.sum(1, dtype=np.uint64) % 2**32 == expected).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_resident_copy(device: Device, policy: str, shape: Shape) -> None:
    """Every slice is read once, and written with what its whole team knows."""
    slice_words = shape.blocks * shape.rows * shape.threads * 4
    x = random_words(shape.slices * slice_words // 4)
    keys = [key_of(total(words), shape.blocks) for words in x.reshape(shape.slices, -1)]
    expected = x + np.array(keys, dtype=np.uint32).repeat(slice_words)
    given = device.input("x", x)
    for seed in range(3):
        device.set_order(policy, seed)
        device.reset_counters()
        y = device.output("y", x.size, np.uint32)
        device.call("limits_resident", shape.numbers(), given, y)
        assert (y.array == expected).all()
        moved = device.counters("activation")
        assert moved.sector_bytes_read == moved.sector_bytes_written == x.nbytes
