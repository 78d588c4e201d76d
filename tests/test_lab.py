"""lab/: the plan fits into its time, what is measured is kept, and predictions stand beside it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dram import FileError
from lab import counters, first_minutes, phases, plan, report
from lab.cases import LEAST, case_of, least_bytes
from lab.plan import Run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_the_plan_fits_into_the_budget(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    """With time to spare; items in their order; nothing needs a GPU."""
    assert first_minutes.main(["--dry-run", "--json", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1][0]) for line in lines if line.startswith("item")] == [1, 2, 3, 4, 5, 6]
    assert "cut off" not in "".join(lines)
    spent, budget = map(int, re.findall(r"(\d+) s", lines[-1]))
    assert spent == round(sum(run.seconds for run in plan.all_runs()))
    assert spent <= 0.9 * budget == 0.9 * 480
    assert not results.exists()


def test_what_does_not_fit_is_said_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_minutes.main(["--dry-run", "--budget", "50", "--items", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [("cut off" in line) for line in lines if line.startswith("  ")] == [False, False, True, True, True]
    assert lines[-1] == "48 s of 50 s"


@pytest.mark.parametrize("budget", ["soon", "0", "-5", "nan", "inf", ""])
def test_unknown_budget_is_refused(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        first_minutes.main(["--dry-run", f"--budget={budget}"])
    assert refused.value.code == 2
    assert "the budget must be a positive number of seconds, got" in capsys.readouterr().err


def test_runs_are_told_apart() -> None:
    keys = [run.key for run in plan.all_runs()]
    assert len(set(keys)) == len(keys)


def test_switches_are_the_packages() -> None:
    """Every variable that lab sets is one that the package's source reads, or setup.py."""
    sources = [*(ROOT / "csrc").rglob("*.c*"), ROOT / "setup.py"]
    read = {name for path in sources for name in re.findall(r'get(?:env)?\("(BN_EXT_\w+)"', path.read_text())}
    named = {name for path in (ROOT / "lab").glob("*.py") for name in re.findall(r"BN_EXT_\w+", path.read_text())}
    assert {"BN_EXT_CUDA_TEAMS", "BN_EXT_PHASE_CLOCK"} <= named
    assert {name for run in plan.all_runs() for name in run.environment} <= set(plan.SWITCHES) <= named
    assert named - read == set()


def test_a_run_has_its_own_switches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.TEAMS, "none")
    monkeypatch.setenv("BN_EXT_CPU_CACHE_BYTES", "7")
    environment = first_minutes.environment_of(Run(6, "", "calls", (), 1, {plan.PDL: "0"}))
    switches = {name: environment[name] for name in plan.SWITCHES if name in environment}
    assert switches == {plan.PDL: "0"}
    assert environment["BN_EXT_CPU_CACHE_BYTES"] == "7"


CHILD = """
import signal, subprocess, sys, time
for i in range(3):
    print('{"quantity": "time", "unit": "us", "value": %d}' % i, flush=True)
print("other words", flush=True)
if "leave" in sys.argv:  # a child process that ignores interrupts, and measures something later
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    later = "import time; time.sleep(20); print('{\\"quantity\\": \\"time\\", \\"value\\": 3}')"
    subprocess.Popen([sys.executable, "-c", later])
if "hang" in sys.argv or "leave" in sys.argv: time.sleep(60)
sys.exit("fail" in sys.argv)
"""


