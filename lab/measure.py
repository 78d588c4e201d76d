"""One run of the plan, in a process of its own: `python -m lab.measure JOB ...` prints a JSON line for each figure."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Figures = Iterator[dict[str, Any]]


def figure(quantity: str, value: float, unit: str, **about: Any) -> dict[str, Any]:
    """A line of the results."""
    return {**about, "quantity": quantity, "value": value, "unit": unit}


def prepare() -> Any:
    """The GPU, and a stream that can be captured."""
    import torch

    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    return torch.device("cuda", torch.cuda.current_device())


def times(options: argparse.Namespace) -> Figures:
    """Microseconds of a call in a graph, its share of the copy's speed, and operations as multiples of the first."""
    import torch

    from benchmarks.bench import GPU_EFFORT
    from benchmarks.measure import Graph, Side, in_turns
    from benchmarks.names import OURS

    from .cases import DIRECTIONS, case_of, least_bytes, subjects

    device = prepare()
    for label in options.labels:
        torch.cuda.empty_cache()
        cases = {operation: case_of(label, operation) for operation in options.operations}
        made = {operation: subjects(case, device, (OURS,)) for operation, case in cases.items()}
        xs = made[options.operations[0]][1]
        copies = [partial(torch.empty_like(x, requires_grad=False).copy_, x.detach()) for x in xs]
        for direction in DIRECTIONS:
            sides: dict[str, Side] = {name: Graph(of[OURS].calls[direction], device) for name, (of, _) in made.items()}
            found = in_turns(sides, GPU_EFFORT, {"copy": Graph(copies, device)})
            seconds = {name: median(of.seconds) for name, of in found.items()}
            for operation, case in cases.items():
                about = {"case": label, "operation": operation, "direction": direction}
                yield figure("time", seconds[operation] * 1e6, "us", **about)
                speed = least_bytes(case, direction) / seconds[operation]
                share = speed / (2 * case.bytes / seconds["copy"])
                yield figure("share of the copy", share * 100, "%", **about)
                if operation != options.operations[0]:
                    ratio = seconds[operation] / seconds[options.operations[0]]
                    yield figure(f"time, of {options.operations[0]}'s", ratio, "x", **about)


def calls(options: argparse.Namespace) -> Figures:
    """Eager calls by the clock on the wall, beside torch's."""
    from benchmarks.measure import Effort, Wall, in_turns
    from benchmarks.names import OURS, RIVAL

    from .cases import case_of, subjects

    device = prepare()
    effort = Effort(seconds=1.5, min_rounds=31, max_rounds=1001, round_seconds=2e-3)
    for label in options.labels:
        made, _ = subjects(case_of(label, clock="calls"), device, (OURS, RIVAL))
        for direction in ("forward", "forward+backward"):
            found = in_turns({name: Wall(of.calls[direction], device) for name, of in made.items()}, effort)
            ours, theirs = (median(found[name].seconds) for name in (OURS, RIVAL))
            about = {"case": label, "operation": "call", "direction": direction}
            yield figure("time", ours * 1e6, "us", **about)
            yield figure("time, of torch's", ours / theirs, "x", **about)


def clock(options: argparse.Namespace) -> Figures:
    """Microseconds from mark to mark: medians over calls, clocked blocks and their first slices."""
    import torch

    import bn_ext
    from benchmarks.names import OURS

    from . import phases
    from .cases import DIRECTIONS, LAYOUTS, case_of, subjects

    device = prepare()
    reader = phases.Reader(phases.library_of(bn_ext))
    for label in options.labels:
        torch.cuda.empty_cache()
        case = case_of(label)
        made, _ = subjects(case, device, (OURS,))
        layout = torch.channels_last if case.layout == LAYOUTS["NHWC"] else torch.contiguous_format
        plan = bn_ext.explain(case.size, torch.bfloat16, layout, device=device)
        for direction in DIRECTIONS:
            noted = []
            for _ in range(phases.CALLS):
                reader.clear()
                made[OURS].calls[direction][0]()
                torch.cuda.synchronize()
                noted.append(reader.read())
            about = {"case": label, "operation": "batch_norm", "direction": direction}
            about["team"] = getattr(plan, direction).team
            for name, microseconds in phases.steps(noted).items():
                yield figure(name, microseconds, "us", **about)


def counters(options: argparse.Namespace) -> Figures:
    """What ncu counts in the longest kernel of a call."""
    from .counters import profile

    yield from profile(options.metrics, options.operations, options.labels)


def program(options: argparse.Namespace) -> Figures:
    """Calls of CUDA: lab/host_calls.cu."""
    from .counters import run_program

    yield from run_program(ROOT / "lab" / "host_calls.cu")


JOBS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    job.__name__: job for job in (times, calls, clock, counters, program)
}


def main(arguments: list[str] | None = None) -> int:
    """Do one job; every figure is printed as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m lab.measure")
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("labels", nargs="*")
    parser.add_argument("--operations", type=lambda text: text.split(","), default=["batch_norm"])
    parser.add_argument("--metrics", default="issue")
    parser.add_argument("--package", type=Path, help="folder with the bn_ext to measure; default: this checkout")
    options = parser.parse_intermixed_args(arguments)
    if options.package:
        sys.path.insert(0, str(options.package))
    for line in JOBS[options.job](options):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
