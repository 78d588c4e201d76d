"""One run of the suite: inputs and times of the case in hand, and what is written beside them."""

from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import allocator, machine
from .check import WrongResultError, check, reference
from .inputs import DTYPES, Case, make_inputs
from .measure import REPLAY, Effort, Graph, Side, Times, Wall, in_turns
from .operations import least_bytes
from .providers import PROVIDERS, Call, Subject
from .shapes import DEFAULT_BATCH, OVERHEAD, RESNET50

# (quick run, overhead case). Many short rounds: another process that takes the CPU for a moment
# then spoils a few of them and not the median.
EFFORTS = {
    (False, False): Effort(seconds=2.0, min_rounds=11, max_rounds=301, round_seconds=1e-3),
    (False, True): Effort(seconds=6.0, min_rounds=31, max_rounds=2001, round_seconds=5e-4),
    (True, False): Effort(seconds=0.1, min_rounds=3, max_rounds=31, round_seconds=5e-4),
    (True, True): Effort(seconds=1.0, min_rounds=31, max_rounds=501, round_seconds=5e-4),
}
QUICK_BATCH = 2
COPY = "copy"


class Bench:
    """Keep the case in hand, so that its tests share inputs, checks and times."""

    def __init__(self, quick: bool, batch: int | None):
        self.device = machine.best_device()
        self.quick = quick
        self.batch = batch or (QUICK_BATCH if quick else DEFAULT_BATCH)
        self.copies: list[float] = []
        self._case: Case | None = None
        self._refusal = ""
        self._subjects: dict[str, Subject] = {}
        self._copies: list[Call] = []
        self._times: dict[str, dict[str, Times]] = {}
        if self.device.type == "cuda":
            # One stream for everything; the default one could not be captured into a graph.
            torch.cuda.set_stream(torch.cuda.Stream())
        else:
            # What checking the largest case takes: about twelve float64 tensors of its size.
            allocator.grow_heap(12 * 8 * max(prod(shape.size(self.batch)) for shape in RESNET50))

    def take(self, case: Case) -> None:
        """Make a case's inputs and check every provider on them, unless that was done already."""
        if case != self._case:
            self._case, self._refusal, self._subjects, self._copies, self._times = None, "", {}, [], {}
            try:
                self._subjects = self._checked(case)
            except WrongResultError as error:
                self._refusal = str(error)
            self._case = case
        if self._refusal:
            raise WrongResultError(self._refusal)

    def _checked(self, case: Case) -> dict[str, Subject]:
        inputs = make_inputs(case, self.device)
        expected = reference(case, inputs)
        target = torch.empty_like(inputs.x[0], requires_grad=False)
        self._copies = [partial(target.copy_, x.detach()) for x in inputs.x]
        subjects = {}
        for name in PROVIDERS:
            subjects[name] = Subject(name, case.operation, inputs)
            check(name, case, inputs, subjects[name], expected)
        return subjects

    def times(self, case: Case, direction: str) -> dict[str, Times]:
        """Give the times of all providers, measured in turns when first asked for."""
        self.take(case)
        if direction not in self._times:
            # The call itself is the matter of the overhead case, the kernels that of the others.
            overhead = case.name == OVERHEAD.name
            graph = self.device.type == "cuda" and not overhead

            def side(calls: list[Call]) -> Side:
                return Graph(calls) if graph else Wall(calls, self.device)

            sides = {name: side(subject.calls[direction]) for name, subject in self._subjects.items()}
            effort = EFFORTS[self.quick, overhead]
            self._times[direction] = in_turns(sides, effort, {} if overhead else {COPY: side(self._copies)})
        return self._times[direction]

    def record(
        self,
        benchmark: BenchmarkFixture,
        case: Case,
        direction: str,
        provider: str,
    ) -> None:
        """Fill pytest-benchmark's entry of one provider with its times and extra_info."""
        all_times = self.times(case, direction)
        times = all_times[provider]
        bytes_min = least_bytes(case.operation, case.size, DTYPES[case.dtype].itemsize, direction)
        benchmark.group = f"{case.label} {direction}"
        benchmark.extra_info |= {
            "provider": provider,
            "operation": case.operation,
            "case": case.name,
            "shape": list(case.size),
            "dtype": case.dtype,
            "layout": case.layout,
            "direction": direction,
            "device": str(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "bytes_min": bytes_min,
            "gb_per_s": bytes_min / median(times.seconds) / 1e9,
            "copy_gb_per_s": 2 * case.bytes / median(all_times[COPY].seconds) / 1e9 if COPY in all_times else None,
            "allocator": allocator.mode(self.device),
            "page_faults_per_call": times.page_faults / (len(times.seconds) * times.repeats),
            "repeats_per_round": times.repeats,
        }
        REPLAY.feed(benchmark, times.seconds)

    def measure_copy(self) -> None:
        """Measure the copy figure; twice in a run, for it drifts like all else."""
        self.copies.append(machine.copy_gb_per_s(self.device))

    def describe(self) -> dict[str, Any]:
        """Collect what the whole run has in common."""
        return machine.describe(self.device) | {
            "batch": self.batch,
            "quick": self.quick,
            "page_faults_per_64_mib": allocator.faults_per_probe(),
            "copy_gb_per_s": self.copies,
        }
