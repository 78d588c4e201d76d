"""Benchmarks with a number of threads: how torch gets it, where results go, and the gain of threads in the report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cells import ABOUT, cell

from benchmarks import __main__ as command
from benchmarks import machine, report, threads
from benchmarks.cells import Cell, FileError, Journal, Key
from benchmarks.names import OURS, RIVAL

KEY = Key("batch_norm", "stem", (2, 8, 9, 9), "float32", "contiguous", "eval", "kernels")
ABOUT_CPU = ABOUT | {"copy_gb_per_s": [1.0], "page_faults_per_64_mib": 0}


def write_run(path: Path, about: dict[str, object], cells: list[Cell]) -> Path:
    journal = Journal(path, ABOUT_CPU | about, False)
    for each in cells:
        journal.add(each)
    journal.end()
    return path


@pytest.mark.parametrize("count", [1, 5])
def test_torch_runs_with_the_threads_that_are_asked_for(count: int) -> None:
    """Also with more than there are cores, and whatever the environment had before."""
    environment = os.environ | {"MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"} | threads.environment(count)
    code = "import torch; print(torch.get_num_threads())"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout) == count


def test_pytest_is_started_with_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def run(_: list[str], env: dict[str, str], **more: object) -> subprocess.CompletedProcess[str]:
        seen.append(env)
        return subprocess.CompletedProcess([], 2)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    path = str(tmp_path / "run.json")
    for more in (["--threads", "7"], []):
        assert command.main(["--json", path, *more]) == 2
    assert [env["OMP_NUM_THREADS"] for env in seen] == ["7", "2"]


@pytest.mark.parametrize(
    ("device", "file"),
    [("cpu", "cpu-a-processor-7-threads/batch_norm-part.json"), ("cuda", "a-processor/batch_norm-7-threads-part.json")],
)
def test_runs_with_other_threads_have_files_of_their_own(
    device: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "best_device", lambda: torch.device(device))
    monkeypatch.setattr(machine, "device_name", lambda device: "A Processor")
    assert command.default_json(command.parse(["--threads", "7", "-k", "stem"])) == machine.RESULTS / file


def test_report_gives_the_gain_of_threads(tmp_path: Path) -> None:
    """By hand: bn_ext gains 2 and 8, so 4; torch.nn 3 in the one cell where both runs have it."""
    other_case, call = KEY._replace(case="other"), KEY._replace(clock="calls")
    alone = KEY._replace(dtype="bfloat16")
    few = [
        cell(KEY, {RIVAL: 3.0, OURS: 2.0}),
        cell(other_case, {OURS: 8.0}),
        cell(call, {RIVAL: 1.0, OURS: 1.0}),
        cell(alone, {RIVAL: 1.0, OURS: 1.0}),
    ]
    many = [cell(key, {RIVAL: 1.0, OURS: 1.0}) for key in (call, other_case, KEY)]
    one = write_run(tmp_path / "one.json", {"threads": 1}, few)
    four = write_run(tmp_path / "four.json", {"threads": 4}, many)
    lines = [" ".join(line.split()) for line in threads.report(four, one, markdown=False).splitlines()]
    assert lines[1] == "Gain of threads: time with 1 / time with 4, geometric means"
    assert lines[2] == "group bn_ext torch.nn cases"
    assert lines[4:] == [
        "batch_norm, float32, contiguous, eval 4.00 3.00 2",
        "batch_norm, float32, contiguous, eval, calls 1.00 1.00 1",
        "all 2.52 1.73 3",
    ]


def test_the_command_prints_the_gain_behind_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one.json", {"threads": 1}, [cell(KEY, {RIVAL: 3.0, OURS: 2.0})])
    two = write_run(tmp_path / "two.json", {"threads": 2}, [cell(KEY, {RIVAL: 2.0, OURS: 1.0})])
    assert report.main([str(two), "--beside", str(one)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(report.report(two, markdown=False))
    assert printed.endswith(threads.report(two, one, markdown=False) + "\n")


@pytest.mark.parametrize(
    ("about", "key", "sentence"),
    [
        ({"threads": 1, "name": "B"}, KEY, r"one\.json with name B: only threads may differ"),
        ({"threads": 1, "torch": "3"}, KEY, r"with torch 2, .*with torch 3: only threads may differ"),
        ({"threads": 1, "sources": "1"}, KEY, r"with sources 0, .*with sources 1: only threads may differ"),
        ({"threads": 2}, KEY, r"were both measured with 2 threads: there is no gain to show"),
        ({"threads": 1}, KEY._replace(case="other"), r"share no cell: nothing to compare"),
    ],
)
def test_runs_that_show_no_gain_are_refused(
    about: dict[str, object], key: Key, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence, and without the tables."""
    times = {RIVAL: 1.0, OURS: 1.0}
    one = write_run(tmp_path / "one.json", about, [cell(key, times)])
    two = write_run(tmp_path / "two.json", {"threads": 2}, [cell(KEY, times)])
    with pytest.raises(FileError, match=sentence):
        threads.report(two, one, markdown=False)
    assert report.main([str(two), "--beside", str(one)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
