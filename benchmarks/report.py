"""Print ratios from a run's JSON: `python -m benchmarks.report FILE [--markdown]`."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

# As in providers.py, which is not imported: a report needs neither torch nor bn_ext.
RIVAL = "torch.nn"
OURS = "bn_ext"
OVERHEAD = "overhead"
PLAIN = "batch_norm"
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


class ReportError(Exception):
    """The file cannot be reported on; the message says why."""


class Pair(NamedTuple):
    """Both sides of one case."""

    operation: str
    group: tuple[str, ...]  # the operation unless it is PLAIN, dtype, layout, direction
    case: str
    rival: float  # median, s
    ours: float  # median, s
    best_ratio: float  # of the fastest rounds
    gb_per_s: float  # of ours: least bytes / median time
    copy_gb_per_s: float  # read and written by copy_ of a tensor of that size, beside; NaN: not timed
    page_faults: float  # per call, the worse side

    @property
    def ratio(self) -> float:
        """Divide the times; above 1, bn_ext is faster."""
        return self.rival / self.ours


def read(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read the JSON of a run."""
    run = read(path)
    if not isinstance(run, dict) or "benchmarks" not in run or "run" not in run.get("machine_info", {}):
        raise ReportError(f"{path} is not the JSON of this suite: no benchmarks, or no machine_info.run")
    return run


def pairs(run: dict[str, Any]) -> list[Pair]:
    """List all cases of which both sides were timed, in the order of the run."""
    sides: dict[tuple[str, ...], dict[str, tuple[dict[str, float], dict[str, Any]]]] = {}
    for entry in run["benchmarks"]:
        info = entry["extra_info"]
        key = (info.get("operation", PLAIN), info["dtype"], info["layout"], info["direction"], info["case"])
        sides.setdefault(key, {})[info["provider"]] = (entry["stats"], info)
    return [
        Pair(
            operation=operation,
            group=(*[operation] * (operation != PLAIN), dtype, layout, direction),
            case=case,
            rival=both[RIVAL][0]["median"],
            ours=both[OURS][0]["median"],
            best_ratio=both[RIVAL][0]["min"] / both[OURS][0]["min"],
            gb_per_s=both[OURS][1]["gb_per_s"],
            copy_gb_per_s=both[OURS][1].get("copy_gb_per_s") or math.nan,
            page_faults=max(info["page_faults_per_call"] for _, info in both.values()),
        )
        for (operation, dtype, layout, direction, case), both in sides.items()
        if both.keys() >= {RIVAL, OURS}
    ]


def geometric_mean(values: list[float]) -> float:
    """Take the n-th root of the product."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(header: list[str], rows: list[list[str]], markdown: bool) -> list[str]:
    """Lay out a table; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded)

    rule = ["-" * widths[0]] + ["-" * (width - markdown) + ":" * markdown for width in widths[1:]]
    return [line(header), line(rule), *map(line, rows)]


def title(text: str, markdown: bool) -> list[str]:
    """Set a heading apart by blank lines."""
    return ["", f"### {text}", ""] if markdown else ["", text]


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


def versions(about: dict[str, Any], date: str) -> list[str]:
    """Name the machine and the software."""
    return [
        f"{about['name']}, {about['device']}, {about['threads']} threads",
        f"torch {about['torch']}, bn_ext {about['bn_ext']} ({about['instruction_set']}), {date}",
    ]


def head(run: dict[str, Any], cases: list[Pair], markdown: bool) -> list[str]:
    """Say what the figures were measured on, and with."""
    about = run["machine_info"]["run"]
    copy = ", ".join(f"{value:.1f}" for value in about["copy_gb_per_s"])
    faults = max((pair.page_faults for pair in cases), default=0.0)
    lines = [
        *versions(about, run.get("datetime", "")[:10]),
        f"allocator: {about['allocator']} ({about['page_faults_per_64_mib']} page faults per new "
        f"64 MiB, at most {faults:.0f} per timed call)",
        f"copy_ of large tensors: {copy} GB/s read and written, best at the start and at the end",
        "bn_ext GB/s: the least bytes that must move (2 tensors, backward 3) by its median; copy GB/s: "
        "torch's copy_ of the case's x, timed in the same rounds; share: of the one in the other",
        f"batch size {about['batch']}; times are medians; ratio = torch / bn_ext, above 1: bn_ext "
        "is faster; of best = the same of the fastest rounds (far from ratio: a disturbed run)",
    ]
    if about["quick"]:
        lines.append("a quick run: it shows that everything works, its ratios are rough")
    return [f"- {line}" for line in lines] if markdown else lines


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


def overhead(cases: list[Pair], markdown: bool) -> list[str]:
    """Give the table of the tiny input."""
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


def report(path: Path, markdown: bool) -> str:
    """Make the whole report on one file; raise ReportError if that cannot be done."""
    run = load(path)
    try:
        everything = pairs(run)
        tiny = [pair for pair in everything if pair.case.startswith(OVERHEAD)]
        cases = [pair for pair in everything if pair not in tiny]
        plain = [pair for pair in cases if pair.operation == PLAIN]
        lines = head(run, cases, markdown)
        lines += body(plain, markdown) + means(plain, "", markdown)
        lines += fused([pair for pair in cases if pair not in plain], markdown)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} was not written by this suite: {error!r}") from error
    if not everything:
        raise ReportError(f"{path} holds no case with both {RIVAL} and {OURS}: nothing to compare")
    return "\n".join(lines + overhead(tiny, markdown) + slower(everything))


def main(arguments: list[str] | None = None) -> int:
    """Print the report, or on stderr why there is none (exit status 2)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Ratios from a run's JSON.")
    parser.add_argument("json", type=Path, help="what `python -m benchmarks` wrote")
    parser.add_argument("--markdown", action="store_true", help="tables for a Markdown page")
    options = parser.parse_args(arguments)
    try:
        print(report(options.json, options.markdown))
    except ReportError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
