"""bn_ext beside all its rivals: the tables of a run on a GPU."""

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from . import targets
from .cells import Cell, Key, Run, geometric_mean
from .names import COMPILED, EAGER, OURS, PROVIDERS
from .operations import OPERATIONS, PLAIN
from .tables import bullets, table, title

Group = tuple[str, ...]
ORDER = (PLAIN, *OPERATIONS, "bfloat16", "float32", "float16", "contiguous", "channels_last", "(N, C)")
DIRECTIONS = ("forward", "backward", "forward+backward", "eval")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
LEGEND = (
    "GB/s: the least bytes that must move (2 tensors, backward 3) by bn_ext's median; of copy: its share of the copy "
    "of large tensors, the better figure",
    "ratio = the rival's time / bn_ext's, above 1: bn_ext is faster; torch eager's best: the faster one of torch.nn "
    "with cuDNN and without",
    "kernels in CUDA graphs that go round over copies of the inputs, so that caches are cold",
)


class Ratios(NamedTuple):
    """The ratios of one rival's times to bn_ext's; above 1, bn_ext is faster."""

    values: list[float]

    def __str__(self) -> str:
        if not self.values:
            return "-"
        return f"{geometric_mean(self.values):.2f} (least {min(self.values):.2f}, of {len(self.values)})"


def times(cell: Cell) -> dict[str, float]:
    """Give the medians of all sides, in seconds."""
    return {name: timing.median for name, timing in cell.sides.items()}


def eager(cell: Cell) -> float | None:
    """Give the time of torch's faster way without its compiler; None if it was not timed."""
    return min((seconds for name, seconds in times(cell).items() if name in EAGER), default=None)


def ratio(cell: Cell, rival: str) -> float | None:
    """Divide a rival's time by bn_ext's; torch's eager ways count as one, the faster."""
    other = eager(cell) if rival in EAGER else times(cell).get(rival)
    return None if other is None or OURS not in cell.sides else other / times(cell)[OURS]


def ratios(cells: Iterable[Cell], rival: str) -> Ratios:
    """Gather a rival's ratios."""
    return Ratios([value for cell in cells if (value := ratio(cell, rival)) is not None])


def ceiling(run: Run) -> float:
    """Give the GB/s of the copy of large tensors: the better one of those taken in the run."""
    return float(max(run.about["copy_gb_per_s"]))


def group(key: Key) -> Group:
    """Say which table a cell belongs to."""
    return key.operation, key.dtype, key.layout, key.direction


def place(key: Key) -> tuple[int, ...]:
    """Sort groups, and in them large batches before small ones."""
    operation, dtype, layout, direction = group(key)
    return *(ORDER.index(word) for word in (operation, dtype, layout)), DIRECTIONS.index(direction), -key.shape[0]


def name(key: Key) -> str:
    """Name a cell within its group."""
    return f"N={key.shape[0]} {key.case}" if len(key.shape) == 4 else key.case


def label(key: Key) -> str:
    """Name a cell among all."""
    return f"{', '.join(group(key))}: {name(key)}"


def of_kernels(run: Run) -> list[Cell]:
    """List the cells of which kernels were timed, in the usual order."""
    cells = [cell for cell in run.cells.values() if cell.key.clock == "kernels"]
    return sorted(cells, key=lambda cell: place(cell.key))


