"""Runs of the benchmarks: what is measured in which order, kept, gone on with, left out, and told."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cells import ABOUT, cell

from benchmarks import bench as bench_module
from benchmarks import measure, selection
from benchmarks.bench import Bench, NotMeasuredError, Settings
from benchmarks.cells import FileError, Journal, load, unfinished
from benchmarks.check import WrongResultError
from benchmarks.inputs import Case, make_inputs
from benchmarks.names import COMPILED, OURS, PROVIDERS, RIVAL, WITHOUT_CUDNN
from benchmarks.providers import usual
from benchmarks.shapes import RESNET50

CPU = torch.device("cpu")
CASE = Case("small", (4, 3, 9, 7), "bfloat16", "channels_last", "batch_norm")


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
    case = CASE._replace(name=selection.SAMPLE_ON_CPU[0].name, size=(2, 3, 9, 7))
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


def test_what_is_compiled_has_the_largest_batch() -> None:
    assert selection.largest_batch("cuda", ()) == 256
    assert selection.largest_batch("cpu", ()) == 32
    assert selection.largest_batch("cuda", (8, 4)) == 8


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
    assert selection.providers_of(large, PROVIDERS, "cuda", 256) == (RIVAL, COMPILED, OURS)
    last = large._replace(dtype="float32", layout="channels_last")
    assert selection.providers_of(last, PROVIDERS, "cuda", 256) == PROVIDERS
    other = last._replace(name=RESNET50[1].name)
    uncompiled = (RIVAL, WITHOUT_CUDNN, OURS)
    assert selection.providers_of(other, PROVIDERS, "cuda", 256) == uncompiled
    assert selection.providers_of(last._replace(clock="calls"), PROVIDERS, "cuda", 256) == uncompiled


def test_a_cpu_compiles_for_few_cases() -> None:
    """Unless the run is a quick one: two shapes, both dtypes and layouts, with relu and without."""
    assert usual(CPU, quick=True) == (RIVAL, OURS)
    run = Settings(CPU, usual(CPU, quick=False), (8, 32), False, None)
    compiled = [case for case in selection.cases("cpu", run.batches) if COMPILED in run.providers_of(case)]
    assert {(case.name, case.size[0]) for case in compiled} == {("layer1_256x56x56", 32), ("layer4_512x14x14", 32)}
    assert {case.operation for case in compiled} == {"batch_norm", "bn+relu"}
    assert len(compiled) == 2 * 2 * 2 * 2


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who can be measured without a GPU; then again, where nothing is left to do."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "run.json"
    arguments = ("--quick", "--json", path, "-k", "512x14x14 and bfloat16 and contiguous and batch_norm-backward")
    who = ("--providers", RIVAL, COMPILED, OURS)
    result = run(*arguments, *who)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bn_ext is slower in" in result.stdout
    assert "Geometric means against torch.compile" in result.stdout
    (only,) = load(path).cells.values()
    assert list(only.sides) == [RIVAL, COMPILED, OURS]
    again = run(*arguments, *who, "--resume")
    assert again.returncode == 0
    assert load(path).cells == {only.key: only}
    other = run(*arguments, *who, "--resume", "--default-allocator")
    assert other.returncode == 2
    assert "was measured with allocator heap kept, and this is default: leave --resume away" in other.stdout
    assert "benchmarks: no report" in other.stderr


class FakeGraph:
    """Of torch.cuda's class: what is called while it is captured."""

    current: "FakeGraph | None" = None

    def __init__(self) -> None:
        self.calls = 0

    def capture_begin(self, pool: object) -> None:
        assert pool == "a pool"
        assert not gc.isenabled()
        FakeGraph.current = self

    def capture_end(self) -> None:
        FakeGraph.current = None


def test_a_graph_keeps_as_many_results_as_there_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that results are written to other memory until the inputs come round again."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    alive: set[int] = set()
    most = 0

    class Result:
        def __init__(self) -> None:
            nonlocal most
            if FakeGraph.current is not None:
                FakeGraph.current.calls += 1
                alive.add(id(self))
                most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    graph = measure.Graph([Result] * 3, CPU)
    assert graph.count == graph.graph.calls
    assert graph.count % 3 == 0  # all copies alike
    assert most in (3, 4)  # of which one is being made
    assert gc.isenabled()


def test_a_graph_that_cannot_be_captured_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the call's, not that of the capture which it has made invalid, and garbage is collected again."""
    ended: list[object] = []

    class Invalid(FakeGraph):
        def capture_end(self) -> None:
            FakeGraph.current = None
            raise RuntimeError("the capture is invalid")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Invalid)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *which: ended.append(which), raising=False)

    def call() -> None:
        if FakeGraph.current is not None:
            raise RuntimeError("not under capture")

    with pytest.raises(RuntimeError, match="not under capture"):
        measure.Graph([call], CPU)
    assert ended == [(0, "a pool")]
    assert gc.isenabled()


def test_a_case_that_cannot_be_made_fails_in_each_of_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is measured."""
    reference = bench_module.reference

    def full(case: Case, *rest: object) -> object:
        if case == CASE:
            raise torch.OutOfMemoryError("no room\nand more words")
        return reference(case, *rest)

    monkeypatch.setattr(bench_module, "reference", full)
    bench = small_bench(tmp_path / "run.json")
    for direction in ("forward", "backward"):
        with pytest.raises(WrongResultError, match=r"^small bfloat16 .*, N = 4: OutOfMemoryError: no room$"):
            bench.record(Feed(), CASE, direction, OURS)
    bench.record(Feed(), CASE._replace(dtype="float32"), "forward", OURS)
    assert [key.dtype for key in bench.journal.run.cells] == ["float32"]
