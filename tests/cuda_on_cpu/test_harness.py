"""The harness itself: correct kernels run in every order, each fault is found and named, counts are exact."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cuda_on_cpu import build
from cuda_on_cpu.device import POLICIES, Buffer, Device, Fault

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HERE = Path(__file__).parent
ORDERS = list(product(POLICIES, range(4)))
FAULTS = [
    "none",
    "divergent_barrier",
    "two_barriers",
    "exit_before_barrier",
    "exited_lane",
    "late_exit",
    "absent_lane",
    "two_shuffles",
    "inactive_source",
    "misaligned",
    "shared_overrun",
    "underrun",
]


@pytest.fixture(scope="module")
def loaded() -> Device:
    return Device(build.library([HERE / "faulty.cu"]))


@pytest.fixture
def device(loaded: Device) -> Iterator[Device]:
    loaded.reset()
    yield loaded
    loaded.reset()


def line(text: str, nth: int = 0) -> str:
    """The place, as messages say it, of the n-th line of the source that has this text."""
    lines = (HERE / "faulty.cu").read_text().splitlines()
    return f"faulty.cu:{[i for i, words in enumerate(lines, 1) if text in words][nth]}"


def block_sums(device: Device, policy: str, seed: int, missing_barrier: int = 0, blocks: int = 6) -> bool:
    """Whether all threads of all blocks got the right sums."""
    device.reset()
    device.set_order(policy, seed)
    x = np.random.default_rng(seed).integers(-8, 9, (blocks, 128)).astype(np.float32)  # exact in any order
    sums = device.output("sums", (blocks, 128, 2), np.float32)
    device.call("block_sums", device.input("x", x), sums, blocks, 128, missing_barrier)
    if not missing_barrier:
        device.check_written(sums)
    expected = np.stack([x.sum(1), (x * x).sum(1)], 1)[:, None]
    return bool((sums.array == expected).all())


@pytest.mark.parametrize("policy", POLICIES)
def test_correct_reduction(device: Device, policy: str) -> None:
    assert all(block_sums(device, policy, seed) for seed in range(25))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("missing_barrier", [1, 2], ids=["read_after_write", "write_after_read"])
def test_missing_barrier(device: Device, policy: str, missing_barrier: int) -> None:
    assert not all(block_sums(device, policy, seed, missing_barrier) for seed in range(4))


def test_seed_repeats(device: Device) -> None:
    """The same seed gives the same run, races included; other seeds give others."""

    def run(seed: int) -> bytes:
        device.reset()
        device.set_order("random", seed)
        sums = device.output("sums", (6, 128, 2), np.float32)
        x = device.input("x", np.arange(6 * 128, dtype=np.float32))
        device.call("block_sums", x, sums, 6, 128, 2)
        return sums.array.tobytes()

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(8)}) > 1


@pytest.mark.parametrize(("policy", "seed"), ORDERS)
def test_warp_operations(device: Device, policy: str, seed: int) -> None:
    device.set_order(policy, seed)
    results, shifted = device.output("results", (64, 4), np.uint32), device.output("shifted", 64, np.float64)
    device.call("warp_operations", results, shifted)
    t = np.arange(64)
    np.testing.assert_array_equal(results.array, np.stack([t // 32 * 32, t * 0 + 0xAAAAAAAA, t * 0 + 1, t ^ 1], 1))
    moved = (t % 32 < 16) & (t % 8 < 7)
    np.testing.assert_array_equal(shifted.array, t + moved)


@pytest.mark.parametrize("policy", POLICIES)
def test_shared_memory(device: Device, policy: str) -> None:
    """Starts poisoned, for every block again; blocks that run at once do not see each other's."""
    device.set_machine(resident_blocks=3)
    device.set_order(policy, 1)
    found, left = (device.output(name, (10, 64), np.uint32) for name in ("found", "left"))
    device.call("shared", found, left, 10)
    assert (found.array == 0xFFFFFFFF).all()
    assert (left.array == np.arange(10)[:, None]).all()


def faulty(device: Device, name: str, policy: str = "ascending", seed: int = 0) -> Buffer:
    device.set_order(policy, seed)
    y = device.output("y", 128, np.float32)
    device.call("faulty", FAULTS.index(name), y)
    return y


