"""The benchmark that trains to the end: what it calls noise, and that both variants are trained alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.convergence import __main__ as convergence
from benchmarks.convergence import report as convergence_report

PLAN = convergence.residual.Plan(steps=4, measure_every=2)


def training(seed: int, stock: float, fused: float, finite: bool = True) -> dict[str, Any]:
    """A training whose last measurement is a dip that does not count."""
    variants = {
        name: {"accuracy": [10.0, *[final] * 4, 50.0], "loss": [3.0, 2.0, 1.0, 1.0, 1.0, 1.0], "finite": finite}
        for name, final in (("stock", stock), ("fused", fused))
    }
    return {"dtype": "float32", "seed": seed, "steps": [10, 20, 30, 40, 50, 60], "variants": variants}


# Standard deviations of 2 each: chance alone explains 2.776 * sqrt((4 + 4) / 3) = 4.53.
@pytest.mark.parametrize(("apart", "close"), [(4.5, True), (-4.5, True), (4.6, False), (-4.6, False)])
def test_noise(apart: float, close: bool) -> None:
    trainings = [training(seed, 90.0 + 2 * seed, 90.0 + 2 * seed + apart) for seed in range(3)]
    said, verdict = convergence_report.verdict(trainings, test_images=450)
    assert verdict == close
    assert said.startswith("stock 92.00 % (standard deviation 2.00), fused ")
    assert said.endswith(f"{abs(apart):.2f} points apart, up to 4.53 is noise: {'' if close else 'NOT '}within noise")


def test_one_image_is_noise() -> None:
    """Where all seeds end alike, chance seems to explain nothing."""
    assert convergence_report.verdict([training(seed, 99.0, 99.0 + 100 / 450) for seed in range(3)], 450)[1]
    assert not convergence_report.verdict([training(seed, 99.0, 99.0 + 200 / 450) for seed in range(3)], 450)[1]


def test_what_is_not_finite_is_never_within_noise() -> None:
    said, close = convergence_report.verdict([training(seed, 99.0, 99.0, seed != 1) for seed in range(3)], 450)
    assert not close
    assert said.endswith("not finite")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", convergence.DTYPES)
def test_both_variants_are_trained_alike(dtype: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights and batches: the first losses differ by rounding only; in bfloat16 it is autocast's."""
    pytest.importorskip("sklearn")
    seen = []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *args: seen.append(forward(*args)) or seen[-1])
    digits = convergence.data.load(torch.device(device))
    found = convergence.train(dtype, 1, PLAN, digits)
    assert found["steps"] == [2, 4]
    losses = [found["variants"][name]["loss"] for name in ("stock", "fused")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4 if dtype == "float32" else 2e-2)
    assert all(len(variant["accuracy"]) == 2 and variant["finite"] for variant in found["variants"].values())
    assert {str(result.dtype) for result in seen} == {f"torch.{dtype}"}
    assert len(seen) == 2 * (4 + 2)  # in training and when measured


@pytest.mark.slow
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The budget, the files, the sentences and the exit status."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(convergence.machine, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(convergence, "train", lambda dtype, seed, *rest: training(seed, 90.0, 90.0) | {"dtype": dtype})
    path = tmp_path / "convergence.json"
    assert convergence.main(["--json", str(path), "--dtypes", "float32", "bfloat16"]) == 0
    text = capsys.readouterr().out
    for dtype in convergence.DTYPES:
        assert f"{dtype}, 60 steps, seeds 0, 1, 2: stock 90.00 %" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    assert convergence.main(["--json", str(path), "--budget", "-1"]) == 0
    assert [each["seed"] for each in json.loads(path.read_text())["left_out"]] == [0, 1, 2]
    assert "no time was left for float32, seed 2" in capsys.readouterr().out

    monkeypatch.setattr(convergence, "train", lambda dtype, seed, *rest: training(seed, 90.0, 80.0))
    assert convergence.main(["--json", str(path)]) == 1
    assert convergence_report.main([str(path)]) == 1
    path.write_text("{}")
    assert convergence_report.main([str(path)]) == 2
    assert "was not written by benchmarks.convergence" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(convergence.machine.RESULTS.glob("*/convergence.json")))
def test_results_are_within_noise(path: Path) -> None:
    text, close = convergence_report.report(json.loads(path.read_text()))
    assert close, text
