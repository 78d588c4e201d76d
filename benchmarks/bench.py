"""One run of the suite: inputs and times of the case in hand, and what is written of them."""

import time
from contextlib import suppress
from functools import partial
from math import prod
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch._functorch import config as functorch_config

from . import allocator, cudnn_graph, machine
from .cells import Cell, Journal, Key, Timing
from .check import Expected, WrongResultError, check, reference
from .inputs import DTYPES, Case, Inputs, make_inputs
from .measure import REPLAY, Effort, Graph, Side, Times, Wall, in_turns
from .names import COMPILED, CUDNN_GRAPH, OURS
from .operations import least_bytes
from .providers import Call, Subject
from .selection import largest_batch, providers_of
from .shapes import DEFAULT_BATCH, RESNET50
from .words import first_line

# (quick run, what is timed). Many short rounds: another process that takes the CPU for a moment
# then spoils a few of them and not the median.
EFFORTS = {
    (False, "kernels"): Effort(seconds=2.0, min_rounds=11, max_rounds=301, round_seconds=1e-3),
    (False, "calls"): Effort(seconds=6.0, min_rounds=31, max_rounds=2001, round_seconds=5e-4),
    (True, "kernels"): Effort(seconds=0.1, min_rounds=3, max_rounds=31, round_seconds=5e-4),
    (True, "calls"): Effort(seconds=1.0, min_rounds=31, max_rounds=501, round_seconds=5e-4),
}
# A GPU's kernels take the same time each time, and a machine with a GPU is often to be had for minutes only.
GPU_EFFORT = Effort(seconds=0.15, min_rounds=11, max_rounds=51, round_seconds=2e-3)
COPY = "copy"


class Settings(NamedTuple):
    """What a run is made with, from the command line and the machine."""

    device: torch.device
    providers: tuple[str, ...]
    batches: tuple[int, ...]  # instead of the device's usual ones, or none
    quick: bool
    budget: float | None  # seconds after which no case is begun

    @property
    def compiled_batch(self) -> int:
        """The batch size of the cases for which something is compiled."""
        return largest_batch(self.device.type, self.batches)

    def providers_of(self, case: Case) -> tuple[str, ...]:
        """Choose those that a case is measured with."""
        return providers_of(case, self.providers, self.device.type, self.compiled_batch)


SETTINGS = pytest.StashKey[Settings]()


class NotMeasuredError(Exception):
    """A case is not measured in this run, for a reason that is no fault."""


