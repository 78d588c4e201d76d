"""What the harness says of memory: reads of what nothing has written, and the host's own calls."""

from collections.abc import Iterator

import numpy as np
import pytest

from cuda_on_cpu import build
from cuda_on_cpu.device import Device, Fault

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@pytest.fixture(scope="module")
def loaded() -> Device:
    return Device(build.library([build.HERE / "faulty.cu"]))


@pytest.fixture
def device(loaded: Device) -> Iterator[Device]:
    loaded.reset()
    yield loaded
    loaded.reset()


@pytest.mark.parametrize("size", [2, 4, 16])
def test_reads_of_what_nothing_has_written(device: Device, size: int) -> None:
    """As compute-sanitizer's initcheck: what kernels or the host wrote before may be read, and nothing else."""
    x, y, z = (device.output(name, 64 * size, np.uint8) for name in ("x", "y", "z"))
    given = device.input("given", np.arange(64 * size, dtype=np.uint8))
    device.call("copy", given, x, 0, 63, 1, size, 1)
    device.call("copy", x, y, 0, 63, 1, size, 1)
    assert (y.array[: 63 * size] == given.array[: 63 * size]).all()
    words = rf"launch 3, .*a read of {size} bytes that nothing has written: at byte {63 * size} of 'x'"
    with pytest.raises(Fault, match=words):
        device.call("copy", x, z, 0, 64, 1, size, 1)


def test_a_value_of_which_only_a_part_was_written(device: Device) -> None:
    x, y = (device.output(name, 64, np.uint8) for name in ("x", "y"))
    device.call("copy", device.input("given", np.zeros(64, np.uint8)), x, 0, 7, 1, 2, 1)
    with pytest.raises(Fault, match="a read of 4 bytes that nothing has written: at byte 12 of 'x'"):
        device.call("copy", x, y, 0, 4, 1, 4, 1)


def test_prefetches(device: Device) -> None:
    """They must lie in a buffer; what is read of their sectors is counted."""
    x, y = device.input("x", np.zeros(20, np.float32)), device.output("y", 1, np.float32)
    for i, j, prefetched in ((0, 7, 4), (0, 8, 0), (19, 16, 4), (19, 15, 0)):
        device.reset_counters()
        device.call("prefetch", device.input("x", np.zeros(20, np.float32)), y, i, j)
        assert device.counters("activation").bytes_prefetched == prefetched
    for i, where in ((20, "80"), (-1, "-4")):
        with pytest.raises(Fault, match=rf"faulty.cu:\d+: a prefetch outside every buffer: at byte {where} of 'x'"):
            device.call("prefetch", x, y, i, 0)


def test_memory_of_the_host(device: Device) -> None:
    """cudaMalloc, cudaMemcpy and cudaFree; and what is wrong with them."""
    device.call("host_memory", 32, 1)
    with pytest.raises(Fault, match=r"a copy of 33 bytes outside every buffer: at byte 0 of 'allocation \d+', which"):
        device.call("host_memory", 33, 1)
    device.reset()
    with pytest.raises(Fault, match="memory is freed where no buffer begins: there are no buffers"):
        device.call("host_memory", 32, 2)