def grouped(cells: list[Cell]) -> dict[Group, list[Cell]]:
    """Gather cells by their table."""
    groups: dict[Group, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(group(cell.key), []).append(cell)
    return groups


def others(cells: Iterable[Cell]) -> list[str]:
    """Name the rivals that were timed in at least one of the cells."""
    timed = {side for cell in cells for side in cell.sides}
    return [provider for provider in PROVIDERS if provider in timed and provider != OURS]


def row(cell: Cell, rivals: list[str], top: float) -> list[str]:
    """Give the cells of a table's row: bn_ext's time, speed and share of the copy, each rival's time and ratio."""
    medians = times(cell)
    ours = medians.get(OURS)
    cells = [name(cell.key), "-", "-", "-"]
    if ours is not None:
        speed = cell.gb_per_s(OURS)
        cells[1:] = [f"{ours * 1e6:.1f}", f"{speed:.0f}", f"{speed / top:.0%}"]
    return cells + [beside(medians.get(rival), ours) for rival in rivals]


def beside(seconds: float | None, ours: float | None) -> str:
    """Give a rival's time and its ratio to bn_ext's."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f}" if ours is None else f"{seconds * 1e6:.1f} ({seconds / ours:.2f})"


def tables(run: Run, markdown: bool) -> list[str]:
    """Give a table for each operation, dtype, layout and direction."""
    lines: list[str] = []
    for words, cells in grouped(of_kernels(run)).items():
        rivals = others(cells)
        header = ["case", "bn_ext us", "GB/s", "of copy", *(f"{rival} us (ratio)" for rival in rivals)]
        lines += title(", ".join(words), markdown)
        lines += table(header, [row(cell, rivals, ceiling(run)) for cell in cells], markdown)
    return lines


def means(run: Run, markdown: bool) -> list[str]:
    """Give the geometric means of the groups' ratios against each rival."""
    cells = of_kernels(run)
    rivals = [rival for rival in others(cells) if rival != EAGER[1]]
    header = ["geometric means", *("torch eager's best" if rival in EAGER else rival for rival in rivals)]
    rows = [
        [", ".join(words), *(str(ratios(members, rival)) for rival in rivals)]
        for words, members in grouped(cells).items()
    ]
    return title("Against each rival", markdown) + table(header, rows, markdown)


def against(measured: Ratios, wanted: float) -> str:
    """Say whether a target is met."""
    if not measured.values:
        return f"{wanted:g}: not measured"
    return f"{wanted:g}: {'met' if geometric_mean(measured.values) >= wanted else 'missed'}, {measured}"


def targets_met(run: Run, markdown: bool) -> list[str]:
    """Hold the geometric means against what was to be reached."""
    rows = []
    for target in targets.TARGETS:
        cells = [
            cell
            for cell in of_kernels(run)
            if cell.key.operation == target.operation
            and cell.key.dtype in target.dtypes
            and cell.key.layout in target.layouts
            and cell.key.direction in target.directions
        ]
        eagers, compiled = (ratios(cells, rival) for rival in (EAGER[0], COMPILED))
        rows.append([target.about, against(eagers, target.eager), against(compiled, target.compiled)])
    return title("Targets", markdown) + table(["", "torch eager's best", "torch.compile"], rows, markdown)


def tensor_bytes(key: Key) -> int:
    """Count the bytes of one activation tensor."""
    return prod(key.shape) * ITEM_BYTES[key.dtype]


def listed(sentence: str, found: list[str], markdown: bool) -> list[str]:
    """Give a sentence and the cases that it counts."""
    return ["", sentence, *([""] * markdown if found else []), *(f"- {line}" for line in found)]


def single_cases(run: Run, markdown: bool) -> list[str]:
    """Name the cases that are behind what each case by itself is to reach."""
    cells = [cell for cell in of_kernels(run) if OURS in cell.sides]
    behind = []
    for cell in cells:
        rival, seconds = min(times(cell).items(), key=lambda side: side[1])
        if round(seconds / times(cell)[OURS], 2) < 1:
            behind.append(f"{label(cell.key)}: {rival} takes {seconds / times(cell)[OURS]:.2f} of bn_ext's time")
    large = [c for c in cells if tensor_bytes(c.key) >= targets.LARGE_BYTES and c.key.layout == "contiguous"]
    share = {label(cell.key): cell.gb_per_s(OURS) / ceiling(run) for cell in large}
    slow = [f"{case}: {value:.0%}" for case, value in share.items() if value < targets.LARGE_SHARE]
    small = [
        cell
        for cell in cells
        if cell.key.shape[0] == targets.SMALL_BATCH and len(cell.key.shape) == 4 and cell.key.shape[-1] <= 14
    ]
    part = {label(cell.key): 1 / value for cell in small if (value := ratio(cell, EAGER[0])) is not None}
    long = [f"{case}: {value:.2f}" for case, value in part.items() if value > targets.SMALL_TIME]
    return [
        *listed(f"A rival is ahead in {len(behind)} of {len(cells)} cases", behind, markdown),
        *listed(
            f"Contiguous, 100 MB and more: {len(slow)} of {len(large)} cases are below {targets.LARGE_SHARE:.0%} "
            "of the copy of large tensors",
            slow,
            markdown,
        ),
        *listed(
            f"Planes of 14 x 14 and less at N = {targets.SMALL_BATCH}: {len(long)} of {len(part)} cases take more than "
            f"{targets.SMALL_TIME} of torch eager's best time",
            long,
            markdown,
        ),
    ]


def calls(run: Run, markdown: bool) -> list[str]:
    """Give the table of whole calls."""
    cells = [cell for cell in run.cells.values() if cell.key.clock == "calls" and OURS in cell.sides]
    if not cells:
        return []
    rivals = others(cells)
    rows = []
    for cell in cells:
        ours = times(cell)[OURS]
        words = (name(cell.key), cell.key.dtype, cell.key.layout, cell.key.direction)
        rows.append([" ".join(words), f"{ours * 1e6:.1f}", *(beside(times(cell).get(rival), ours) for rival in rivals)])
    header = ["case", "bn_ext us", *(f"{rival} us (ratio)" for rival in rivals)]
    return title("Calls of the module, by the clock on the wall", markdown) + table(header, rows, markdown)


def left_out(run: Run, markdown: bool) -> list[str]:
    """Say who could not be measured, and why."""
    lines = [f"{who}: {why}" for who, why in run.about.get("unavailable", {}).items() if why]
    reasons = Counter(f"{who}: {why}" for cell in run.cells.values() for who, why in cell.left_out.items())
    lines += [f"{reason} (cells: {count})" for reason, count in reasons.most_common()]
    return title("Not measured", markdown) + bullets(lines, markdown) if lines else []


def report(run: Run, markdown: bool) -> list[str]:
    """Give all tables, the summaries first."""
    lines = targets_met(run, markdown) + means(run, markdown) + single_cases(run, markdown)
    return lines + calls(run, markdown) + tables(run, markdown) + left_out(run, markdown)
