"""Measures the most uncertain parts of the kernels' model first, within a time budget: `python -m lab.first_minutes`.

Each run is a process of its own, so that switches of the environment hold for it alone and a hang costs its own time
only. Every figure is appended to the results as soon as it is there.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import plan
from .phases import MAKE, find_package
from .plan import ITEMS, ROOT, Run
from .report import read_lines, report

PATIENCE, LEAST = 2.0, 30.0  # a run is ended after so many times its expected seconds, but not before so many seconds
GRACE = 10.0  # seconds that a run has to end by itself when it is asked to


class RefusalError(Exception):
    """Nothing can be measured; the message says why, and what to do."""


def check_gpu() -> None:
    """There is a GPU, and bn_ext is built for it."""
    import torch

    import bn_ext

    if not torch.cuda.is_available():
        raise RefusalError("torch sees no GPU on this machine; --dry-run prints the plan without one")
    info = bn_ext.build_info()
    if not info.cuda:
        raise RefusalError(f"bn_ext has no CUDA kernels: {info.reason or info.cuda_reason}")
    if info.phase_clock:
        raise RefusalError("this checkout's build has the phase clock, which distorts times: build it without it")


def check_clock(runs: list[Run]) -> None:
    """The build with the phase clock is there, if it is needed."""
    if any(run.needs == "clock" for run in runs) and find_package() is None:
        others = " ".join(map(str, sorted({run.item for run in runs} - {1})))
        raise RefusalError(
            f"item 1 needs a build of its own with the phase clock; make it, before the GPU's time runs, with\n"
            f"  {MAKE}\nor leave the item out with --items {others}"
        )


def missing(run: Run) -> str:
    """What keeps a run from being made, if anything."""
    from benchmarks.cells import FileError
    from benchmarks.dram import find_ncu
    from scripts.cuda_toolkit import find_nvcc

    if run.needs == "nvcc" and find_nvcc() is None:
        return "skipped: no nvcc was found; set CUDA_HOME to the toolkit"
    try:
        if run.needs == "ncu":
            find_ncu()
    except FileError as error:
        return f"skipped: {error}"
    return ""


def command_of(run: Run) -> list[str]:
    """What does a run."""
    package = ["--package", str(find_package())] if run.needs == "clock" else []
    return [sys.executable, "-m", "lab.measure", run.job, *package, *run.arguments]


def environment_of(run: Run) -> dict[str, str]:
    """The environment with the run's switches and no others."""
    return {name: value for name, value in os.environ.items() if name not in plan.SWITCHES} | run.environment


def figures_of(command: list[str], environment: dict[str, str], seconds: float) -> Iterator[dict[str, Any]]:
    """The figures that a run prints, as they come; the last line is a problem, if there was one."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    assert process.stdout is not None

    def kill() -> None:
        """With all child processes, such as ncu, which would keep the GPU."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    over = threading.Timer(seconds, process.send_signal, [signal.SIGINT])
    much_over = threading.Timer(seconds + GRACE, kill)
    try:
        over.start()
        much_over.start()
        for text in process.stdout:
            if text.startswith("{"):
                yield json.loads(text)
        status = process.wait()
    finally:
        is_over = over.finished.is_set()
        over.cancel()
        much_over.cancel()
        if process.poll() is None:
            kill()
            process.wait()
    if is_over:
        yield {"problem": f"ended after {seconds:.0f} s"}
    elif status != 0:
        yield {"problem": f"failed with status {status}, see above"}


class Results:
    """The file: lines are appended, each whole and on disk before the next one is measured."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self) -> set[tuple[int, str]]:
        """Runs that have ended well, in this call or an earlier one."""
        return {(line["item"], line["run"]) for line in read_lines(self.path) if line.get("done")}


def measure(runs: list[Run], budget: float, results: Results) -> list[Run]:
    """Make the runs in turn; returns those for which no time was left."""
    end = time.monotonic() + budget
    cut_off = []
    for run in runs:
        about = {"item": run.item, "run": run.name}
        left = end - time.monotonic()
        if left < run.seconds:
            cut_off.append(run)
            continue
        reason = missing(run)
        if reason:
            results.append(about | {"problem": reason})
            continue
        print(f"item {run.item}, {run.name}: up to {run.seconds:.0f} s, {left:.0f} s left", flush=True)
        problem = False
        seconds = min(left, max(LEAST, PATIENCE * run.seconds))
        for line in figures_of(command_of(run), environment_of(run), seconds):
            problem = problem or "problem" in line
            results.append(about | line | {"environment": run.environment})
        if not problem:
            results.append(about | {"done": True})
    return cut_off


def what_is_next(cut_off: list[Run], path: Path) -> str:
    """What each item would have measured next, and how to go on."""
    lines = []
    for item in dict.fromkeys(run.item for run in cut_off):
        names = "; ".join(f"{run.name} ({run.seconds:.0f} s)" for run in cut_off if run.item == item)
        lines.append(f"item {item} ({ITEMS[item]}) was cut off; next: {names}")
    items = " ".join(map(str, dict.fromkeys(run.item for run in cut_off)))
    lines.append(f"to go on: python -m lab.first_minutes --items {items} --json {path}")
    return "\n".join(lines)


def about_machine() -> dict[str, Any]:
    """The first line of a file."""
    from benchmarks import machine

    return {"machine": machine.describe(machine.best_device())}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""

    def budget(text: str) -> float:
        try:
            return plan.seconds_of(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser = argparse.ArgumentParser(prog="python -m lab.first_minutes", description=str(__doc__).splitlines()[0])
    parser.add_argument("--budget", type=budget, default=plan.BUDGET, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--items", type=int, nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "first_minutes.jsonl", metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; needs no GPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the table; runs that the file holds already are not made again."""
    options = parsed(arguments)
    results = Results(options.json)
    runs = plan.chosen(options.items, results.done())
    if options.dry_run:
        print("\n".join(plan.described(runs, options.budget)))
        return 0
    try:
        check_gpu()
        check_clock(runs)
    except RefusalError as refusal:
        print(f"lab: {refusal}", file=sys.stderr)
        return 2
    results.append(about_machine())
    cut_off = measure(runs, options.budget, results)
    print(report(read_lines(options.json)))
    if cut_off:
        print(what_is_next(cut_off, options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