KEPT = [("end", None), ("hang", "ended after 1 s"), ("leave", "ended after 1 s"), ("fail", "status 1")]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that measure nothing, and end as their job says."""
    monkeypatch.setattr(first_minutes, "command_of", lambda run: [sys.executable, "-c", CHILD, run.job])
    monkeypatch.setattr(first_minutes, "GRACE", 0.1)


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize(("job", "problem"), KEPT)
def test_what_is_measured_is_kept(job: str, problem: str | None, results: Path) -> None:
    """Whatever becomes of the process and its child processes; a run that ended well is not made again."""
    run = Run(2, "teams=none", job, (), 0.5, {plan.TEAMS: "none"})
    assert first_minutes.measure([run], 1.01, first_minutes.Results(results)) == []
    lines = report.read_lines(results)
    assert [line["value"] for line in lines if "value" in line] == [0, 1, 2]
    assert all((line["item"], line["run"]) == run.key for line in lines)
    assert lines[0]["environment"] == {plan.TEAMS: "none"}
    assert (lines[-1] == {"item": 2, "run": "teams=none", "done": True}) == (problem is None)
    assert problem is None or problem in lines[-1]["problem"]
    assert (run.key in first_minutes.Results(results).done()) == (problem is None)


@pytest.mark.usefixtures("children")
def test_what_is_next_is_said(results: Path) -> None:
    """A run that does not fit is not begun; one behind it that fits is."""
    runs = [Run(2, name, "end", (), seconds, {}) for name, seconds in (("a", 1), ("b", 1000), ("c", 2))]
    cut_off = first_minutes.measure(runs, 60, first_minutes.Results(results))
    assert [run.name for run in cut_off] == ["b"]
    words = first_minutes.what_is_next(cut_off, results)
    assert "item 2 (teams: none, block, cluster, grid) was cut off; next: b (1000 s)" in words
    assert f"--items 2 --json {results}" in words


def test_a_line_that_was_cut_off_is_left_out(results: Path) -> None:
    results.write_text('{"item": 1, "run": "marks", "done": true}\n{"item": 2, "ru')
    assert first_minutes.Results(results).done() == {(1, "marks")}
    assert plan.chosen([1, 2], first_minutes.Results(results).done())[0].item == 2


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert first_minutes.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_refuses_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], results: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no GPU on this machine" in refused("--json", str(results), capsys=capsys)
    assert not results.exists()


def test_refuses_without_the_phase_clock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], results: Path, tmp_path: Path
) -> None:
    """And says how to make it; a build without the clock is none."""
    monkeypatch.setattr(first_minutes, "check_gpu", lambda: None)
    monkeypatch.setattr(first_minutes, "find_package", lambda: phases.find_package(tmp_path))
    config = tmp_path / "lib.linux" / "bn_ext" / "_build_config.py"
    config.parent.mkdir(parents=True)
    config.write_text("PHASE_CLOCK = False\n")
    error = refused("--json", str(results), capsys=capsys)
    assert "BN_EXT_PHASE_CLOCK=1 python setup.py build --build-base build/phase_clock" in error
    assert "--items 2 3 4 5 6" in error
    config.write_text("PHASE_CLOCK = True\n")
    assert phases.find_package(tmp_path) == tmp_path / "lib.linux"


def test_without_ncu_times_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing() -> str:
        raise FileError("there is no ncu")

    monkeypatch.setattr("benchmarks.dram.find_ncu", find_nothing)
    runs = plan.chosen([3, 4])
    assert [(run.job, first_minutes.missing(run)) for run in runs] == [
        ("times", ""),
        ("counters", "skipped: there is no ncu"),
    ] * 2


def line(item: int, run: str, case: str, value: float, **about: Any) -> dict[str, Any]:
    return {"item": item, "run": run, "case": case, "unit": "us", "quantity": "time", "value": value} | about


def rows_of(*lines: dict[str, Any]) -> Iterator[list[str]]:
    return (report.row(each, report.read_predictions()) for each in lines)


def test_predicted_stands_beside_measured() -> None:
    """The ratio is to the mended code's prediction, if there is one, and 1 within bounds."""
    rows = rows_of(
        line(2, "teams=grid", "256x56 NCHW", 398.0, direction="forward"),
        line(2, "teams=none", "256x56 NCHW", 624.0, direction="forward"),
        line(2, "teams=none", "512x7 NCHW", 62.0, direction="forward", quantity="share of the copy", unit="%"),
        line(2, "teams=none", "512x7 NCHW", 30.5, direction="forward", quantity="share of the copy", unit="%"),
        line(2, "teams=block", "512x7 NCHW", 12.5, direction="forward"),
    )
    assert [row[2:] for row in rows] == [
        ["370", "199", "398", "2.00"],
        ["312", "-", "624", "2.00"],
        ["61-64", "-", "62", "1.00"],
        ["61-64", "-", "30.5", "0.50"],
        ["-", "-", "12.5", "-"],
    ]


def test_the_table_is_in_the_items_order() -> None:
    made = [
        line(6, "calls of CUDA", "", 3.0, quantity="launch"),
        {"machine": {}},
        line(1, "marks", "256x56 NCHW", 0.4, quantity="summed -> gathered", team="grid"),
        {"item": 3, "run": "counters", "problem": "skipped: there is no ncu"},
    ]
    lines = report.report(made).splitlines()
    assert lines[0].startswith("item, run, case")
    assert [each.split()[0] for each in lines[2:]] == ["1", "6", "item"]
    assert lines[-1] == "item 3, counters: skipped: there is no ncu"
    assert report.report([]) == "nothing was measured"


