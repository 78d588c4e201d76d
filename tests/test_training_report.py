"""Reports and pictures of whole models, from runs that are made here, and of the results that are there."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.training_runs import cost

from benchmarks.training import report as training_report

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def example(**more: Any) -> dict[str, Any]:
    """A run on a GPU with figures that are easy to reckon with."""

    def variant(seconds: float, peak: int, norm: float) -> dict[str, Any]:
        times = {
            "median": seconds,
            "low": seconds,
            "high": seconds,
            "min": seconds / 2,
            "max": 2 * seconds,
            "rounds": 5,
        }
        shares = {"seconds": {"batch norm": norm, "element-wise": 0.02, "other": 0.05}, "longest": []}
        size = {"saved_bytes": 3 << 20, "peak_bytes": peak << 20, "resident_bytes": 10 << 20}
        return {"off": {}, "seconds": times, "profile": shares} | size

    variants = {"stock": variant(0.1, 30, 0.03), "fused": variant(0.08, 25, 0.01), "converted": variant(0.11, 30, 0.03)}
    found = {"model": "resnet50", "dtype": "bfloat16", "layout": "channels_last", "batch": 256, "out_of_memory_at": []}
    found |= {"variants": variants, "left_out": {}} | cost(1.0)
    about = {"date": "2026-01-02", "device": "cuda", "name": "A GPU", "threads": 1, "torch": "2", "bn_ext": "1"}
    about |= {"instruction_set": "baseline", "allocator": "cuda caching", "cudnn": 9, "batch": 256, "size": 224}
    about |= {"tf32": {"convolutions": True, "matmul": False}, "quick": False}
    return {"run": about, "groups": [found], "left_out": []} | more


def test_report(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(example()))
    lines = [" ".join(line.split()) for line in training_report.report(path, markdown=False).splitlines()]
    start = lines.index("bfloat16, channels_last") + 3
    assert lines[start : start + 3] == [
        "resnet50, stock 2560 100% 100 50 to 200 3.0 100% 30.0 20.0 100% 30% 50%",
        "resnet50, fused 3200 125% 80 40 to 160 3.0 100% 25.0 15.0 75% 12% 38%",
        "resnet50, converted 2327 91% 110 55 to 220 3.0 100% 30.0 20.0 100% 30% 50%",
    ]
    assert lines[-2:] == [
        "more than 0.5% slower than stock, or compiled than compiled stock: 1 of 2",
        "- resnet50, bfloat16, channels_last, converted: 10.0% longer than stock",
    ]
    assert any("convolutions TF32, matmul float32" in line for line in lines)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/training*.json")), ids=lambda path: path.parent.name)
def test_results_give_a_report(path: Path) -> None:
    text = training_report.report(path, markdown=True)
    for found in training_report.load(path)["groups"]:
        assert all(f"| {found['model']}, {name} " in text for name in found["variants"])


@pytest.mark.slow
def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each dtype, none of them empty; a group without a profile or memory is drawn too."""
    pytest.importorskip("matplotlib")
    run = example()
    other = json.loads(json.dumps(run["groups"][0])) | {"dtype": "float32", "batch": 128}
    del other["variants"]["stock"]["profile"], other["variants"]["fused"]["peak_bytes"]
    path = tmp_path / "run.json"
    for groups, names in ([run["groups"], ["a.png"]], [[*run["groups"], other], ["a-bfloat16.png", "a-float32.png"]]):
        path.write_text(json.dumps(run | {"groups": groups}))
        assert training_report.main([str(path), "--plot", str(tmp_path / "a.png")]) == 0
        for name in names:
            picture = (tmp_path / name).read_bytes()
            assert picture.startswith(b"\x89PNG")
            assert len(picture) > 20_000
            assert name in capsys.readouterr().err
            break
    assert training_report.main([str(path), "--plot", str(tmp_path / "missing" / "a.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
