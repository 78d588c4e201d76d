"""Runs of the benchmarks: what is measured in which order, kept, gone on with, left out, and told."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench as bench_module
from benchmarks import dram, report, selection, targets
from benchmarks.bench import Bench, NotMeasuredError, Settings
from benchmarks.cells import Cell, FileError, Journal, Key, Timing, load, unfinished
from benchmarks.check import WrongResultError
from benchmarks.inputs import Case, make_inputs
from benchmarks.names import COMPILED, CUDNN_GRAPH, OURS, PROVIDERS, RIVAL, WITHOUT_CUDNN
from benchmarks.shapes import RESNET50

CPU = torch.device("cpu")
CASE = Case("small", (4, 3, 9, 7), "bfloat16", "channels_last", "batch_norm")
ABOUT = {
    "date": "2000-01-01",
    "device": "cpu",
    "name": "A",
    "threads": 1,
    "torch": "2",
    "bn_ext": "1",
    "sources": "0",
    "instruction_set": "baseline",
    "allocator": "default",
    "quick": True,
}


class Feed:
    """What pytest-benchmark's fixture is asked for."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}
        self.rounds = 0

    def pedantic(self, _: object, rounds: int) -> None:
        self.rounds = rounds


def settings(budget: float | None = None, providers: tuple[str, ...] = (RIVAL, OURS)) -> Settings:
    return Settings(CPU, providers, (2,), True, budget)


def small_bench(path: Path, resume: bool = False, **more: object) -> Bench:
    return Bench(Journal(path, dict(ABOUT), resume), settings(**more))


def cell(key: Key, seconds: dict[str, float], **more: object) -> Cell:
    sides = {name: Timing(each, each, each, each, 11, 1, 0.0) for name, each in seconds.items()}
    return Cell(key, 1_000_000, sides, 4.0, **more)


def test_a_cell_and_the_copy_beside_it(tmp_path: Path) -> None:
    bench = small_bench(tmp_path / "run.json")
    feed = Feed()
    bench.record(feed, CASE, "eval", OURS)
    kept = load(unfinished(tmp_path / "run.json")).cells[CASE.key("eval")]
    assert list(kept.sides) == [RIVAL, OURS]
    assert kept.bytes_min == 2 * 2 * 4 * 3 * 9 * 7
    assert kept.sides[OURS].rounds == feed.rounds >= 3
    assert kept.copy_gb_per_s > 0
    (copy,) = bench._copies
    assert torch.equal(copy(), make_inputs(CASE, CPU).x[0])


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    """Neither after a run that has ended nor after one that was cut off; and what is missing is."""
    path = tmp_path / "run.json"
    first = small_bench(path)
    first.record(Feed(), CASE, "eval", OURS)
    assert not path.exists()
    second = small_bench(path, resume=True)
    with pytest.raises(NotMeasuredError, match="measured before"):
        second.record(Feed(), CASE, "eval", OURS)
    second.record(Feed(), CASE, "forward", OURS)
    second.end()
    assert not unfinished(path).exists()
    assert [key.direction for key in load(path).cells] == ["eval", "forward"]
    assert load(path).cells[CASE.key("eval")] == first.journal.run.cells[CASE.key("eval")]
    with pytest.raises(NotMeasuredError, match="measured before"):
        small_bench(path, resume=True).record(Feed(), CASE, "forward", RIVAL)


def test_another_machine_or_build_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    journal = Journal(path, dict(ABOUT), False)
    journal.add(cell(CASE.key("eval"), {RIVAL: 1.0, OURS: 1.0}))
    journal.end()
    with pytest.raises(FileError, match=r"run\.json was measured with torch 2, and this is 3: leave --resume away"):
        Journal(path, ABOUT | {"torch": "3"}, True)
    assert not Journal(path, ABOUT | {"torch": "3"}, False).run.cells
    assert CASE.key("eval") in Journal(path, dict(ABOUT), True)


def test_the_budget(tmp_path: Path) -> None:
    bench = small_bench(tmp_path / "run.json", budget=1000.0)
    bench.record(Feed(), CASE, "eval", OURS)
    bench.deadline = 0.0
    for provider in (RIVAL, OURS):
        with pytest.raises(NotMeasuredError, match="the 1000 seconds of --budget are over"):
            bench.record(Feed(), CASE, "forward", provider)
    bench.record(Feed(), CASE, "eval", RIVAL)  # it is there
    bench.end()
    assert load(tmp_path / "run.json").about["over_budget"] == 1