MESSAGES = [
    ("divergent_barrier", [r"deadlock: thread \(\d+,0,0\) waits at __syncthreads \(", line("kDivergentBarrier &&")]),
    ("two_barriers", ["deadlock", line("      __syncthreads();"), line("      __syncthreads();", 1)]),
    ("exit_before_barrier", ["deadlock", r"thread \(5,0,0\) has exited", line("// the last")]),
    ("exited_lane", [r"lane 5, which has exited|thread \(5,0,0\) has exited", line("value += __shfl_xor_sync")]),
    ("late_exit", ["has exited", line("value += __shfl_xor_sync")]),
    ("absent_lane", ["deadlock", "waits at __shfl_xor_sync", "for lane 5 of warp 0, which waits at __syncthreads"]),
    (
        "two_shuffles",
        ["deadlock", "waits at __shfl_sync", "waits at __shfl_xor_sync", line("if (fault == kTwoShuffles")],
    ),
    ("misaligned", [r"a read of 16 bytes is misaligned: at byte 4 of 'y', which has 512", line("== kMisaligned")]),
    ("shared_overrun", [r"shared memory was written at byte 260, past its end"]),
    ("underrun", [r"'y' was written at byte -8, before its beginning"]),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "words"), MESSAGES, ids=[name for name, _ in MESSAGES])
def test_faults(device: Device, name: str, words: list[str], policy: str) -> None:
    for seed in range(3):
        device.reset()
        with pytest.raises(Fault, match=r"^launch 1[,:] ") as raised:
            faulty(device, name, policy, seed)
        for part in words:
            raised.match(part)
        if name != "underrun":  # found when the launch is over
            raised.match(r"block \([01],0,0\)" if name == "divergent_barrier" else r"block \(1,0,0\)")
        assert (faulty(device, "none", policy).array == 1).all()  # the device is as good as new


def test_inactive_source(device: Device) -> None:
    """A shuffle from a lane outside the mask is undefined: it gives a NaN."""
    y = faulty(device, "inactive_source").array.reshape(2, 64)
    assert np.isnan(y[:, :4]).all()
    assert (y[:, 4:] == 1).all()


def test_partial_warp(device: Device) -> None:
    sums, x = device.output("sums", (48, 2), np.float32), device.input("x", np.ones(48, np.float32))
    with pytest.raises(Fault, match=r"__shfl_xor_sync names lane 16, which the block does not have"):
        device.call("partial_warp", sums, x)


@pytest.mark.parametrize("misalignment", [0, 4, 100])
def test_overrun(device: Device, misalignment: int) -> None:
    """By an intrinsic at once, by a plain pointer at the end of the launch."""
    x, y = device.input("x", np.ones(66, np.float32)), device.output("y", 64, np.float32, misalignment=misalignment)
    assert y.address % 256 == misalignment
    words = [
        r"launch 1, block \(0,0,0\), thread \(63,0,0\), faulty.cu:\d+: ",
        r"a write of 4 bytes outside every buffer: at byte 256 of 'y', which has 256 bytes",
    ]
    with pytest.raises(Fault, match="".join(words)):
        device.call("copy", x, y, 1, 66, 1, 4, 2)
    with pytest.raises(Fault, match=r"launch 2: 'y' was written at byte 256, past its end"):
        device.call("copy_raw", x, y, 2, 66)
    device.check_guards()  # mended


def test_outside_a_kernel(device: Device) -> None:
    """Host code that uses device memory by device functions is told so."""
    with pytest.raises(Fault, match="outside a kernel"):
        device.call("load_on_host", device.input("x", np.ones(1, np.float32)))


def test_unwritten(device: Device) -> None:
    x, y = device.input("x", np.ones(64, np.float32)), device.output("y", 64, np.float32)
    device.call("copy", x, y, 3, 64, 1, 4, 1)
    with pytest.raises(Fault, match=r"'y' still holds poison at element 0 \(3 of 64 elements\): never written"):
        device.check_written(y)
    device.call("copy", x, y, 0, 3, 1, 4, 1)
    device.check_written(y)
    assert device.launch_count() == 2


