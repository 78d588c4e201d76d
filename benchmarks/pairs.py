"""bn_ext beside torch.nn, pair by pair: the tables of a run with these two sides."""

import math
from typing import NamedTuple

from . import rivals
from .cells import Run, geometric_mean
from .names import COMPILED, OURS, RIVAL
from .operations import PLAIN
from .tables import table, title

USUAL_ORDER = (
    "bn+relu",
    "bn+add+relu",
    "float32",
    "bfloat16",
    "contiguous",
    "channels_last",
    "(N, C)",
    "forward",
    "backward",
    "eval",
    "forward+backward",
)
LEGEND = (
    "bn_ext GB/s: the least bytes that must move (2 tensors, backward 3) by its median; copy GB/s: "
    "torch's copy_ of the case's x, timed in the same rounds; share: of the one in the other",
    "ratio = torch / bn_ext, above 1: bn_ext is faster; of best = the same of the fastest rounds (far from ratio: a "
    "disturbed run)",
)


class Pair(NamedTuple):
    """Both sides of one case."""

    operation: str
    group: tuple[str, ...]  # the operation unless it is PLAIN, dtype, layout, direction
    case: str
    calls: bool  # timed by the clock on the wall, call by call
    rival: float  # median of the other side, s
    ours: float  # median, s
    best_ratio: float  # of the fastest rounds
    gb_per_s: float  # of ours: least bytes / median time
    copy_gb_per_s: float  # read and written by copy_ of a tensor of that size, beside; NaN: not timed
    page_faults: float  # per call, the worse side

    @property
    def ratio(self) -> float:
        """Divide the times; above 1, bn_ext is faster."""
        return self.rival / self.ours


def pairs(run: Run, rival: str = RIVAL) -> list[Pair]:
    """List all cases of which bn_ext and a rival were timed, in the order of the run."""
    several = len({key.shape[0] for key in run.cells if len(key.shape) == 4 and key.clock == "kernels"}) > 1
    return [
        Pair(
            operation=key.operation,
            group=(*[key.operation] * (key.operation != PLAIN), key.dtype, key.layout, key.direction),
            case=key.case + f" N={key.shape[0]}" * (several and len(key.shape) == 4),
            calls=key.clock == "calls",
            rival=cell.sides[rival].median,
            ours=cell.sides[OURS].median,
            best_ratio=cell.sides[rival].min / cell.sides[OURS].min,
            gb_per_s=cell.gb_per_s(OURS),
            copy_gb_per_s=cell.copy_gb_per_s or math.nan,
            page_faults=max(timing.page_faults for timing in cell.sides.values()),
        )
        for key, cell in run.cells.items()
        if cell.sides.keys() >= {rival, OURS}
    ]


def times(pair: Pair, per_second: float) -> list[str]:
    """Give the cells of both medians, with `per_second` units in a second, and of the ratios."""
    medians = [f"{seconds * per_second:.3f}" for seconds in (pair.rival, pair.ours)]
    return [*medians, f"{pair.ratio:.2f}", f"{pair.best_ratio:.2f}"]


def speed(pair: Pair) -> list[str]:
    """Give the cells of bn_ext's GB/s, the copy's, and the share of one in the other."""
    return [f"{pair.gb_per_s:.1f}", f"{pair.copy_gb_per_s:.1f}", f"{pair.gb_per_s / pair.copy_gb_per_s:.0%}"]


def by_group(cases: list[Pair]) -> dict[tuple[str, ...], list[Pair]]:
    """Gather the cases of each group, in the usual order."""
    groups: dict[tuple[str, ...], list[Pair]] = {}
    for pair in sorted(cases, key=lambda pair: [USUAL_ORDER.index(word) for word in pair.group]):
        groups.setdefault(pair.group, []).append(pair)
    return groups


def body(cases: list[Pair], markdown: bool) -> list[str]:
    """Give one table per group."""
    lines: list[str] = []
    for group, members in by_group(cases).items():
        mean = geometric_mean([pair.ratio for pair in members])
        lines += title(", ".join(group), markdown)
        lines += table(
            ["case", "torch ms", "bn_ext ms", "ratio", "of best", "bn_ext GB/s", "copy GB/s", "share"],
            [[pair.case, *times(pair, 1e3), *speed(pair)] for pair in members],
            markdown,
        )
        lines += [""] * markdown
        lines += [f"geometric mean of the ratios: {mean:.2f} (cases: {len(members)})"]
    return lines


def means(cases: list[Pair], of: str, markdown: bool) -> list[str]:
    """Give one table of the groups' geometric means, and the mean of all `cases`."""
    if not cases:
        return []
    rows = []
    for group, members in by_group(cases).items():
        worst = min(members, key=lambda pair: pair.ratio)
        mean = geometric_mean([pair.ratio for pair in members])
        rows.append([", ".join(group), f"{mean:.2f}", f"{worst.ratio:.2f}", worst.case])
    mean = geometric_mean([pair.ratio for pair in cases])
    rows.append([f"all {len(cases)} cases{of}", f"{mean:.2f}", "", ""])
    return title(f"Geometric means{of}", markdown) + table(["group", "ratio", "least", "in case"], rows, markdown)


def fused(cases: list[Pair], markdown: bool) -> list[str]:
    """Give the tables of the operations that are more than batch norm, and for each direction the means."""
    lines = body(cases, markdown)
    kinds = dict.fromkeys((group[0], group[-1]) for group in by_group(cases))
    for kind in kinds:
        members = [pair for pair in cases if (pair.group[0], pair.group[-1]) == kind]
        lines += means(members, f": {', '.join(kind)}", markdown)
    return lines


def compiled(cases: list[Pair], markdown: bool) -> list[str]:
    """Give the table of the cases that torch.compile was measured in too, and their means."""
    if not cases:
        return []
    rows = [
        [f"{', '.join(group)}: {pair.case}", *times(pair, 1e3)]
        for group, members in by_group(cases).items()
        for pair in members
    ]
    header = ["case", f"{COMPILED} ms", "bn_ext ms", "ratio", "of best"]
    lines = title(f"Against {COMPILED}", markdown) + table(header, rows, markdown)
    return lines + means(cases, f" against {COMPILED}", markdown)


def overhead(cases: list[Pair], markdown: bool) -> list[str]:
    """Give the table of the tiny input's calls."""
    if not cases:
        return []
    return title("Overhead: the module on a (2, 4, 2, 2) float32 input", markdown) + table(
        ["direction", "torch us", "bn_ext us", "ratio", "of best"],
        [[pair.group[-1], *times(pair, 1e6)] for pair in cases],
        markdown,
    )


def slower(cases: list[Pair]) -> list[str]:
    """Name every case in which bn_ext takes longer."""
    losses = [pair for pair in cases if round(pair.ratio, 2) < 1]
    lines = ["", f"bn_ext is slower in {len(losses)} of {len(cases)} cases"]
    return lines + [f"- {pair.case} {' '.join(pair.group)}: {pair.ratio:.2f}" for pair in losses]


def report(run: Run, markdown: bool) -> list[str]:
    """Give all tables."""
    everything = pairs(run)
    calls = [pair for pair in everything if pair.calls]
    cases = [pair for pair in everything if not pair.calls]
    plain = [pair for pair in cases if pair.operation == PLAIN]
    lines = body(plain, markdown) + means(plain, "", markdown)
    lines += fused([pair for pair in cases if pair not in plain], markdown)
    lines += compiled(pairs(run, COMPILED), markdown)
    lines += overhead(calls, markdown) + slower(everything)
    return lines + rivals.left_out(run._replace(about={}), markdown)  # what is only for GPUs is not missing on a CPU
