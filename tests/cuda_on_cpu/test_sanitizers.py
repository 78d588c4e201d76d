"""The harness's builds: the sanitized one finds what it should and nothing else, and nothing is built twice."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cuda_on_cpu import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

FAULTY = Path(__file__).parent / "faulty.cu"

DRIVER = """
    import sys
    import numpy as np
    from cuda_on_cpu.device import Device, Fault

    device = Device(sys.argv[1])
    case = sys.argv[2]
    x = device.input("x", np.ones(256, np.float32))
    y = device.output("y", 256, np.float32, misalignment=4)
    if case == "correct":
        for policy in ("ascending", "descending", "random", "priorities"):
            device.set_order(policy, 1)
            sums = device.output("sums", (256, 2), np.float32)
            device.call("block_sums", x, sums, 2, 128, 0)
            assert (sums.array == 128).all()
        for fault in range(1, 8):  # fibres are abandoned and used again
            try:
                device.call("faulty", fault, y)
            except Fault as error:
                print(error)
            device.call("faulty", 0, y)
        device.reset()
        print("done")
    if case == "overrun":
        device.call("copy_raw", x, y, 193, 257)
    if case == "shared_overrun":
        device.call("faulty", 10, y)
    if case == "overflow":
        x = device.input("i", np.array([2**31 - 1], np.int32))
        device.call("overflow", x, device.output("o", 1, np.int32))
"""


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return build.library([FAULTY], "sanitized")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("correct", None),
        ("overrun", "AddressSanitizer"),
        ("shared_overrun", "AddressSanitizer"),
        ("overflow", "signed integer overflow"),
    ],
)
def test_sanitizers(sanitized: Path, case: str, words: str | None) -> None:
    environment = build.sanitizer_environment() | {"PYTHONPATH": str(FAULTY.parent.parent), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(sanitized), case]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if words is None:
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert result.stdout.count("launch") == 7
    else:
        assert result.returncode != 0
        assert words in result.stderr
        assert "faulty.cu" in result.stderr


def test_build_is_found_again() -> None:
    """The second call compiles nothing; a define makes another library."""
    first = build.library([FAULTY])
    made_at = first.stat().st_mtime_ns
    assert build.library([FAULTY]) == first
    assert first.stat().st_mtime_ns == made_at
    other = build.library([FAULTY], defines=["ANYTHING=1"])
    assert other != first
    assert build.library([FAULTY], defines=["ANYTHING=1"]) == other


def test_build_error(tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text('static_assert(false, "this is wrong");\n')
    with pytest.raises(build.BuildError, match="this is wrong"):
        build.library([tmp_path / "wrong.cu"])
