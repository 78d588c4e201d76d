"""What a run has measured: one cell for each case and direction, in a JSON file that is whole after every cell."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

# Of what describes a run: where one of these differs, figures do not belong into one file.
SAME = ("device", "name", "threads", "torch", "bn_ext", "sources", "instruction_set", "allocator", "quick")


class FileError(Exception):
    """A file of figures cannot be read, or not be gone on with; the message says why."""


@dataclass(frozen=True)
class Timing:
    """The times of one side: seconds per call, of rounds that were taken in turn with the other sides'."""

    median: float
    min: float
    q1: float
    q3: float
    rounds: int
    repeats: int  # of all the side's calls in one round
    page_faults: float  # per call

    @classmethod
    def of(cls, seconds: list[float], repeats: int, page_faults: float) -> "Timing":
        """Sum up the rounds."""
        q1, _, q3 = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(median(seconds), min(seconds), q1, q3, len(seconds), repeats, page_faults)


class Key(NamedTuple):
    """What tells a cell from all others."""

    operation: str
    case: str
    shape: tuple[int, ...]  # (N, C, H, W) or (N, C)
    dtype: str
    layout: str
    direction: str
    clock: str  # "kernels": CUDA graphs, cold cache; "calls": eager calls by the clock on the wall


@dataclass(frozen=True)
class Cell:
    """One case in one direction."""

    key: Key
    bytes_min: int  # that must move at the least
    sides: dict[str, Timing]
    copy_gb_per_s: float | None = None  # read and written by copy_ of x, timed in the same rounds
    left_out: dict[str, str] = field(default_factory=dict)  # providers that were not timed, and why

    def gb_per_s(self, provider: str) -> float:
        """Divide the least bytes by the median time."""
        return self.bytes_min / self.sides[provider].median / 1e9


class Run(NamedTuple):
    """The content of a file."""

    about: dict[str, Any]
    cells: dict[Key, Cell]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise FileError(f"{path} is not JSON: {error}") from error


def load(path: Path) -> Run:
    """Read the file of a run."""
    content = read_json(path)
    try:
        cells = [
            Cell(
                Key(**cell["key"] | {"shape": tuple(cell["key"]["shape"])}),
                cell["bytes_min"],
                {name: Timing(**timing) for name, timing in cell["sides"].items()},
                cell["copy_gb_per_s"],
                cell["left_out"],
            )
            for cell in content["cells"]
        ]
        return Run(dict(content["run"]), {cell.key: cell for cell in cells})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} was not written by this suite: {error!r}") from error


@contextmanager
def drawing() -> Iterator[None]:
    """Make one sentence, a FileError, of what keeps a picture from being drawn, its modules' imports included."""
    try:
        yield
    except ImportError as error:
        raise FileError(f"pictures need matplotlib ({error}): pip install matplotlib") from error
    except OSError as error:
        raise FileError(f"cannot write {error.filename}: {error.strerror}") from error


def write(path: Path, text: str) -> None:
    """Replace a file at once, so that it is whole whenever the run ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    os.replace(beside, path)


def save(path: Path, run: Run) -> None:
    """Write the file of a run; a line for each cell."""
    cells = [json.dumps(asdict(cell) | {"key": cell.key._asdict()}) for cell in run.cells.values()]
    lines = ",\n".join(f"  {line}" for line in cells)
    write(path, f'{{\n "run": {json.dumps(run.about)},\n "cells": [\n{lines}\n ]\n}}\n')


def unfinished(path: Path) -> Path:
    """Name the file that is written while a run goes on: an earlier run's figures stay until this one has ended."""
    return path.with_suffix(".partial.json")


class Journal:
    """The file of the run that goes on: what is measured, and what need not be measured again."""

    def __init__(self, path: Path, about: dict[str, Any], resume: bool):
        self.path = path
        self.run = Run(about, {})
        if resume:
            earlier = next((name for name in (unfinished(path), path) if name.exists()), None)
            if earlier is not None:
                self._take(earlier, load(earlier))

    def _take(self, path: Path, earlier: Run) -> None:
        for name in SAME:
            then, now = earlier.about.get(name), self.run.about.get(name)
            if then != now:
                raise FileError(
                    f"{path} was measured with {name} {then}, and this is {now}: leave --resume away to measure anew"
                )
        self.run.cells.update(earlier.cells)
        self.run.about["copy_gb_per_s"] = earlier.about.get("copy_gb_per_s", [])

    def __contains__(self, key: Key) -> bool:
        return key in self.run.cells

    def add(self, cell: Cell) -> None:
        """Keep a cell, on disk too."""
        self.run.cells[cell.key] = cell
        save(unfinished(self.path), self.run)

    def end(self) -> None:
        """Put the file in its place, if there is anything in it."""
        if self.run.cells:
            save(self.path, self.run)
            unfinished(self.path).unlink(missing_ok=True)


def geometric_mean(values: Iterable[float]) -> float:
    """Take the n-th root of the product."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
