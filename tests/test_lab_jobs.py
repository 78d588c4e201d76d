"""The jobs of lab.measure, on the CPU in place of a GPU: which figures come of them."""

import json
from functools import partial
from typing import Any

import pytest
import torch

import bn_ext
from benchmarks.check import WrongResultError
from benchmarks.measure import Effort, Wall
from lab import measure, phases


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures on a GPU does so on the CPU, by the clock on the wall."""
    monkeypatch.setattr(measure, "prepare", lambda: torch.device("cpu"))
    monkeypatch.setattr("benchmarks.measure.Graph", Wall)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    short = Effort(seconds=0, min_rounds=2, max_rounds=2, round_seconds=1e-6)
    monkeypatch.setattr("benchmarks.bench.GPU_EFFORT", short)
    monkeypatch.setattr("benchmarks.measure.Effort", lambda **_: short)


def figures_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert measure.main(list(arguments)) == 0
    return [json.loads(text) for text in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("on_cpu")
def test_times_are_of_each_direction_and_operation(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures_of(capsys, "times", "--operations", "batch_norm,bn+add+relu", "512x7 NHWC N=2")
    names = [(each["direction"], each["operation"], each["quantity"]) for each in found]
    assert names == [
        (direction, *rest)
        for direction in ("forward", "backward")
        for rest in (
            ("batch_norm", "time"),
            ("batch_norm", "share of the copy"),
            ("bn+add+relu", "time"),
            ("bn+add+relu", "share of the copy"),
            ("bn+add+relu", "time, of batch_norm's"),
        )
    ]
    times = {name: each["value"] for name, each in zip(names, found, strict=True)}
    for direction in ("forward", "backward"):
        plain, fused = (times[direction, name, "time"] for name in ("batch_norm", "bn+add+relu"))
        assert times[direction, "bn+add+relu", "time, of batch_norm's"] == pytest.approx(fused / plain)


@pytest.mark.usefixtures("on_cpu")
def test_calls_stand_beside_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures_of(capsys, "calls", "512x7 NCHW N=2")
    assert [each["quantity"] for each in found] == ["time", "time, of torch's"] * 2
    assert all(each["value"] > 0 and each["operation"] == "call" for each in found)


@pytest.mark.usefixtures("on_cpu")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = torch.nn.functional.batch_norm
    monkeypatch.setattr("torch.nn.functional.batch_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    with pytest.raises(WrongResultError, match=r"torch\.nn"):
        measure.main(["calls", "512x7 NCHW N=2"])
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("on_cpu")
def test_the_clock_is_read_after_each_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Clock:
        """In the place of the extension: every phase takes a microsecond more than the one before."""

        clears = 0

        def bn_ext_clear_phase_times(self) -> int:
            Clock.clears += 1
            return 0

        def bn_ext_read_phase_times(self, found: Any) -> int:
            found[:8] = [1000 + 500 * i * (i + 1) for i in range(8)]
            return 0

    explain = partial(bn_ext.explain, device="H200")
    monkeypatch.setattr(phases, "library_of", lambda package: Clock())
    monkeypatch.setattr(bn_ext, "explain", lambda *arguments, device: explain(*arguments))
    found = figures_of(capsys, "clock", "512x7 NCHW N=2")
    assert Clock.clears == 2 * phases.CALLS
    assert [each["value"] for each in found[:7]] == [1, 2, 3, 4, 5, 6, 7]
    assert {each["direction"] for each in found} == {"forward", "backward"}
    assert {each["team"] for each in found} <= {"none", "block", "cluster", "grid"}
