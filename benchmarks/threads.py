"""The gain of threads: a run beside one of the same machine and sources with another number of threads."""

from pathlib import Path

from .cells import SAME, Cell, FileError, Key, Run, geometric_mean, load
from .names import OURS, RIVAL
from .rivals import place
from .tables import table, title

SIDES = (OURS, RIVAL)
CALLS = "calls"


def environment(count: int | None) -> dict[str, str]:
    """Give the variables that make torch run with `count` threads; none if there is no count."""
    if count is None:
        return {}
    # torch takes the number of its MKL, which would count at most a thread per core.
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "MKL_DYNAMIC": "FALSE"}


def comparable(run: Run, path: Path, other: Run, other_path: Path) -> None:
    """Raise FileError unless two runs differ in their number of threads, and in nothing else that times depend on."""
    for name in SAME:
        here, there = run.about.get(name), other.about.get(name)
        if name == "threads" and here == there:
            raise FileError(f"{path} and {other_path} were both measured with {here} threads: there is no gain to show")
        if name != "threads" and here != there:
            raise FileError(
                f"{path} was measured with {name} {here}, and {other_path} with {name} {there}: only threads may differ"
            )


def gain(cell: Cell, other: Cell | None, side: str) -> float | None:
    """Divide the other run's time of one side by this run's; None where one of them is missing."""
    if other is None or side not in cell.sides or side not in other.sides:
        return None
    return other.sides[side].median / cell.sides[side].median


def gains(run: Run, other: Run) -> dict[Key, dict[str, float]]:
    """Give the gain of each side, for the cells in which there is one, in the usual order."""
    found: dict[Key, dict[str, float]] = {}
    for key in sorted(run.cells, key=lambda key: (key.clock == CALLS, *place(key))):
        values = {side: gain(run.cells[key], other.cells.get(key), side) for side in SIDES}
        known = {side: value for side, value in values.items() if value is not None}
        if known:
            found[key] = known
    return found


def group(key: Key) -> str:
    """Name the row of a cell; calls by the clock on the wall have rows of their own."""
    words = (key.operation, key.dtype, key.layout, key.direction)
    return ", ".join([*words, *[CALLS] * (key.clock == CALLS)])


def row(name: str, members: list[dict[str, float]]) -> list[str]:
    """Give the geometric mean of each side."""
    values = [[member[side] for member in members if side in member] for side in SIDES]
    return [name, *(f"{geometric_mean(each):.2f}" if each else "-" for each in values), str(len(members))]


def report(path: Path, other_path: Path, markdown: bool) -> str:
    """Make the table of the run in `path` beside the one in `other_path`; raise FileError if that cannot be done."""
    run, other = load(path), load(other_path)
    comparable(run, path, other, other_path)
    found = gains(run, other)
    if not found:
        raise FileError(f"{path} and {other_path} share no cell: nothing to compare")
    groups: dict[str, list[dict[str, float]]] = {}
    for key, values in found.items():
        groups.setdefault(group(key), []).append(values)
    rows = [row(name, members) for name, members in groups.items()]
    rows.append(row("all", list(found.values())))
    here, there = run.about["threads"], other.about["threads"]
    heading = f"Gain of threads: time with {there} / time with {here}, geometric means"
    return "\n".join(title(heading, markdown) + table(["group", *SIDES, "cases"], rows, markdown))
