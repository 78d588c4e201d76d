"""The benchmark of whole models: what it refuses, counts, leaves out and takes up again, and its report."""

import gc
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import SIZE, Run, cost, tiny
from torch import nn

from benchmarks.cells import FileError, unfinished
from benchmarks.inputs import LAYOUTS
from benchmarks.training import __main__ as training
from benchmarks.training import budget, group
from benchmarks.training import report as training_report
from benchmarks.training.budget import Budget, TimeUpError, time_limit
from benchmarks.training.group import LEAST_BATCH, NO_TIME
from benchmarks.training.models import MODELS
from benchmarks.training.run_file import Group, OtherRunError
from benchmarks.training.trainee import VARIANTS, Trainee, Variant, draw

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
EAGER = [name for name, variant in VARIANTS.items() if not variant.compiled]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The benchmark with tiny models, on the CPU, into a file of its own."""
    for name in ("tiny", "other"):
        monkeypatch.setitem(MODELS, name, tiny)
    monkeypatch.setattr(training, "MODELS_IN_ORDER", ("tiny", "other"))
    monkeypatch.setattr(training.machine, "best_device", lambda: torch.device("cpu"))
    gc.freeze()  # the benchmark collects garbage often: this way, only its own
    yield Run(tmp_path / "training.json")
    gc.unfreeze()


def test_all_models_have_a_place_in_the_order() -> None:
    assert sorted(training.MODELS_IN_ORDER) == sorted(MODELS)
    assert sorted(training.LAYOUTS_IN_ORDER) == sorted(LAYOUTS)


def test_most_telling_groups_come_first() -> None:
    setting, groups = training.resolve(training.parse([]), torch.device("cuda"))
    assert groups[:2] == [Group("resnet50", "bfloat16", "channels_last"), Group("resnet50", "bfloat16", "contiguous")]
    assert [each.dtype for each in groups] == ["bfloat16"] * 8 + ["float32"] * 8
    assert (setting.batch, setting.size, setting.variants) == (256, 224, list(VARIANTS))


# By hand. Kept are: what convolution and ReLU give, 2 x 4 x 16 x 16 values each (the pool needs only the shape of what
# it is given); two statistics per channel; what the pool gives, (2, 4); the logarithms of the softmax, (2, 1000), and
# the sum of the labels' weights. Under autocast also copies in bfloat16: of images and weights.
SAVED = {
    "float32": 2 * 2048 * 4 + 2 * 4 * 4 + 8 * 4 + 2000 * 4 + 4,
    "bfloat16": 2 * 2048 * 2 + 2 * 4 * 4 + 8 * 2 + 2000 * 4 + 4 + 2 * (2 * 3 * 18 * 18 + 4 * 27 + 4 * 1000),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", training.DTYPES_IN_ORDER)
def test_bytes(dtype: str, layout: str, run: Run) -> None:
    (found,) = run("--variants", "converted", "--dtypes", dtype, "--layouts", layout)["groups"]
    stock, converted = (found["variants"][variant] for variant in ("stock", "converted"))
    assert stock["saved_bytes"] == SAVED[dtype]
    assert converted["saved_bytes"] == SAVED[dtype] + 2 * 4 * 4  # four vectors per channel, not two
    parameters = 4 * (4 * 27 + 2 * 4 + 5 * 1000)
    # Momentum too; the batch; buffers with an int64 count.
    assert stock["resident_bytes"] == 2 * parameters + 4 * 2 * 3 * 18 * 18 + 2 * 8 + 2 * 4 * 4 + 8
    assert stock["peak_bytes"] >= stock["resident_bytes"] + SAVED[dtype]
    rows = training_report.report(run.path, markdown=True).splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("| tiny")] == ["tiny, stock", "tiny, converted"]


@pytest.mark.slow
def test_every_device(device: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU does is done there too: the allocator's count, the search for convolutions, kernels' times."""
    monkeypatch.setattr(training.machine, "best_device", lambda: torch.device(device))
    searching = []
    measure = training.measure
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(
        training, "measure", lambda *args: searching.append(torch.backends.cudnn.benchmark) or measure(*args)
    )
    groups = run("--variants", *EAGER, "--dtypes", *training.DTYPES_IN_ORDER, "--layouts", *LAYOUTS)["groups"]
    assert searching == [True] * 4
    assert not torch.backends.cudnn.benchmark
    assert len(groups) == 4
    for found in groups:
        assert list(found["variants"]) == EAGER
        assert not found["left_out"]
        for variant in found["variants"].values():
            assert 0 < variant["saved_bytes"] < variant["peak_bytes"] - variant["resident_bytes"]
            assert variant["profile"]["seconds"]["batch norm"] > 0
            assert variant["seconds"]["min"] <= variant["seconds"]["low"] <= variant["seconds"]["median"]


