"""What ncu counts in a call, and a program that times CUDA's own calls."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIRECTIONS = ("forward", "backward")
TIME = "gpu__time_duration.sum"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "issue": {
        "smsp__inst_executed.sum": "instructions",
        "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
        STALLED.format("long_scoreboard"): "stalled: long scoreboard",
        STALLED.format("wait"): "stalled: wait",
        STALLED.format("not_selected"): "stalled: not selected",
    },
    "cache": {"lts__t_sector_hit_rate.pct": "L2 hit rate", "dram__bytes_read.sum": "read from memory"},
}
UNITS = {".sum": "", ".pct": "%", "active": "%", ".ratio": "warps"}
SECONDS = 60.0


def profile(metrics: str, operations: list[str], labels: list[str]) -> Iterator[dict[str, Any]]:
    """Run `make_calls` under ncu."""
    from benchmarks.dram import ncu_command, output_of

    command = [*ncu_command((TIME, *METRICS[metrics])), sys.executable, "-m", "lab.counters"]
    text = output_of([*command, ",".join(operations), *labels], SECONDS)
    yield from figures(text, metrics, operations, labels)


def figures(text: str, metrics: str, operations: list[str], labels: list[str]) -> Iterator[dict[str, Any]]:
    """A line for each metric of each call, in the order of `make_calls`: of the call's longest kernel."""
    from benchmarks.dram import kernels_of_calls

    calls = [(label, operation, way) for label in labels for operation in operations for way in DIRECTIONS]
    for (label, operation, direction), (kernels, _) in zip(calls, kernels_of_calls(text), strict=True):
        about = {"case": label, "operation": operation, "direction": direction, "kernels": len(kernels)}
        longest = max(kernels, key=lambda kernel: number(kernel[TIME]))
        for metric, name in METRICS[metrics].items():
            unit = next(unit for end, unit in UNITS.items() if metric.endswith(end))
            yield about | {"quantity": name, "value": number(longest[metric]), "unit": unit}


def number(text: str) -> float:
    """A number of ncu's, whose thousands are set apart."""
    return float(text.replace(",", ""))


def make_calls(operations: list[str], labels: list[str]) -> None:
    """Make the calls that `figures` reads, each between two marks."""
    import torch

    from benchmarks.dram import FLUSH_BYTES, make_marked
    from benchmarks.names import OURS

    from .cases import case_of, subjects
    from .measure import prepare

    device = prepare()
    buffer = torch.zeros(FLUSH_BYTES // 4, device=device)
    for label in labels:
        for operation in operations:
            made, _ = subjects(case_of(label, operation), device, (OURS,))
            for direction in DIRECTIONS:
                make_marked(made[OURS].calls[direction][0], buffer)


def run_program(source: Path) -> Iterator[dict[str, Any]]:
    """Compile a program for this GPU, and pass on the JSON lines that it prints."""
    from benchmarks.device_limits.run import find_gpu
    from scripts.cuda_toolkit import find_nvcc

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / source.stem
        command = [str(find_nvcc()), "-O2", f"-arch={find_gpu().architecture}", "-o", str(program), str(source)]
        subprocess.run(command, check=True)
        output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    yield from map(json.loads, output.splitlines())


if __name__ == "__main__":
    make_calls(sys.argv[1].split(","), sys.argv[2:])