@pytest.mark.parametrize(("policy", "seed"), ORDERS)
@pytest.mark.parametrize(
    ("bytes_", "stride", "misalignment", "sectors_read"),
    [
        (4, 1, 0, 4),
        (4, 1, 4, 5),
        (4, 2, 0, 8),
        (4, 100, 0, 32),
        (16, 1, 0, 16),
        (16, 1, 16, 17),
        (16, 2, 0, 32),
        (2, 1, 0, 2),
    ],
)
def test_counts(
    device: Device, policy: str, seed: int, bytes_: int, stride: int, misalignment: int, sectors_read: int
) -> None:
    """Bytes and sectors of a copy; sectors are those of one warp."""
    device.set_order(policy, seed)
    warps = 8
    count = 32 * warps
    x = device.input("x", np.zeros(count * stride * bytes_, np.uint8), misalignment=misalignment)
    y = device.output("y", count * bytes_, np.uint8, kind="workspace")
    device.call("copy", x, y, 0, count, stride, bytes_, count // 64)
    read, written, none = (device.counters(kind) for kind in ("activation", "workspace", "parameter"))
    assert (read.bytes_read, read.bytes_written, read.sector_bytes_written) == (count * bytes_, 0, 0)
    assert (written.bytes_read, written.bytes_written) == (0, count * bytes_)
    assert read.sector_bytes_read == 32 * warps * sectors_read
    assert written.sector_bytes_written == count * bytes_
    assert none.bytes_read == none.bytes_written == 0
    device.reset_counters()
    assert device.counters("activation").bytes_read == 0


def test_far_apart(device: Device) -> None:
    """Offsets beyond 32 bits, in memory that is reserved only."""
    x = device.output("x", 3 << 30, np.float32, contents="zero")
    x.array[-64:] = range(64)
    y = device.output("y", 64, np.float32)
    device.call("copy", x.address + x.array.nbytes - 256, y, 0, 64, 1, 4, 1)
    assert (y.array == range(64)).all()


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ((1, 1, 1, 1024, 1, 1, 48 * 1024), None),
        ((3, 2, 2, 4, 4, 64, 0), None),
        ((1, 1, 1, 1025, 1, 1, 0), "configuration"),
        ((1, 1, 1, 32, 32, 2, 0), "configuration"),
        ((1, 1, 1, 1, 1, 65, 0), "configuration"),
        ((0, 1, 1, 1, 1, 1, 0), "configuration"),
        ((1, 1, 1, 1, 0, 1, 0), "configuration"),
        ((1 << 31, 1, 1, 1, 1, 1, 0), "configuration"),
        ((1, 65536, 1, 1, 1, 1, 0), "configuration"),
        ((1, 1, 65536, 1, 1, 1, 0), "configuration"),
        ((1, 1, 1, 1, 1, 1, 48 * 1024 + 1), "argument"),
    ],
)
def test_launch_limits(device: Device, sizes: tuple[int, ...], error: str | None) -> None:
    if error is None:
        device.call("launch_empty", *sizes)
        return
    with pytest.raises(Fault, match=f"^invalid .*{error}"):
        device.call("launch_empty", *sizes)
    assert device.launch_count() == 0


def test_another_machine(device: Device) -> None:
    device.set_machine(resident_blocks=1, shared_bytes=40 * 1024)
    device.call("launch_empty", 1, 1, 1, 1, 1, 1, 40 * 1024)
    with pytest.raises(Fault, match=r"^invalid argument"):
        device.call("launch_empty", 1, 1, 1, 1, 1, 1, 40 * 1024 + 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_atomics(device: Device, policy: str) -> None:
    """All bits in every order; each is four bytes read and four written."""
    for seed in range(4):
        device.reset()
        device.set_order(policy, seed)
        words = device.output("words", 32, np.uint32, contents="zero")
        device.call("set_bits", words, 64, 1)
        assert (words.array == 0xFFFFFFFF).all()
        counters = device.counters("activation")
        assert counters.bytes_read == counters.bytes_written == 4 * 1024


@pytest.mark.parametrize("policy", ["random", "priorities"])
def test_a_missing_atomic_loses_bits(device: Device, policy: str) -> None:
    def complete(seed: int) -> bool:
        device.reset()
        device.set_order(policy, seed)
        words = device.output("words", 32, np.uint32, contents="zero")
        device.call("set_bits", words, 64, 0)
        return bool((words.array == 0xFFFFFFFF).all())

    assert not all(complete(seed) for seed in range(4))


def test_atomics_are_guarded(device: Device) -> None:
    words = device.output("words", 32, np.uint32, contents="zero")
    with pytest.raises(Fault, match=r"faulty.cu:\d+: a read of 4 bytes outside every buffer: at byte 128 of 'words'"):
        device.call("set_bits", words, 65, 1)
    with pytest.raises(Fault, match="misaligned: at byte 2 of 'words'"):
        device.call("set_bits", words.address + 2, 1, 1)


def test_memset(device: Device) -> None:
    """From the host; counted, and refused where it does not lie in one buffer."""
    words = device.output("words", 16, np.uint32)
    device.call("fill", words, 0, 60)
    assert (words.array[:15] == 0).all()
    assert words.array[15] == 0xFFFFFFFF
    counters = device.counters("activation")
    assert (counters.bytes_written, counters.sector_bytes_written) == (60, 64)
    with pytest.raises(Fault, match=r"a memset of 65 bytes outside every buffer: at byte 0 of 'words', which has 64"):
        device.call("fill", words, 0, 65)