def test_bytes_of_a_gpu_are_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 bytes before the step, 6000 after forward, the loss among them, and 9000 at most."""
    monkeypatch.setitem(MODELS, "tiny", tiny)
    this = Trainee("tiny", "stock", draw(2, SIZE, torch.device("cpu"), "contiguous"), "contiguous", torch.float32)
    this.step()
    resident = this.resident_bytes()
    this.device = torch.device("cuda")
    allocated = iter([1000, 6000])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9000)
    wanted = {"saved_bytes": 5000 - 4, "peak_bytes": resident + 8000, "resident_bytes": resident}
    assert this.step_in_bytes() == wanted


def wrong(model: nn.Module) -> nn.Module:
    next(model.parameters()).register_hook(lambda gradient: gradient * (1 + 1e-6))
    return model


def test_wrong_gradients_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the group is timed, the other groups are, and the exit status tells."""
    prepare = VARIANTS["converted"].prepare
    models = iter([wrong, wrong, prepare, prepare])  # as they are timed, and in float64
    monkeypatch.setitem(VARIANTS, "converted", Variant(lambda model: next(models)(model)))
    run.models = ["tiny", "other"]
    assert run.main("--variants", "converted", "--dtypes", "float32", "--layouts", "contiguous") == 2
    assert [found["model"] for found in run.read()["groups"]] == ["other"]
    (left_out,) = run.read()["left_out"]
    words = r"failed: tiny, float32, contiguous, converted: gradients in float64: .* away from it, allowed: 1e-08"
    assert left_out["model"] == "tiny"
    assert re.fullmatch(words, left_out["reason"])
    output = capsys.readouterr()
    assert re.search(words, output.err)
    assert re.search(words, output.out)


def scaled(model: nn.Module) -> nn.Module:
    model[-1].weight.data.mul_(2)
    return model


def test_a_wrong_loss_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "converted", Variant(scaled))
    assert "converted: loss: " in run("--variants", "converted")["left_out"][0]["reason"]


def raises(error: Exception) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        raise error

    return prepare


@pytest.mark.parametrize(
    ("variant", "error", "reason"),
    [
        ("fused", torch.OutOfMemoryError("too much"), "left out, out of memory"),
        ("fused", RuntimeError("the kernel broke\nin line 3"), "RuntimeError: the kernel broke"),
        ("fused+compile", RuntimeError("no compiler"), "RuntimeError: no compiler"),
        ("fused+compile", torch.OutOfMemoryError("too much"), "left out, out of memory"),
        ("fused+compile", TimeUpError(), "left out, its compilation was broken off after 240 s"),
    ],
)
def test_a_variant_that_fails_is_named_and_the_others_are_timed(
    variant: str, error: Exception, reason: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, variant, VARIANTS[variant]._replace(prepare=raises(error)))
    (found,) = run("--variants", "converted", variant)["groups"]
    assert list(found["variants"]) == ["stock", "converted"]
    assert found["left_out"] == {variant: reason}
    assert list(found["cost_seconds"]["compiled"]) == [variant] * VARIANTS[variant].compiled
    text = training_report.report(run.path, markdown=False)
    assert f"{reason}:\n- tiny, float32, contiguous: {variant}" in text


