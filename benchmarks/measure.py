"""Time some sides in turn, and hand the times to pytest-benchmark.

On a shared machine the speed of everything drifts within seconds, so a ratio means something only
if both sides were timed at the same moment. pytest-benchmark times one test after the other;
therefore the first test of a comparison times all providers here, round by round and in alternating
order, and each of its tests replays its provider's times: its timer is a clock (`Replay`) that
moves only when told to. Only `benchmark.pedantic` and the `timer` option are used.
"""

import gc
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .allocator import page_faults
from .providers import Call

GRAPH_CALLS = 32  # in one graph, unless fewer take
GRAPH_SECONDS = 5e-3
WARM_UP = 3


class Effort(NamedTuple):
    """How long to time one comparison."""

    seconds: float  # for all rounds of all sides, unless these would be fewer than min_rounds
    min_rounds: int
    max_rounds: int
    round_seconds: float  # least length of a round: shorter calls are repeated within it


class Side(Protocol):
    """One of the things that are timed in turn."""

    count: int
    """Calls that are made at a time, at the least."""

    def round(self, repeats: int) -> float:
        """Do all calls `repeats` times and return the seconds per call."""
        ...


class Wall:
    """Eager calls by the clock on the wall; on a GPU up to the end of the last kernel."""

    def __init__(self, calls: Sequence[Call], device: torch.device):
        self.calls = calls
        self.count = len(calls)
        self.cuda = device.type == "cuda"

    def round(self, repeats: int) -> float:
        """Do all calls `repeats` times and return the seconds per call."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            for call in self.calls:
                call()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (repeats * self.count)


class Graph:
    """A CUDA graph of many calls over the copies of the inputs: kernels without launch costs.

    The results of as many calls as there are copies are kept, so that results too are written to memory that the cache
    no longer holds.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device):
        once = Wall(calls, device).round(1)
        turns = max(1, min(ceil(GRAPH_CALLS / len(calls)), ceil(GRAPH_SECONDS / (once * len(calls)))))
        self.count = turns * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        kept: deque[object] = deque(maxlen=len(calls))
        with captured(self.graph):
            for _ in range(turns):
                for call in calls:
                    kept.append(call())

    def round(self, repeats: int) -> float:
        """Replay the graph `repeats` times and return the seconds per call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (repeats * self.count)


@contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture what is done on the current stream, which must not be the default one.

    Backward nodes run on the stream of their forward, so it must be the one on which modules were called before.
    torch.cuda.graph would do the same, and empty torch's cache of memory and collect garbage each time.
    """
    torch.cuda.synchronize()
    collecting = gc.isenabled()
    gc.disable()  # a graph that is no longer used must not be destroyed meanwhile
    try:
        pool = torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=pool)
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # what came of the failure, and not its cause
                end_capture(graph, pool)
            raise
        end_capture(graph, pool)
    finally:
        if collecting:
            gc.enable()


def end_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture; where it has become invalid, so that torch's allocator too takes it for ended."""
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError, AttributeError):  # torch's own, and only needed by some versions
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


@dataclass
class Times:
    """What came of one side."""

    repeats: int
    seconds: list[float] = field(default_factory=list)  # per call, one figure a round
    page_faults: int = 0  # in all rounds together


def in_turns(sides: dict[str, Side], effort: Effort, beside: dict[str, Side] | None = None) -> dict[str, Times]:
    """Time the sides in turn, each once a round, the order reversed from one round to the next.

    What is `beside` comes last in every round, so that of two sides each follows the other as often as it follows this.
    """
    everything = sides | (beside or {})
    # The warm-up too. The least of a few, lest a disturbed call pass for a long one.
    longest = max(min(side.round(1) for _ in range(WARM_UP)) for side in everything.values())
    times = {
        name: Times(max(1, ceil(effort.round_seconds / (longest * side.count)))) for name, side in everything.items()
    }
    order = list(sides)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(effort.max_rounds):
            if done >= effort.min_rounds and time.perf_counter() - start > effort.seconds:
                break
            for name in [*order, *(beside or {})]:
                faults = page_faults()
                times[name].seconds.append(everything[name].round(times[name].repeats))
                times[name].page_faults += page_faults() - faults
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return times


class Replay:
    """A clock that stands still but for `step`, which moves it by the next of the given times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times = iter([0.0])

    def read(self) -> float:
        """Tell the time, for pytest-benchmark's `timer` option."""
        return self.now

    def step(self) -> None:
        """Let one measured round pass."""
        self.now += next(self.times)

    def feed(self, benchmark: BenchmarkFixture, seconds: Iterable[float]) -> None:
        """Make `seconds` the rounds of `benchmark`, whose timer must be `read`."""
        seconds = list(seconds)
        self.now = 0.0
        self.times = iter(seconds)
        benchmark.pedantic(self.step, rounds=len(seconds))


REPLAY = Replay()
