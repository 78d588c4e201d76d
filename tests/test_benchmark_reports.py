"""Reports and plots of the benchmarks, from files that are made here: what they tell, and what they refuse."""

import contextlib
import json
import os
import select
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cells import ABOUT, cell

from benchmarks import dram, report, selection, targets
from benchmarks.cells import Cell, FileError, Journal, Key, load
from benchmarks.names import COMPILED, CUDNN_GRAPH, OURS, RIVAL, WITHOUT_CUDNN


def write_run(path: Path, about: dict[str, object], cells: list[Cell]) -> None:
    journal = Journal(path, ABOUT | about, False)
    for each in cells:
        journal.add(each)
    journal.end()


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_report_keeps_operations_apart(tmp_path: Path) -> None:
    """Plain batch norm has its tables and mean, each other operation its own."""
    key = Key("batch_norm", "stem", (2, 8, 9, 9), "float32", "contiguous", "eval", "kernels")
    cells = [
        replace(cell(key, {RIVAL: 3.0, OURS: 1.0}), bytes_min=3_000_000_000),
        cell(key._replace(operation="bn+relu"), {RIVAL: 1.0, OURS: 2.0}),
    ]
    write_run(tmp_path / "run.json", {"copy_gb_per_s": [1.0], "page_faults_per_64_mib": 0}, cells)
    lines = words(report.report(tmp_path / "run.json", markdown=False))
    assert lines[lines.index("float32, contiguous, eval") + 3] == "stem 3000.000 1000.000 3.00 3.00 3.0 4.0 75%"
    for title, mean in {"Geometric means": "all 1 cases 3.00", "Geometric means: bn+relu, eval": "0.50"}.items():
        assert mean in lines[lines.index(title) + 4]
    assert lines[-2:] == ["bn_ext is slower in 1 of 2 cases", "- stem bn+relu float32 contiguous eval: 0.50"]


def test_report_of_a_cpu_with_torch_compile(tmp_path: Path) -> None:
    """By hand: ratios 0.5 and 2 in one group, so 1.00; a run without torch.compile has none of it."""
    key = Key("batch_norm", "stem", (2, 8, 9, 9), "float32", "contiguous", "eval", "kernels")
    cells = [
        cell(key, {RIVAL: 3.0, COMPILED: 0.5, OURS: 1.0}),
        cell(key._replace(case="other"), {RIVAL: 3.0, COMPILED: 4.0, OURS: 2.0}),
        cell(key._replace(operation="bn+relu"), {RIVAL: 3.0, OURS: 1.0}, left_out={COMPILED: "no compiler"}),
    ]
    about = {"copy_gb_per_s": [1.0], "page_faults_per_64_mib": 0, "unavailable": {CUDNN_GRAPH: "no GPU"}}
    write_run(tmp_path / "run.json", about, cells)
    lines = words(report.report(tmp_path / "run.json", markdown=False))
    at = lines.index("Against torch.compile")
    assert lines[at + 1] == "case torch.compile ms bn_ext ms ratio of best"
    assert lines[at + 3 : at + 5] == [
        "float32, contiguous, eval: stem 500.000 1000.000 0.50 0.50",
        "float32, contiguous, eval: other 4000.000 2000.000 2.00 2.00",
    ]
    at = lines.index("Geometric means against torch.compile")
    assert lines[at + 3] == "float32, contiguous, eval 1.00 0.50 stem"
    assert lines[-3:] == ["", "Not measured", "torch.compile: no compiler (cells: 1)"]
    eager = [replace(each, sides={name: each.sides[name] for name in (RIVAL, OURS)}, left_out={}) for each in cells]
    write_run(tmp_path / "eager.json", about, eager)
    text = report.report(tmp_path / "eager.json", markdown=False)
    assert COMPILED not in text
    assert words(text) == [
        *lines[: lines.index("Against torch.compile") - 1],
        "",
        "bn_ext is slower in 0 of 3 cases",
    ]


GPU = {
    "device": "cuda",
    "name": "a GPU",
    "driver": "1",
    "cuda": "13",
    "copy_gb_per_s": [3990.0, 4000.0],
    "over_budget": 7,
    "unavailable": {CUDNN_GRAPH: "there is no package"},
}


def gpu_cells() -> list[Cell]:
    """By hand: a large tensor at 75 % of the copy and behind one rival, a small one that is not fast enough."""
    large = Key("batch_norm", "stem_64x112x112", (256, 64, 112, 112), "bfloat16", "contiguous", "forward", "kernels")
    small = large._replace(case="layer4_512x7x7", shape=(32, 512, 7, 7))
    call = small._replace(clock="calls")
    return [
        replace(cell(large, {RIVAL: 8e-4, OURS: 1e-4, COMPILED: 9e-5}), bytes_min=300_000_000),
        cell(small, {RIVAL: 2e-5, WITHOUT_CUDNN: 1.25e-5, OURS: 1e-5}, left_out={COMPILED: "it is ill"}),
        cell(call, {RIVAL: 3e-5, OURS: 2e-5}),
    ]


