"""One group of whole models: its variants are made, checked, counted, timed in turns and profiled."""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from ..inputs import DTYPES
from ..measure import Effort, Side, Wall, in_turns
from ..words import first_line
from . import agreement, step_profile
from .agreement import DisagreementError
from .budget import TimeUpError, time_limit
from .run_file import Group
from .trainee import STOCK, VARIANTS, Trainee, draw

LEAST_BATCH = 16  # when memory runs out, half the batch is tried, but none smaller than this
NO_TIME = "left out, for no time was left"
# For each variant: how many seconds it may take to be compiled, 0 if it is left out.
CompileLimit = Callable[[str], float]


class Setting(NamedTuple):
    """How all groups of a run are measured."""

    device: torch.device
    variants: list[str]  # of VARIANTS; STOCK is the first, what is compiled comes last
    batch: int
    size: int  # of the square images
    effort: Effort


class Attempt:
    """A group at one batch size."""

    def __init__(self, group: Group, batch: int, setting: Setting):
        self.group, self.batch, self.device = group, batch, setting.device
        self.data = draw(batch, setting.size, setting.device, group.layout)
        self.right: dict[str, torch.Tensor] = {}  # stock's first step
        self.trainees: dict[str, Trainee] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.compiled: dict[str, float] = {}  # seconds of the first step, also of one that failed

    def make(self, variant: str) -> None:
        """Make a variant, check and count it."""
        start = time.perf_counter()
        try:
            trainee = Trainee(self.group.model, variant, self.data, self.group.layout, DTYPES[self.group.dtype])
            results = agreement.first_step(trainee)
        finally:
            if VARIANTS[variant].compiled:
                self.compiled[variant] = time.perf_counter() - start
        self.right = self.right or results
        off = agreement.distances(f"{self.group}, {variant}", results, self.right, self.group.dtype)
        self.found[variant] = {"off": off} | trainee.step_in_bytes()
        self.trainees[variant] = trainee

    def make_or_leave_out(self, variant: str, limit: float) -> None:
        """Make a variant if that works; what loses the whole group is raised."""
        compiled = VARIANTS[variant].compiled
        try:
            with time_limit(limit) if compiled else nullcontext():
                self.make(variant)
        except TimeUpError:
            self.left_out[variant] = f"left out, its compilation was broken off after {limit:.0f} s"
        except torch.OutOfMemoryError:
            if variant == STOCK or (not compiled and self.batch // 2 >= LEAST_BATCH):
                raise
            self.left_out[variant] = "left out, out of memory"
        except Exception as error:
            # A wrong result of an eager variant is not to be passed over; one of a compiler is its own.
            if variant == STOCK or (isinstance(error, DisagreementError) and not compiled):
                raise
            self.left_out[variant] = first_line(error, DisagreementError)

    def measure(self, effort: Effort) -> None:
        """Time what was made, in turns, and see what a step's time is spent on."""
        sides: dict[str, Side] = {name: Wall([each.step], self.device) for name, each in self.trainees.items()}
        for name, times in in_turns(sides, effort).items():
            self.found[name]["seconds"] = spread(times.seconds)
        for name, trainee in self.trainees.items():
            if trainee.compiled and self.device.type == "cpu":  # the profiler does not see the parts of compiled code
                continue
            try:
                seconds = step_profile.seconds_by_name(trainee.step, self.device)
                self.found[name]["profile"] = step_profile.shares(seconds)
            except RuntimeError as error:  # the times are worth having without it
                self.found[name]["profile_failed"] = first_line(error, DisagreementError)


def spread(seconds: list[float]) -> dict[str, float]:
    """Give the median, the quartiles, the extremes and the number of some times."""
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "median": median(seconds),
        "low": low,
        "high": high,
        "min": min(seconds),
        "max": max(seconds),
        "rounds": len(seconds),
    }


def attempt(group: Group, batch: int, setting: Setting, compile_limit: CompileLimit) -> Attempt:
    """Measure a group at a batch size."""
    this = Attempt(group, batch, setting)
    for variant in setting.variants:
        limit = compile_limit(variant) if VARIANTS[variant].compiled else 0.0
        if VARIANTS[variant].compiled and not limit:
            this.left_out[variant] = NO_TIME
        else:
            this.make_or_leave_out(variant, limit)
    this.measure(setting.effort)
    return this


def free_memory(device: torch.device) -> None:
    """Give up what the last attempt has used, its compiled code too."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(group: Group, setting: Setting, compile_limit: CompileLimit) -> dict[str, Any]:
    """Measure a group at the largest batch size that fits, as its entry in the JSON."""
    start = time.perf_counter()
    batch, too_large = setting.batch, []
    this = None
    while this is None:
        free_memory(setting.device)
        try:
            this = attempt(group, batch, setting, compile_limit)
        except torch.OutOfMemoryError:
            if batch // 2 < LEAST_BATCH:
                raise
            too_large.append(batch)
            batch //= 2
    return group._asdict() | {
        "batch": batch,
        "out_of_memory_at": too_large,
        "variants": this.found,
        "left_out": this.left_out,
        "cost_seconds": {"whole": time.perf_counter() - start, "compiled": this.compiled},
    }