def test_predictions_are_of_runs_that_are_planned() -> None:
    """A name that no run has would never be found; each says what it is of, and from where."""
    runs = {(run.item, run.name): run for run in plan.all_runs()}
    for each in report.read_predictions():
        assert each["code"] in report.CODES
        assert each["source"]
        of = each["of"]
        matching = [run for run in runs.values() if run.item == of["item"] and of.get("run", run.name) == run.name]
        assert matching, of
        assert "case" not in of or any(of["case"] in run.arguments for run in matching), of


def test_labels_are_cases() -> None:
    labels = {word for run in plan.all_runs() for word in run.arguments if " N" in word}
    assert len(labels) > 5
    assert all(case_of(label).dtype == "bfloat16" for label in labels)
    case = case_of("512x7 NHWC N=32", "bn+add+relu")
    assert (case.size, case.layout) == ((32, 512, 7, 7), "channels_last")
    assert case_of("256x56 NCHW").size == (256, 256, 56, 56)
    with pytest.raises(ValueError, match="a label must be as"):
        case_of("256x57 NCHW")


def test_least_bytes_of_directions_add_up() -> None:
    """To those of benchmarks.operations, which has both directions together."""
    from benchmarks import operations

    for name in {name for name, _ in LEAST}:
        case = case_of("512x7 NCHW", name)
        both = sum(least_bytes(case, direction) for direction in ("forward", "backward"))
        assert both == operations.least_bytes(name, case.size, 2, "forward+backward")


def test_steps_of_the_phases() -> None:
    """Medians over what is complete; a slice that a block has not come to counts for nothing."""
    slice_ = [1000, 1100, 1900, 2500, 3000, 3200, 4000, 6000]
    times = [[[*slice_], [0] * 8, [0] * 8, [0] * 8], *[[[0] * 8] * 4] * 3]
    slower = [[[*slice_[:-1], 8000], [*slice_[:-1], 0], [0] * 8, [0] * 8], *[[[0] * 8] * 4] * 3]
    found = phases.steps([times, slower, slower])
    assert found["fetched -> summed"] == pytest.approx(0.6)
    assert found["summed -> gathered"] == pytest.approx(1.5)
    assert found["gathered -> written"] == pytest.approx(4.0)
    assert len(found) == 9
    assert phases.steps([]) == {}


def test_phases_are_those_of_the_kernels() -> None:
    header = (ROOT / "csrc" / "cuda" / "phase_clock.h").read_text()
    names = re.findall(r"^  k(\w+),", header, re.MULTILINE)
    assert [re.sub(r"(?<=.)([A-Z])", r" \1", name).lower() for name in names] == list(phases.PHASES)
    numbers = dict(re.findall(r"constexpr int k(\w+) = (\d+);", header))
    expected = {"Phases": len(phases.PHASES), "Clocks": phases.BLOCKS, "ClockedSlices": phases.SLICES}
    assert {name: int(number) for name, number in numbers.items()} == expected


def test_counters_are_of_the_longest_kernel() -> None:
    names = (counters.TIME, *counters.METRICS["cache"])

    def table_row(number: int, kernel: str, *values: str) -> str:
        return json.dumps([str(number), kernel, *values])[1:-1].replace('", "', '","')

    text = [table_row(0, "spin_kernel", "1", "0", "0"), table_row(1, "a", "5,000", "12.5", "700")]
    text += [table_row(2, "b", "900", "99", "1"), table_row(3, "spin_kernel", "1", "0", "0")]
    text += [table_row(4, "the read behind", "9,000", "1", "1"), table_row(5, "spin_kernel", "1", "0", "0")]
    header = ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *names))
    both = "\n".join([header, *text, *text])
    found = list(counters.figures(both, "cache", ["batch_norm"], ["256x56 NHWC"]))
    assert [(each["direction"], each["quantity"], each["value"], each["kernels"]) for each in found] == [
        (direction, *figure, 2)
        for direction in ("forward", "backward")
        for figure in (("L2 hit rate", 12.5), ("read from memory", 700.0))
    ]