def test_report_of_a_gpu(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", GPU, gpu_cells())
    lines = words(report.report(tmp_path / "run.json", markdown=False))
    # sqrt(8 * 1.25) against the faster of torch's two ways; 0.9 in the one case with a compiler.
    mean = "bfloat16 contiguous, forward 4: missed, 3.16 (least 1.25, of 2) 1.4: missed, 0.90 (least 0.90, of 1)"
    assert mean in lines
    at = lines.index("A rival is ahead in 1 of 2 cases")
    assert "N=256 stem_64x112x112: torch.compile takes 0.90 of bn_ext's time" in lines[at + 1]
    at = lines.index("Contiguous, 100 MB and more: 1 of 1 cases are below 85% of the copy of large tensors")
    assert lines[at + 1].endswith("stem_64x112x112: 75%")
    at = next(i for i, line in enumerate(lines) if line.startswith("Planes of 14 x 14 and less at N = 32: 1 of 1"))
    assert lines[at + 1].endswith("layer4_512x7x7: 0.80")
    assert "N=256 stem_64x112x112 100.0 3000 75% 800.0 (8.00) - 90.0 (0.90)" in lines
    assert "N=32 layer4_512x7x7 10.0 100 2% 20.0 (2.00) 12.5 (1.25) -" in lines
    assert "N=32 layer4_512x7x7 bfloat16 contiguous forward 20.0 30.0 (1.50)" in lines
    assert "7 cells were not measured, because the time that was given was over" in lines
    assert lines[-2:] == [f"{CUDNN_GRAPH}: there is no package", f"{COMPILED}: it is ill (cells: 1)"]


def test_plot_of_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    write_run(tmp_path / "run.json", GPU, gpu_cells())
    run = load(tmp_path / "run.json")
    assert plot.chosen(run) == ("bfloat16", 256)
    assert report.main([str(tmp_path / "run.json"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    write_run(path, GPU, gpu_cells())
    monkeypatch.setitem(sys.modules, "benchmarks.plot", None)
    monkeypatch.delattr("benchmarks.plot", raising=False)
    assert report.main([str(path), "--plot", str(tmp_path / "plot.png")]) == 2
    assert "pictures need matplotlib" in capsys.readouterr().err


def test_targets_are_each_about_something() -> None:
    """Every target has cells among those that are measured."""
    measured = {
        (c.dtype, c.layout, c.operation, direction)
        for c in selection.cases("cuda")
        for direction in selection.directions(c)
    }
    for target in targets.TARGETS:
        for dtype in target.dtypes:
            for layout in target.layouts:
                assert {(dtype, layout, target.operation, direction) for direction in target.directions} <= measured


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ('{"cells": [{}]}', "was not written by this suite"),
        (json.dumps({"run": ABOUT, "cells": []}), "holds no case with both torch.nn and bn_ext"),
    ],
)
def test_files_that_cannot_be_reported_on(
    content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    assert sentence in capsys.readouterr().err


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Block Size","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","","byte","byte"
"0","7","spin_kernel(long)","(1, 1, 1)","32","0"
"1","7","void bn_ext::cuda::statistics_kernel<float>(int)","(512, 1, 1)","1,000","64"
"2","7","void bn_ext::cuda::apply_kernel<float>(int)","(512, 1, 1)","500","936"
"3","7","spin_kernel(long)","(1, 1, 1)","32","5"
"4","7","void reduce_kernel(int)","(512, 1, 1)","9,000","2,000"
"5","7","spin_kernel(long)","(1, 1, 1)","32","0"
"6","7","void something_else(int)","(1, 1, 1)","32","77"
"7","7","spin_kernel(long)","(1, 1, 1)","32","0"
"8","7","triton_per_fused_0","(512, 1, 1)","7","8"
"9","7","spin_kernel(long)","(1, 1, 1)","32","0"
"10","7","void reduce_kernel(int)","(512, 1, 1)","9,000","0"
"11","7","spin_kernel(long)","(1, 1, 1)","32","0"
==PROF== Disconnected from process 7
"""


def test_bytes_that_ncu_counts() -> None:
    """Kernels between two marks are one call's, and so are the writes, not the reads, of the read behind it."""
    assert dram.counted(NCU) == [
        {"kernels": 2, "read": 1500, "written": 3000},
        {"kernels": 1, "read": 7, "written": 8},
    ]
    with pytest.raises(FileError, match=r"ncu printed no table; its last words: .*==ERROR== no permission"):
        dram.counted("==PROF== Connected\n==ERROR== no permission")


def test_ncu_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    """A program that it profiles would hold the GPU."""
    started = tmp_path / "started"
    script = f"sleep 60 & echo $! > {started}; wait"
    with pytest.raises(FileError, match="ncu did not end within 1 seconds"):
        dram.output_of(["bash", "-c", script], 1.0)
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        end = os.pidfd_open(int(started.read_text()))
        assert select.select([end], [], [], 30) == ([end], [], [])


def test_what_ncu_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert dram.output_of(["bash", "-c", "echo table; echo words >&2"], 60.0) == "table\n"
    assert capsys.readouterr().err == "words\n"