def test_a_compiler_that_computes_something_else_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "stock+compile", Variant(scaled, compiled=True))
    (found,) = run("--variants", "converted", "stock+compile")["groups"]
    assert list(found["variants"]) == ["stock", "converted"]
    assert re.match(r"tiny, .*stock\+compile: loss: .* of stock's away", found["left_out"]["stock+compile"])


@pytest.fixture
def _quick_compiler(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    for name in ("stock+compile", "fused+compile"):
        prepare = VARIANTS[name.replace("+compile", "")].prepare
        compiled = Variant(lambda model, prepare=prepare: torch.compile(prepare(model), backend="aot_eager"), True)
        monkeypatch.setitem(VARIANTS, name, compiled)


@pytest.mark.usefixtures("_quick_compiler")
def test_compiled_models_join_the_turns(run: Run) -> None:
    (found,) = run("--variants", "fused", "stock+compile", "fused+compile", "--dtypes", "bfloat16")["groups"]
    assert list(found["variants"]) == ["stock", "fused", "stock+compile", "fused+compile"]
    assert len({variant["seconds"]["rounds"] for variant in found["variants"].values()}) == 1
    assert all(seconds > 0 for seconds in found["cost_seconds"]["compiled"].values())
    assert list(found["cost_seconds"]["compiled"]) == ["stock+compile", "fused+compile"]
    line = training_report.report(run.path, markdown=True).splitlines()
    (row,) = [each for each in line if each.startswith("| tiny, fused+compile")]
    assert row.split("|")[6].strip() == "-"  # a CPU does not tell what compiled code keeps


@pytest.mark.parametrize(
    ("fits", "tried"), [(LEAST_BATCH, [64, 32, 16]), (2 * LEAST_BATCH, [64, 32]), (0, [64, 32, 16])]
)
def test_half_the_batch_where_memory_runs_out(
    fits: int, tried: list[int], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all variants of the group; when there is no smaller one, the variant is left out."""
    batches = []

    class Attempt(group.Attempt):
        def make(self, variant: str) -> None:
            if variant == "fused":
                batches.append(self.batch)
                if self.batch > fits:
                    raise torch.OutOfMemoryError("too much")
            super().make(variant)

    monkeypatch.setattr(group, "Attempt", Attempt)
    (found,) = run("--batch", "64", "--variants", "fused")["groups"]
    assert batches == tried
    assert found["batch"] == tried[-1]
    assert found["out_of_memory_at"] == tried[:-1]
    assert list(found["variants"]) == (["stock", "fused"] if fits else ["stock"])
    text = training_report.report(run.path, markdown=False)
    assert f"tiny (batch {tried[-1]}), stock" in text
    assert "out of memory at batch size 64, so a smaller one:\n- tiny, float32, contiguous" in text


def test_stock_that_does_not_fit_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "stock", Variant(raises(torch.OutOfMemoryError("too much"))))
    assert run.main() == 2
    assert run.read()["groups"] == []
    assert run.read()["left_out"][0]["reason"] == "failed: OutOfMemoryError: too much"


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    return clock


def test_budget_expects_the_longest_so_far(clock: Clock) -> None:
    done: list[dict[str, Any]] = []
    left = Budget(60.0, done)
    assert left.has_time_for_group()  # nothing to judge it by
    done += [cost(50.0, stock=20.0, fused=10.0), cost(15.0)]
    assert (left.group(), left.compilation()) == (20.0, 20.0)
    clock.now += 40.0
    assert left.has_time_for_group()
    clock.now += 1.0
    assert not left.has_time_for_group()
    assert Budget(None, done).has_time_for_group()


def test_compiling_must_leave_time_for_the_other_groups(clock: Clock) -> None:
    left = Budget(100.0, [cost(50.0, stock=20.0, fused=10.0)])  # so 20 s for a group, 20 s for a compilation
    assert left.compile_limit(4) == 20.0
    assert left.compile_limit(1) == 80.0
    assert left.compile_limit(5) == 0.0
    clock.now += 1.0
    assert left.compile_limit(4) == 0.0
    assert Budget(None, []).compile_limit(16) == budget.LONGEST_COMPILATION


def test_time_limit_ends_what_catches_every_exception() -> None:
    def endless() -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    with pytest.raises(TimeUpError), time_limit(0.05):
        endless()


def test_nothing_is_started_that_does_not_fit(run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 50 s and groups of 20 s, two of four; the JSON is whole after each, and says what is missing."""
    written = []

    def measure(which: Group, setting: object, compile_limit: Callable[[str], float]) -> dict[str, Any]:
        so_far = json.loads(unfinished(run.path).read_text())
        written.append([len(so_far[key]) for key in ("groups", "left_out")])
        clock.now += 20.0
        seconds = dict.fromkeys(("median", "min", "max"), 1.0) | {"rounds": 3}
        found = {"batch": 2, "out_of_memory_at": [], "variants": {"stock": {"seconds": seconds}}, "left_out": {}}
        return which._asdict() | found | cost(20.0)

    monkeypatch.setattr(training, "measure", measure)
    content = run("--budget", "50", "--dtypes", *training.DTYPES_IN_ORDER, "--layouts", *LAYOUTS)
    assert written == [[0, 4], [1, 3]]
    assert [found["dtype"] for found in content["groups"]] == ["bfloat16", "bfloat16"]
    assert {(each["dtype"], each["reason"]) for each in content["left_out"]} == {("float32", NO_TIME)}
    assert f"{NO_TIME}:\n- tiny, float32, channels_last" in training_report.report(run.path, markdown=False)
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


@pytest.mark.slow
def test_a_run_is_taken_up_where_it_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()["groups"]
    again = []
    measure = training.measure
    monkeypatch.setattr(training, "measure", lambda which, *rest: again.append(which.model) or measure(which, *rest))
    run.models = ["tiny", "other"]
    groups = run("--resume")["groups"]
    assert again == ["other"]
    assert groups[0] == first[0]
    assert [found["model"] for found in groups] == ["tiny", "other"]
    assert len(run("--resume")["groups"]) == 2
    assert again == ["other"]
    run()
    assert again == ["other", "tiny", "other"]


def test_a_run_that_was_cut_off_is_taken_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had is there, and the file of an earlier run as it was."""
    run.models = ["tiny", "other"]
    measure = training.measure

    def cut_off(which: Group, *rest: Any) -> dict[str, Any]:
        if which.model == "other":
            raise KeyboardInterrupt
        return measure(which, *rest)

    run.path.write_text("{}")
    monkeypatch.setattr(training, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.path.read_text() == "{}"
    first = json.loads(unfinished(run.path).read_text())["groups"]
    monkeypatch.setattr(training, "measure", measure)
    groups = run("--resume")["groups"]
    assert [found["model"] for found in groups] == ["tiny", "other"]
    assert groups[:1] == first


@pytest.mark.parametrize(
    ("key", "value"), [("torch", "2.0.1"), ("name", "another"), ("sources", "0"), ("batch", 4), ("size", 32)]
)
def test_another_run_is_not_taken_up(key: str, value: object, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    content = run()
    was = content["run"][key]
    content["run"][key] = value
    run.path.write_text(json.dumps(content))
    with pytest.raises(OtherRunError, match=rf"{key} {value} there, {re.escape(str(was))} here\): leave --resume away"):
        run("--resume")
    assert run.main("--resume") == 2
    assert "leave --resume away to measure anew" in capsys.readouterr().err
    assert run.read() == content


@pytest.mark.parametrize("content", ["{", "[]", '{"run": {}}', '{"run": {}, "groups": [{}]}'])
def test_a_file_that_is_no_run_is_not_replaced(content: str, run: Run) -> None:
    run.path.write_text(content)
    with pytest.raises(OtherRunError, match="is not a run that can be gone on with"):
        run("--resume")
    assert run.path.read_text() == content
    with pytest.raises(FileError, match=r"not written by benchmarks\.training|not JSON"):
        training_report.report(run.path, markdown=False)
