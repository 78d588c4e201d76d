"""What is measured, in which order, under which switches, and how long that takes: data, without torch."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 480.0
"""Seconds of a GPU that all items together may take."""
TEAMS, PDL, TUNING = "BN_EXT_CUDA_TEAMS", "BN_EXT_CUDA_PDL", "BN_EXT_CUDA_TUNING"
SWITCHES = (TEAMS, PDL, TUNING)

ITEMS = {
    1: "phase clock: how long a block takes from which mark to which",
    2: "teams: none, block, cluster, grid",
    3: "bn+relu against bn",
    4: "bn+add+relu: masks and residuals",
    5: "out of step, prefetch, half-chip teams, evict-last",
    6: "calls of the host",
}
# Channels x height, of ResNet-50's; bfloat16, N = 256 unless the label says another.
BOTH = ("256x56 NCHW", "512x28 NHWC")
SHAPES = (*BOTH, "1024x14 NCHW", "512x7 NCHW")
SPILLING = "256x56 NHWC"
SMALL = ("512x7 NCHW N=32", "512x14 NHWC N=32")


class Run(NamedTuple):
    """One child process."""

    item: int
    name: str  # tells it from other runs of the item
    job: str  # of lab.measure
    arguments: tuple[str, ...]
    seconds: float  # that it is expected to take, the start of Python included
    environment: dict[str, str]
    needs: str = ""  # "clock", "ncu" or "nvcc"

    @property
    def key(self) -> tuple[int, str]:
        """What a line of the results names it by."""
        return self.item, self.name


def times(item: int, name: str, labels: Iterable[str], operations: str = "batch_norm", **environment: str) -> Run:
    """Times of both directions; of several operations in turn."""
    labels = tuple(labels)
    seconds = 8 + 2.5 * len(labels) * len(operations.split(","))
    return Run(item, name, "times", ("--operations", operations, *labels), seconds, environment)


def counters(item: int, name: str, label: str, metrics: str, operations: str, **environment: str) -> Run:
    """What ncu counts in both directions."""
    arguments = ("--metrics", metrics, "--operations", operations, label)
    return Run(item, name, "counters", arguments, 25, environment, "ncu")


def tuning(name: str, labels: Iterable[str]) -> Run:
    """Item 5 with one setting of the switches."""
    return times(5, name, labels, **{TUNING: name})


def all_runs() -> Iterator[Run]:
    """All runs, the most telling first within each item."""
    yield Run(1, "marks", "clock", SHAPES, 30, {}, "clock")
    for team in ("grid", "none", "cluster", "block"):
        yield times(2, f"teams={team}", SHAPES, **{TEAMS: team})
    yield times(3, "in turn", BOTH[:1], "batch_norm,bn+relu")
    yield counters(3, "counters", BOTH[0], "issue", "batch_norm,bn+relu")
    yield times(4, "times", BOTH, "bn+add+relu")
    yield counters(4, "counters", BOTH[0], "issue", "bn+add+relu")
    yield times(5, "default", (*BOTH, SPILLING))
    for share in ("0", "0.5", "0.25", "1"):
        yield tuning(f"stagger=0,prefetch={share}", BOTH)
    yield tuning("stagger=1,prefetch=0", BOTH)
    for name in ("half_chip=always", "half_chip=0"):
        yield tuning(name, (BOTH[1], SPILLING))
    for name in ("evict_last=1", "evict_last=0"):
        yield tuning(name, (SPILLING,))
    for name in ("evict_last=1", "evict_last=0"):
        yield counters(5, f"{name}: counters", SPILLING, "cache", "batch_norm", **{TUNING: name})
    yield Run(6, "calls of CUDA", "program", (), 12, {}, "nvcc")
    for pdl in ("1", "0"):
        yield Run(6, f"pdl={pdl}", "calls", SMALL, 14, {PDL: pdl})


def chosen(items: Iterable[int], done: Iterable[tuple[int, str]] = ()) -> list[Run]:
    """The runs of some items, without those that are done."""
    wanted, done = set(items), set(done)
    return [run for run in all_runs() if run.item in wanted and run.key not in done]


def seconds_of(text: str) -> float:
    """A budget: a positive, finite number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (0 < seconds < math.inf):
        raise ValueError(f"the budget must be a positive number of seconds, got {text!r}")
    return seconds


def described(runs: Iterable[Run], budget: float) -> Iterator[str]:
    """The plan: a line for each run with the second at which it ends, and what does not fit."""
    spent, item = 0.0, 0
    for run in runs:
        if run.item != item:
            item = run.item
            yield f"item {item}: {ITEMS[item]}"
        fits = spent + run.seconds <= budget
        spent += run.seconds * fits
        settings = " ".join(f"{name}={value}" for name, value in run.environment.items())
        needs = f", needs {run.needs}" if run.needs else ""
        end = f"{spent:4.0f} s" if fits else "cut off"
        yield f"  {end:>7}  {run.name}: {run.job}, {run.seconds:.0f} s{needs}{'  ' + settings if settings else ''}"
    yield f"{spent:.0f} s of {budget:.0f} s"
