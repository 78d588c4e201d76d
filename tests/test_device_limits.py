"""benchmarks/device_limits on its host's side: a program that comes to grief, and the tables of what it has printed."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import FileError
from benchmarks.device_limits import __main__ as command
from benchmarks.device_limits import report, run

# As limits.cu, but for what it measures: prints a figure for each part, and comes to grief where it is told to.
PROGRAM = """
import json, os, signal, sys

def say(part, **values):
    print(json.dumps({"part": part, **values}), flush=True)

assert float(sys.argv[2]) > 0
say("device", name="simulated", multiprocessors=132)
for part in sys.argv[3:]:
    say(part, begins=True)
    say(part, what="figure", us=1.0)
    print("not a figure", flush=True)
    if part == sys.argv[1] == "copy":
        sys.exit("limits: the device does not go on after that")
    if part == sys.argv[1] == "barriers":
        os.write(1, b'{"part": "barriers", "what": "cut o')
        signal.pause()
    if part == sys.argv[1] == "slices":
        os.kill(os.getpid(), signal.SIGKILL)
    say(part, ends=True, complete=part != "cache", seconds=0.5)
"""


def run_program(folder: Path, grief: str, parts: list[str], seconds: float = 60, silence: float = 30) -> Any:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return run.run_parts([sys.executable, str(program), grief], parts, time.monotonic() + seconds, folder, silence)


def test_all_parts(tmp_path: Path) -> None:
    found = run_program(tmp_path, "nowhere", list(run.PARTS))
    assert found["device"] == {"name": "simulated", "multiprocessors": 132}
    assert list(found["parts"]) == list(run.PARTS)
    for name, part in found["parts"].items():
        assert part == {"figures": [{"what": "figure", "us": 1.0}], "complete": name != "cache", "seconds": 0.5}


@pytest.mark.parametrize(
    ("grief", "silence", "error"),
    [
        ("copy", 30, "status 1: limits: the device does not go on after that"),
        ("barriers", 0.3, "it was ended, since nothing had come of it for 0 s"),
        ("slices", 30, "status -9"),
    ],
)
def test_the_other_parts_are_measured_all_the_same(tmp_path: Path, grief: str, silence: float, error: str) -> None:
    found = run_program(tmp_path, grief, ["cache", grief, "resident"], silence=silence)
    assert found["parts"].keys() == {"cache", grief, "resident"}
    assert found["parts"][grief] == {"figures": [{"what": "figure", "us": 1.0}], "complete": False, "error": error}
    for name in ("cache", "resident"):
        assert "error" not in found["parts"][name]
        assert found["parts"][name]["seconds"] == 0.5


def test_time_that_is_over(tmp_path: Path) -> None:
    found = run_program(tmp_path, "nowhere", ["copy"], seconds=1)
    assert found["parts"]["copy"]["error"] == "there was no time left"


def test_a_program_that_cannot_begin(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('limits: memory to read: out of memory')"]
    found = run.run_parts(command, ["copy", "cache"], time.monotonic() + 60, tmp_path)
    assert {part["error"] for part in found["parts"].values()} == {"status 1: limits: memory to read: out of memory"}


def timed(us: float, **values: Any) -> dict[str, Any]:
    return {**values, "us": us, "best_us": us / 2}


GB = 10**9
PARTS = {
    "copy": [
        timed(1e6, table="ceilings", what="copy", hint="plain", grid="resident", bytes=2000 * GB),
        timed(1e6, table="ceilings", what="copy", hint="streaming", grid="resident", bytes=4000 * GB),
        timed(1e6, table="ceilings", what="read", hint="plain", grid="resident", bytes=3000 * GB),
        timed(1e6, table="in flight", rows=4, blocks_per_sm=2, bytes=3000 * GB),
        {"table": "in flight", "rows": 4, "blocks_per_sm": 3, "error": "wrong result: 1 of 9 vectors"},
        *(timed(waves * (1 + 0.25 * rows), table="waves", rows=rows, waves=waves) for rows, waves in ((4, 8), (8, 4))),
    ],
    "resident": [
        timed(1e6, table="copies", mib=13, bytes=4000 * GB),
        timed(1e6, table="tensors", schedule="block", mib=13, blocks_per_sm=2, threads=256, bytes=3000 * GB),
        *(
            timed(waves * (fixed + 0.5 * rows), table="rows", schedule=schedule, rows=rows, waves=waves)
            for schedule, fixed in (("block", 2.0), ("cluster of 2", 3.5))
            for rows, waves in ((2, 100), (4, 50), (28, 7))
        ),
    ],
    "barriers": [
        timed(0.5, what="counter barrier", team=16, blocks_per_sm=1, threads=512, sleep_ns=20),
        timed(0.25, what="counter barrier", team=16, blocks_per_sm=2, threads=256, sleep_ns=0),
        timed(0.75, what="counter barrier", team=132, blocks=132, blocks_per_sm=1, threads=512, sleep_ns=20),
        timed(1.5, what="exchange in a cluster", team=8, blocks_per_sm=1, threads=512, channels=64),
    ],
    "slices": [
        timed(100, what="read", pitch=512, slice=64, bytes=GB),
        timed(80, what="read", pitch=512, slice=512, bytes=GB),
    ],
}


def write(folder: Path, parts: dict[str, Any] = PARTS) -> Path:
    about = {"name": "GPU", "driver": "1.2", "nvcc": "V13", "architecture": "sm_90", "date": "2000-01-01"}
    device = {"compute_capability": "9.0", "multiprocessors": 132, "l2_bytes": 50 << 20, "samples": 11}
    path = folder / "limits.json"
    found = {name: {"figures": figures, "complete": True, "seconds": 1.0} for name, figures in parts.items()}
    found["cache"] = {"figures": [], "complete": False, "error": "status 1: limits: lost"}
    path.write_text(run.as_text({"run": about, "device": device, "parts": found}))
    return path


def test_tables(tmp_path: Path) -> None:
    """By hand: GB/s, shares, the lines through waves."""
    lines = [" ".join(line.split()) for line in report.report(write(tmp_path), markdown=False).splitlines()]
    assert "GPU, compute capability 9.0, 132 multiprocessors, 50 MiB of L2" in lines
    assert "copy, streaming 4000 (8000)" in lines
    assert "4 75% -" in lines  # of the best copy, not of the read
    assert "2 x 256, block 75%" in lines
    assert "counter barrier, 16 blocks 500" in lines
    assert "counter barrier, 16 blocks, no sleep 250" in lines
    assert "counter barrier, whole grid 750" in lines
    assert "exchange in a cluster, 8 blocks, 64 channels 1500" in lines
    assert "read, 64 bytes 80%" in lines
    assert "a read, three blocks per multiprocessor 1.00 0.250 4.0" in lines
    assert "resident: block 2.00 0.500 4.0 0.0" in lines
    assert "resident: cluster of 2 3.50 0.500 7.0 3.0" in lines
    assert lines[lines.index("Missing") + 1 :] == [
        "- copy, figures without a value: 1, wrong result: 1 of 9 vectors",
        "- cache: status 1: limits: lost",
    ]


def test_a_line_for_each_figure(tmp_path: Path) -> None:
    text = write(tmp_path).read_text()
    assert json.loads(text)["parts"]["slices"]["figures"] == PARTS["slices"]
    assert sum('"us"' in line for line in text.splitlines()) == sum(
        "us" in figure for figures in PARTS.values() for figure in figures
    )


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"benchmarks": []}')
    with pytest.raises(FileError, match=r"was not written by benchmarks.device_limits"):
        report.report(path, markdown=False)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert command.main([]) == 2
    assert "there is no GPU to measure: nvidia-smi could not be run" in capsys.readouterr().err


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """But for nvidia-smi, nvcc and the GPU; and once more from the file, as Markdown."""
    program = tmp_path / "program"
    lines = [
        {"part": "device", "compute_capability": "9.0", "multiprocessors": 132, "l2_bytes": 50 << 20, "samples": 11}
    ]
    for name, figures in PARTS.items():
        lines += [{"part": name, "begins": True}, *({"part": name} | figure for figure in figures)]
        lines += [{"part": name, "ends": True, "complete": True, "seconds": 1.0}]
    (tmp_path / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines))
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/lines\n")
    program.chmod(0o755)
    monkeypatch.setattr(run, "find_gpu", lambda: run.Gpu("GPU", "1.2", "sm_90"))
    monkeypatch.setattr(run, "compile_program", lambda *_: (program, "V13"))
    path = tmp_path / "folder" / "limits.json"
    assert command.main(["--json", str(path), "--parts", *PARTS]) == 0
    assert "copy, streaming" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["run"]["name"] == "GPU"
    assert found["parts"].keys() == PARTS.keys()
    assert command.main(["--markdown", str(path)]) == 0
    assert "| 2 x 256, block" in capsys.readouterr().out