def test_a_failing_rival_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench_module.make_subject

    def failing(provider: str, *rest: object) -> object:
        if provider == COMPILED:
            raise ValueError("no such thing\nand more of it")
        return make(provider, *rest)

    monkeypatch.setattr(bench_module, "make_subject", failing)
    bench = small_bench(tmp_path / "run.json", providers=(RIVAL, COMPILED, OURS))
    case = CASE._replace(name=selection.SAMPLE[0].name)
    bench.record(Feed(), case, "eval", OURS)
    with pytest.raises(NotMeasuredError, match=r"^ValueError: no such thing$"):
        bench.record(Feed(), case, "eval", COMPILED)
    kept = bench.journal.run.cells[case.key("eval")]
    assert list(kept.sides) == [RIVAL, OURS]
    assert kept.left_out == {COMPILED: "ValueError: no such thing"}


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival is left out; if it is bn_ext, the test of the case fails."""
    make = bench_module.make_subject

    def wrong(wanted: str):
        def subject(provider: str, *rest: object) -> object:
            made = make(provider, *rest)
            if provider == wanted:
                right = made.calls["eval"][0]
                made.calls["eval"][0] = lambda: right() * 1.1
            return made

        return subject

    for provider, error in ((RIVAL, NotMeasuredError), (OURS, WrongResultError)):
        monkeypatch.setattr(bench_module, "make_subject", wrong(provider))
        bench = small_bench(tmp_path / "run.json")
        with pytest.raises(error, match=f"{provider} is wrong on small .*: y in eval is .*; it is not timed"):
            bench.record(Feed(), CASE, "eval", provider)
        assert provider not in bench.journal.run.cells[CASE.key("eval")].sides


def test_the_most_telling_cases_first_on_a_gpu() -> None:
    cases = [case for case in selection.cases("cuda") if case.clock == "kernels"]
    assert len(set(cases)) == len(cases)
    assert {case.dtype for case in cases[:20]} == {"bfloat16"}
    shapes = {shape.name for shape in RESNET50}
    for dtype in ("bfloat16", "float32"):
        for batch in (32, 256):
            for operation in ("batch_norm", "bn+add+relu"):
                for layout in ("contiguous", "channels_last"):
                    wanted = (dtype, layout, operation)
                    found = {c.name for c in cases if (c.dtype, c.layout, c.operation) == wanted and c.size[0] == batch}
                    assert found == shapes
    batches = {case.size[0] for case in cases if len(case.size) == 4}
    assert batches == {32, 128, 256}
    assert {case.dtype for case in cases} == {"bfloat16", "float32", "float16"}


def test_batch_sizes_that_are_asked_for() -> None:
    for device in ("cpu", "cuda"):
        sizes = {case.size[0] for case in selection.cases(device, (7,)) if len(case.size) == 4}
        assert sizes <= {7, 32, 2}
        assert {c.size[0] for c in selection.cases(device, (7,)) if len(c.size) == 4 and c.clock == "kernels"} == {7}


def test_who_is_measured_on_what() -> None:
    large = Case(RESNET50[0].name, RESNET50[0].size(256), "bfloat16", "contiguous")
    assert selection.providers_of(large, PROVIDERS) == (RIVAL, COMPILED, OURS)
    last = large._replace(dtype="float32", layout="channels_last")
    assert selection.providers_of(last, PROVIDERS) == PROVIDERS
    other = last._replace(name=RESNET50[1].name)
    assert selection.providers_of(other, PROVIDERS) == (RIVAL, WITHOUT_CUDNN, OURS)
    assert selection.providers_of(last._replace(clock="calls"), PROVIDERS) == (RIVAL, WITHOUT_CUDNN, OURS)


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


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who can be measured without a GPU; then again, where nothing is left to do."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "run.json"
    arguments = ("--quick", "--json", path, "-k", "512x7x7 and bfloat16 and contiguous and batch_norm-backward")
    who = ("--providers", RIVAL, COMPILED, OURS)
    result = run(*arguments, *who)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bn_ext is slower in" in result.stdout
    (only,) = load(path).cells.values()
    assert list(only.sides) == [RIVAL, COMPILED, OURS]
    again = run(*arguments, *who, "--resume")
    assert again.returncode == 0
    assert load(path).cells == {only.key: only}
    other = run(*arguments, *who, "--resume", "--default-allocator")
    assert other.returncode == 2
    assert "was measured with allocator heap kept, and this is default: leave --resume away" in other.stdout
    assert "benchmarks: no report" in other.stderr


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
"3","7","spin_kernel(long)","(1, 1, 1)","32","0"
"4","7","spin_kernel(long)","(1, 1, 1)","32","0"
"5","7","triton_per_fused_0","(512, 1, 1)","7","8"
"6","7","spin_kernel(long)","(1, 1, 1)","32","0"
==PROF== Disconnected from process 7
"""


def test_bytes_that_ncu_counts() -> None:
    """Kernels between two marks are one call's; nothing outside is counted."""
    assert dram.counted(NCU) == [
        {"kernels": 2, "read": 1500, "written": 1000},
        {"kernels": 1, "read": 7, "written": 8},
    ]
    with pytest.raises(FileError, match=r"ncu printed no table; its last words: .*==ERROR== no permission"):
        dram.counted("==PROF== Connected\n==ERROR== no permission")
