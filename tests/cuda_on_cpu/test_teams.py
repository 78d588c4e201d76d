"""Blocks that work together in the harness: clusters, cooperative grids, waits, asynchronous copies."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cuda_on_cpu import build
from cuda_on_cpu.device import POLICIES, Device, Fault

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HERE = Path(__file__).parent
FAULTS = ["none", "no_barrier_before", "no_barrier_after", "one_half", "other_half", "no_such_block", "stays"]
FAULTS += ["two_buffers"]  # is none: one barrier less, and it is right
ROUNDS = 5
SEEDS = range(8)


@pytest.fixture(scope="module")
def loaded() -> Device:
    return Device(build.library([HERE / "teams.cu"]))


@pytest.fixture
def device(loaded: Device) -> Iterator[Device]:
    loaded.reset()
    yield loaded
    loaded.reset()


def line(text: str) -> str:
    """The place, as messages say it, of the line of the source that has this text."""
    lines = (HERE / "teams.cu").read_text().splitlines()
    (number,) = (i for i, words in enumerate(lines, 1) if text in words)
    return f"teams.cu:{number}"


def cluster_sums(
    device: Device, policy: str, seed: int, fault: str = "none", cluster: int = 4, resident: int = 8
) -> bool:
    """Whether all blocks of all clusters got the right sums."""
    device.reset()
    device.set_machine(resident_blocks=resident)
    device.set_order(policy, seed)
    blocks = 3 * cluster
    x = np.random.default_rng(seed).integers(0, 1000, (ROUNDS, blocks)).astype(np.uint32)
    sums = device.output("sums", x.shape, np.uint32)
    device.call("cluster_sums", device.input("x", x), sums, blocks, cluster, ROUNDS, FAULTS.index(fault))
    expected = x.reshape(ROUNDS, -1, cluster).sum(2).repeat(cluster, 1)
    return bool((sums.array == expected).all())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("cluster", "resident"), [(1, 2), (2, 3), (4, 8), (8, 8)])
def test_clusters(device: Device, policy: str, cluster: int, resident: int) -> None:
    assert all(cluster_sums(device, policy, seed, cluster=cluster, resident=resident) for seed in SEEDS)


@pytest.mark.parametrize("fault", ["no_barrier_before", "no_barrier_after"])
def test_missing_cluster_barrier(device: Device, fault: str) -> None:
    def is_found(policy: str, seed: int) -> bool:
        try:
            return not cluster_sums(device, policy, seed, fault)
        except Fault as error:
            return "is gone: all its threads have exited" in str(error)

    assert all(any(is_found(policy, seed) for seed in SEEDS) for policy in ("random", "priorities"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("one_half", r"block \(1,0,0\), thread \(5,0,0\), teams.cu:\d+: it arrives at the cluster's barrier twice"),
        ("other_half", r"block \(1,0,0\), thread \(5,0,0\), teams.cu:\d+: it waits .* without having arrived"),
        ("no_such_block", "the cluster has no block of rank 4"),
        ("stays", r"deadlock: it waits at the cluster's barrier \(" + line("// in cluster_barrier")),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_misuse_of_clusters(device: Device, policy: str, fault: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        cluster_sums(device, policy, 0, fault)
    assert cluster_sums(device, policy, 0)  # the device is as good as new


@pytest.mark.parametrize("policy", POLICIES)
def test_threads_may_leave_a_cluster(device: Device, policy: str) -> None:
    for seed in SEEDS:
        device.reset()
        device.set_order(policy, seed)
        y = device.output("y", (8, 64), np.uint32, contents="zero")
        device.call("leaving", y, 8, 4)
        assert (y.array == (np.arange(64) % 2 == 0)).all()


def grid_sums(device: Device, policy: str, seed: int, fault: str = "none", first: int = 0) -> bool:
    """Whether all blocks got the right sums; twice with one counter, which is not cleared between."""
    device.reset()
    device.set_machine(resident_blocks=6)
    device.set_order(policy, seed)
    # Zeros, so that a sum that is read too early is a wrong result, and not named as one that nothing has written.
    exchange = device.output("exchange", 12, np.uint32, kind="workspace", contents="zero")
    counter = device.input("counter", np.full(1, first, np.uint32), kind="workspace")
    right = True
    for repeat in range(2):
        x = np.random.default_rng((seed, repeat)).integers(0, 1000, (ROUNDS, 6)).astype(np.uint32)
        sums = device.output("sums", x.shape, np.uint32)
        device.call("grid_sums", device.input("x", x), exchange, counter, sums, 6, ROUNDS, FAULTS.index(fault), 1)
        right &= bool((sums.array == x.sum(1, keepdims=True)).all())
    assert fault not in ("none", "two_buffers") or counter.array[0] & 0x7FFFFFFF == 0
    return right


@pytest.mark.parametrize("policy", POLICIES)
def test_grid_barrier(device: Device, policy: str) -> None:
    assert all(grid_sums(device, policy, seed, first=seed % 2 << 31) for seed in SEEDS)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_barrier_of_a_grid_is_enough_for_two_buffers(device: Device, policy: str) -> None:
    """As exchange.cuh does; one barrier and one buffer is the fault "no_barrier_after" below."""
    assert all(grid_sums(device, policy, seed, "two_buffers") for seed in SEEDS)


@pytest.mark.parametrize("fault", ["no_barrier_before", "no_barrier_after"])
def test_missing_grid_barrier(device: Device, fault: str) -> None:
    for policy in ("random", "priorities"):
        assert not all(grid_sums(device, policy, seed, fault) for seed in SEEDS)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_grid_that_cannot_be_resident(device: Device, policy: str) -> None:
    """A cooperative launch is refused; another one waits for blocks that cannot start, which is said."""
    device.set_machine(resident_blocks=5)
    device.set_order(policy)
    words = [device.output(name, 30, np.uint32, contents="zero") for name in ("x", "exchange", "counter", "sums")]
    with pytest.raises(Fault, match=r"^too many blocks in cooperative launch"):
        device.call("grid_sums", *words, 6, ROUNDS, 0, 1)
    place = line("& kTop) == 0) __nanosleep(20)")
    with pytest.raises(Fault, match=rf"sleeps \({place}\), and no one writes any more \(blocks that have not started"):
        device.call("grid_sums", *words, 6, ROUNDS, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_waiting_for_two_words(device: Device, policy: str) -> None:
    """A write between the reads of one look is not missed, and a look that changes nothing wakes no one."""
    for seed in range(300):
        device.reset()
        device.set_order(policy, seed)
        y = device.output("y", 1, np.uint32)
        device.call("words", device.input("words", np.zeros(3, np.uint32)), y, 2)
        assert y.array[0] == 1
    with pytest.raises(Fault, match=rf"deadlock: it sleeps \({line('// for two words')}\)"):
        device.call("words", device.input("words", np.zeros(3, np.uint32)), y, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_copies(device: Device, policy: str) -> None:
    """What was copied is there when it has been waited for, and mostly not before; it is counted as a read."""
    device.set_order(policy)
    values = np.arange(128, dtype=np.float32)
    for waits in range(3):
        x, y = device.input("x", values), device.output("y", 128, np.float32)
        device.call("copies", x, y, waits, 4, 0)
        there = np.arange(128) < 64 * waits
        assert (y.array[there] == values[there]).all()
        early = ~np.isnan(y.array) & ~there  # now and then at once, in a random order
        assert (y.array[early] == values[early]).all()
        assert early.mean() < 0.5
        assert not early.any() or policy in ("random", "priorities")
    assert device.counters("activation").bytes_read == 3 * 512


@pytest.mark.parametrize(
    ("bytes_", "to", "words"),
    [
        (2, 0, "a copy of 2 bytes"),
        (8, 0, "misaligned"),
        (4, 1, "not its block's shared memory"),
        (4, -1, "not its block's shared memory"),
    ],
)
def test_misuse_of_copies(device: Device, bytes_: int, to: int, words: str) -> None:
    x, y = device.input("x", np.zeros(128, np.float32)), device.output("y", 128, np.float32)
    with pytest.raises(Fault, match=rf"{line('__pipeline_memcpy_async(')}: .*{words}"):
        device.call("copies", x, y, 2, bytes_, to)


@pytest.mark.parametrize(
    ("blocks", "cluster", "resident", "words"),
    [(6, 4, 8, "^invalid configuration"), (6, 3, 2, "^cluster misconf"), (9, 9, 16, "^cluster misconf")],
)
def test_refused_clusters(device: Device, blocks: int, cluster: int, resident: int, words: str) -> None:
    device.set_machine(resident_blocks=resident)
    with pytest.raises(Fault, match=words):
        device.call("leaving", None, blocks, cluster)
    assert device.launch_count() == 0


def test_shared_memory_is_asked_for(device: Device) -> None:
    """Beyond 48 KiB, by each kernel; the answer to how many blocks there is room for heeds it."""
    device.set_machine(resident_blocks=7, shared_bytes=100 * 1024, multiprocessors=2)

    def room(threads: int, shared_bytes: int) -> int:
        blocks = ctypes.c_int64()
        device.call("occupancy", threads, shared_bytes, ctypes.byref(blocks))
        return blocks.value

    with pytest.raises(Fault, match=r"^invalid argument"):
        device.call("launch_shared", 0, 49 * 1024)
    assert room(64, 49 * 1024) == 0
    device.call("launch_shared", 64 * 1024, 64 * 1024)
    assert room(64, 49 * 1024) == 3
    assert room(1025, 0) == 0
    with pytest.raises(Fault, match=r"^invalid argument"):
        device.call("launch_shared", 101 * 1024, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_launch_that_starts_early(device: Device, policy: str) -> None:
    """It must wait for the launch before it before it looks at memory."""
    device.set_order(policy)
    values = np.arange(64, dtype=np.float32)
    x, y = device.input("x", values), device.output("y", 64, np.float32)
    device.call("early", x, y, 1)
    assert (y.array == values).all()
    words = rf"{line('// in early_kernel')}: it touches global memory before it has waited for earlier launches"
    with pytest.raises(Fault, match=words):
        device.call("early", x, y, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_barrier_of_a_whole_grid(device: Device, policy: str) -> None:
    """Of a cooperative launch only, and of all its threads."""
    device.set_machine(resident_blocks=3)
    device.set_order(policy)
    y = device.output("y", (3, 64), np.uint32, contents="zero")
    device.call("whole_grid", y, 3, 1, 1)
    assert (y.array == 1).all()
    with pytest.raises(Fault, match="it waits for the grid, whose launch is not cooperative"):
        device.call("whole_grid", y, 3, 0, 1)
    place = line("// in whole_grid_kernel")
    with pytest.raises(Fault, match=rf"deadlock: it waits at the grid's barrier \({place}\)"):
        device.call("whole_grid", y, 3, 1, 0)


@pytest.mark.parametrize(("resident", "cluster", "expected"), [(8, 4, 2), (8, 8, 1), (6, 4, 1), (3, 4, 0), (16, 16, 0)])
def test_occupancy_of_clusters(device: Device, resident: int, cluster: int, expected: int) -> None:
    device.set_machine(resident_blocks=resident)
    clusters = ctypes.c_int64()
    device.call("occupancy_of_clusters", cluster, ctypes.byref(clusters))
    assert clusters.value == expected


def test_refusals(device: Device) -> None:
    """On a test's wish, though there is room: after so many launches, so many; the error stays until it is taken."""

    def launch() -> str:
        y = device.output("y", (8, 64), np.uint32, contents="zero")
        try:
            device.call("leaving", y, 8, 4)
        except Fault as fault:
            return str(fault)
        return ""

    refused = "too many resources requested for launch"
    device.refuse("launch", 1, 2, 701)
    assert [launch() for _ in range(5)] == ["", refused, refused, "", ""]
    assert device.launch_count() == 3
    assert device.last_error() == 701
    device.reset()
    assert device.last_error() == 0
    device.refuse("launch", 0, -1, 701)
    assert [launch() for _ in range(3)] == [refused] * 3
    assert device.launch_count() == 0
