"""The program of benchmarks/device_limits, on the simulated device: each figure is measured, and its result right."""

import functools
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device_limits import report, run
from cuda_on_cpu import build
from cuda_on_cpu.device import Device

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HERE = Path(__file__).parent
MULTIPROCESSORS = 4
MOST_BLOCKS = 3  # on a multiprocessor, whatever they need
# For which the simulated device has no room.
TOO_LARGE = {"no such team fits", "no such cluster fits"}
# That are there, with or without a value.
FIGURES = {"copy": 48, "launches": 117, "barriers": 108, "resident": 230, "cache": 40, "slices": 46}


@functools.cache
def library() -> Device:
    return Device(build.library([HERE / "device_limits_program.cpp"]))


@functools.cache
def lines_of(part: str, spoils: bool) -> list[dict[str, Any]]:
    """What the program prints."""
    device = library()
    device.reset()
    device.set_machine(MOST_BLOCKS * MULTIPROCESSORS, 227 << 10, MULTIPROCESSORS)
    device.set_order("priorities", seed=1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lines")
        device.call("limits_program", part, str(file), int(spoils))
        device.reset()
        return run.parsed(file.read_text())


def figures_of(part: str, spoils: bool = False) -> list[dict[str, Any]]:
    parts: dict[str, Any] = {}
    about: dict[str, Any] = {}
    run.gather(lines_of(part, spoils), "", parts, about)
    assert about["multiprocessors"] == MULTIPROCESSORS
    assert list(parts) == [part]
    assert parts[part]["complete"]
    return list(parts[part]["figures"])


@pytest.mark.slow
@pytest.mark.parametrize("part", run.PARTS)
def test_part(part: str) -> None:
    figures = figures_of(part)
    assert len(figures) == FIGURES[part]
    reasons = Counter(figure.get("error") for figure in figures)
    assert set(reasons) <= {None} | TOO_LARGE
    assert reasons[None] >= len(figures) / 2


def test_a_wrong_result_is_no_figure() -> None:
    wrong = [figure for figure in figures_of("copy", spoils=True) if "error" in figure]
    assert [(figure["what"], figure["hint"]) for figure in wrong] == [("copy", "driver")]
    assert wrong[0]["error"].startswith("wrong result: 1 of ")
    assert "us" not in wrong[0]


@pytest.mark.slow
def test_resident_tensors_fill_the_device() -> None:
    """Waves are full, and all but what is less than a row of each thread of a wave is what was asked for."""
    found = [figure for figure in figures_of("resident") if "rows" in figure and "error" not in figure]
    assert {figure["schedule"] for figure in found} >= {"block", "cluster of 8", "team of 4 in a grid"}
    for figure in found:
        kind, team = re.fullmatch(r"(\D+)(\d*).*", figure["schedule"]).groups()
        room = MULTIPROCESSORS * (MOST_BLOCKS if kind == "cluster of " else figure["blocks_per_sm"])
        blocks = room // int(team or 1) * int(team or 1)
        row = 2 * figure["waves"] * blocks * figure["threads"] * 16
        assert figure["bytes"] == figure["rows"] * row
        wanted = 2 * figure["mib"] << 11
        if figure["table"] == "rows":
            assert figure["rows"] in (2, 4, 8, 16, 28)
            assert wanted <= figure["bytes"] < wanted + figure["rows"] * 2 * blocks * figure["threads"] * 16
        else:
            assert figure["rows"] == 1 or abs(figure["bytes"] - wanted) <= row / 2


@pytest.mark.slow
def test_the_report_takes_what_the_program_prints(tmp_path: Path) -> None:
    parts: dict[str, Any] = {}
    device: dict[str, Any] = {}
    for part in run.PARTS:
        run.gather(lines_of(part, False), "", parts, device)
    about = {"name": "N", "driver": "D", "nvcc": "V", "architecture": "sm_90", "date": "2000-01-01"}
    for figure in (
        parts["cache"]["figures"] + parts["barriers"]["figures"]
    ):  # differences of times, which are alike here
        figure["us"] = 1.0
    path = tmp_path / "limits.json"
    path.write_text(run.as_text({"run": about, "device": device, "parts": parts}))
    text = report.report(path, markdown=True)
    for part, figures in FIGURES.items():
        assert figures > 0
        assert f"- {part}: " not in text, "a part is missing"
    for words in ("copy, streaming", "early, graph", "exchange in a cluster, 8 blocks, 64 channels", "2 x 256, block"):
        assert f"| {words} " in text
    assert "| resident: cluster of 4 " in text
    assert "| copy, resident " in text
    assert "| cudaOccupancyMaxActiveClusters, clusters of 8 " in text
    assert "| copy, 64 bytes " in text
    assert "| streaming copy backwards " in text