class Bench:
    """Keep the case in hand, so that its tests share inputs, checks and times."""

    def __init__(self, journal: Journal, settings: Settings):
        self.journal, self.settings, self.device = journal, settings, settings.device
        self.deadline = None if settings.budget is None else time.monotonic() + settings.budget
        self.over_budget: set[Key] = set()
        self._resumed = set(journal.run.cells)
        self._case: Case | None = None
        self._failure = ""
        self._refusals: dict[str, str] = {}
        self._subjects: dict[str, Any] = {}
        self._copies: list[Call] = []
        self._times: dict[str, dict[str, Times]] = {}
        # Compiled backward passes too are called several times for one forward pass.
        functorch_config.donated_buffer = False
        if self.device.type == "cuda":
            # One stream for everything; the default one could not be captured into a graph.
            torch.cuda.set_stream(torch.cuda.Stream())
        else:
            # What checking the largest case takes: about twelve float64 tensors of its size.
            batch = max(settings.batches or (DEFAULT_BATCH,))
            allocator.grow_heap(12 * 8 * max(prod(shape.size(batch)) for shape in RESNET50))

    def take(self, case: Case) -> None:
        """Make a case's inputs and check every provider on them, unless that was done already."""
        if case != self._case:
            self._case, self._failure, self._refusals = case, "", {}
            self._subjects, self._copies, self._times = {}, [], {}
            try:
                self._make(case)
            except Exception as error:  # memory that is full, a device that is lost
                self._failure = f"{case.label}, N = {case.size[0]}: {first_line(error, WrongResultError)}"
        if self._failure:
            raise WrongResultError(self._failure)

    def _make(self, case: Case) -> None:
        if self.device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.empty_cache()  # of the graphs before, whose memory nothing else can use
        inputs = make_inputs(case, self.device)
        expected = reference(case, inputs)
        targets = [torch.empty_like(x, requires_grad=False) for x in inputs.x]
        self._copies = [partial(y.copy_, x.detach()) for y, x in zip(targets, inputs.x, strict=True)]
        for name in self.settings.providers_of(case):
            self._add(name, case, inputs, expected)

    def _add(self, name: str, case: Case, inputs: Inputs, expected: dict[str, Expected]) -> None:
        """Take a provider among those that are timed, if it works and is right."""
        try:
            subject = make_subject(name, case.operation, inputs)
            check(name, case, inputs, subject, expected)
        except Exception as error:  # of whatever kind: compilers and libraries have their own
            self._refusals[name] = first_line(error, WrongResultError)
        else:
            self._subjects[name] = subject

    def side(self, calls: list[Call], case: Case) -> Side:
        """Choose how calls are timed."""
        graph = self.device.type == "cuda" and case.clock == "kernels"
        return Graph(calls, self.device) if graph else Wall(calls, self.device)

    def times(self, case: Case, direction: str) -> dict[str, Times]:
        """Give the times of all providers, measured in turns when first asked for."""
        self.take(case)
        if direction not in self._times:
            sides = {}
            for name, subject in self._subjects.items():
                try:
                    sides[name] = self.side(subject.calls[direction], case)
                except Exception as error:  # what cannot be captured
                    self._refusals[name] = first_line(error, WrongResultError)
            gpu = self.device.type == "cuda" and not self.settings.quick
            effort = GPU_EFFORT if gpu else EFFORTS[self.settings.quick, case.clock]
            beside = {COPY: self.side(self._copies, case)} if case.clock == "kernels" else {}
            self._times[direction] = in_turns(sides, effort, beside)
        return self._times[direction]

    def record(self, benchmark: BenchmarkFixture, case: Case, direction: str, provider: str) -> None:
        """Measure a case unless that was done, write its cell, and fill pytest-benchmark's entry of one provider."""
        key = case.key(direction)
        if key in self._resumed:
            raise NotMeasuredError("measured before")
        if key not in self.journal:
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.over_budget.add(key)
                raise NotMeasuredError(f"the {self.settings.budget:.0f} seconds of --budget are over")
            self.journal.add(self.cell(case, direction))
        cell = self.journal.run.cells[key]
        if provider in cell.left_out:
            raise (WrongResultError if provider == OURS else NotMeasuredError)(cell.left_out[provider])
        benchmark.group = f"{case.label} N = {case.size[0]} {direction}"
        benchmark.extra_info |= {"provider": provider, "device": str(self.device), "gb_per_s": cell.gb_per_s(provider)}
        REPLAY.feed(benchmark, self.times(case, direction)[provider].seconds)

    def cell(self, case: Case, direction: str) -> Cell:
        """Measure a case."""
        times = self.times(case, direction)
        copy = times.get(COPY)
        return Cell(
            case.key(direction),
            least_bytes(case.operation, case.size, DTYPES[case.dtype].itemsize, direction),
            {name: timing(of) for name, of in times.items() if name != COPY},
            None if copy is None else 2 * case.bytes / median(copy.seconds) / 1e9,
            dict(self._refusals),
        )

    def measure_copy(self) -> None:
        """Measure the copy figure; twice in a run, for it drifts like all else."""
        self.journal.run.about.setdefault("copy_gb_per_s", []).append(machine.copy_gb_per_s(self.device))

    def end(self) -> None:
        """Write what is known at the end, and put the results in their place."""
        about = self.journal.run.about
        about["page_faults_per_64_mib"] = allocator.faults_per_probe()
        about["over_budget"] = len(self.over_budget)  # cells that were not measured
        self.journal.end()


def timing(times: Times) -> Timing:
    """Sum up a side's rounds."""
    return Timing.of(times.seconds, times.repeats, times.page_faults / (len(times.seconds) * times.repeats))


def make_subject(provider: str, operation: str, inputs: Inputs) -> Any:
    """Give the calls of a provider."""
    if provider == CUDNN_GRAPH:
        return cudnn_graph.CudnnSubject(operation, inputs)
    if provider == COMPILED:
        torch._dynamo.reset()  # else it gives up after some modules of a kind
    return Subject(provider, operation, inputs)
