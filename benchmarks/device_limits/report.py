"""The tables of a run of `python -m benchmarks.device_limits`."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..cells import FileError, read_json
from ..tables import table, title

Figure = dict[str, Any]


def gb_per_s(figure: Figure, key: str = "us") -> float:
    """Bytes read and written in its time."""
    return float(figure["bytes"]) / figure[key] / 1e3


def rate(figure: Figure) -> str:
    """GB/s, as a cell; there is none where a difference of times has come out as nothing."""
    return f"{gb_per_s(figure):.0f}" if figure["us"] > 0 else "-"


def nanoseconds(figure: Figure) -> str:
    """A time, as a cell."""
    return f"{figure['us'] * 1e3:.0f}"


def microseconds(figure: Figure) -> str:
    """A time, as a cell."""
    return f"{figure['us']:.2f}"


def pivot(
    figures: Iterable[Figure],
    corner: str,
    row: Callable[[Figure], str],
    column: Callable[[Figure], str],
    cell: Callable[[Figure], str],
    markdown: bool,
) -> list[str]:
    """A table of the figures that there are, rows and columns in the order of their first ones."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for figure in figures:
        columns.setdefault(column(figure))
        cells.setdefault(row(figure), {})[column(figure)] = "-" if "error" in figure else cell(figure)
    if not cells:
        return ["nothing was measured"]
    rows = [[name, *(found.get(key, "") for key in columns)] for name, found in cells.items()]
    return table([corner, *columns], rows, markdown)


def of_table(figures: Sequence[Figure], name: str) -> list[Figure]:
    """Those of one table of a part."""
    return [figure for figure in figures if figure["table"] == name]


def placed(figure: Figure) -> str:
    """How many blocks of how many threads are on a multiprocessor."""
    return f"{figure['blocks_per_sm']} x {figure['threads']}"


def best_copy(copy: Sequence[Figure]) -> float:
    """GB/s of the fastest copy, by its median; NaN if there is none."""
    rates = [gb_per_s(f) for f in copy if f.get("what") == "copy" and "error" not in f]
    return max(rates, default=float("nan"))


class Line:
    """Microseconds of a wave against rows of a thread: fixed + per_row * rows, by least squares."""

    def __init__(self, figures: Sequence[Figure]):
        points = [(figure["rows"], figure["us"] / figure["waves"]) for figure in figures if "error" not in figure]
        self.known = len({rows for rows, _ in points}) > 1
        self.per_row, self.fixed = (
            statistics.linear_regression(*zip(*points, strict=True)) if self.known else (float("nan"),) * 2
        )

    def cells(self, block: "Line") -> list[str]:
        """Both numbers, the fixed one in rows of `block`, and what it has more than that."""
        if not self.known:
            return ["-"] * 4
        in_rows = (self.fixed / block.per_row, (self.fixed - block.fixed) / block.per_row)
        return [f"{self.fixed:.2f}", f"{self.per_row:.3f}", *(f"{rows:.1f}" for rows in in_rows)]


def waves(figures: Sequence[Figure], copy: Sequence[Figure], markdown: bool) -> list[str]:
    """What the planner counts in rows: kRowsOfBlock of both kinds of kernels, and what barriers add to it."""
    by_schedule: dict[str, list[Figure]] = {}
    for figure in of_table(figures, "rows"):
        by_schedule.setdefault(figure["schedule"], []).append(figure)
    general = Line(of_table(copy, "waves"))
    block = Line(by_schedule.get("block", []))
    rows = [["a read, three blocks per multiprocessor", *general.cells(general)[:3], ""]]
    rows += [[f"resident: {name}", *Line(found).cells(block)] for name, found in by_schedule.items()]
    return table(["time of a wave", "fixed us", "us per row", "fixed, in rows", "more than a block's"], rows, markdown)


def copy_tables(figures: Sequence[Figure], markdown: bool) -> list[str]:
    """Ceilings, and what must be in flight."""
    ceilings = of_table(figures, "ceilings")
    best = best_copy(figures)
    lines = title("Ceilings, GB/s read and written: median (best)", markdown)
    lines += pivot(
        ceilings,
        "1 GiB tensors",
        lambda f: f"{f['what']}, {f['hint']}",
        lambda f: f["grid"],
        lambda f: f"{rate(f)} ({gb_per_s(f, 'best_us'):.0f})",
        markdown,
    )
    lines += title("In flight: share of the best copy, by blocks of 256 threads per multiprocessor", markdown)
    lines += pivot(
        of_table(figures, "in flight"),
        "vectors that a thread reads before it uses one",
        lambda f: str(f["rows"]),
        lambda f: str(f["blocks_per_sm"]),
        lambda f: f"{gb_per_s(f) / best:.0%}",
        markdown,
    )
    return lines


def launch_tables(figures: Sequence[Figure], markdown: bool) -> list[str]:
    """Launches, early starts, and what is resident at a time."""
    lines = title("Launches of empty kernels, one behind the other: us each", markdown)
    lines += pivot(of_table(figures, "empty"), "kernel", lambda f: f["what"], lambda f: f["by"], microseconds, markdown)
    lines += title("Chains of copies, us each: of KiB", markdown)
    lines += pivot(
        of_table(figures, "chains"),
        "starts",
        lambda f: f"{f['starts']}, {f['by']}",
        lambda f: str(f["kib"]),
        microseconds,
        markdown,
    )
    lines += title("Copies of MiB in turns, through shared memory and without: us each", markdown)
    turns = of_table(figures, "turns")
    lines += pivot(turns, "kernels", lambda f: f["what"], lambda f: str(f["mib"]), microseconds, markdown)
    lines += title("Calls that the package makes before a launch: us of the host", markdown)
    lines += pivot(of_table(figures, "calls"), "call", lambda f: f["what"], lambda f: "us", microseconds, markdown)
    lines += title("Blocks on a multiprocessor: by CUDA's word (multiprocessors that had as many as wanted)", markdown)
    lines += pivot(
        of_table(figures, "residents"),
        "wanted",
        lambda f: f"{f['wanted']} of {f['threads']} threads, {f['shared_bytes'] / 1024:.0f} KiB",
        lambda f: f"carve-out {f['carveout']}",
        lambda f: f"{f['blocks']} ({f['multiprocessors_seen']})",
        markdown,
    )
    lines += title("Clusters that the device has room for, by blocks of a cluster", markdown)
    lines += pivot(
        of_table(figures, "clusters"),
        "blocks on a multiprocessor",
        placed,
        lambda f: str(f["cluster"]),
        lambda f: str(f["clusters"]),
        markdown,
    )
    return lines


def barrier_tables(figures: Sequence[Figure], markdown: bool) -> list[str]:
    """Barriers and exchanges."""

    def name(figure: Figure) -> str:
        whole = figure["what"] in ("counter barrier", "grid.sync()") and figure.get("blocks") == figure["team"]
        team = ", whole grid" if whole else f", {figure['team']} blocks" * (figure["team"] > 1)
        if "channels" in figure:
            return f"{figure['what']}{team}, {figure['channels']} channel{'s' * (figure['channels'] > 1)}"
        return figure["what"] + team + ", no sleep" * (figure.get("sleep_ns") == 0)

    lines = title("Barriers and exchanges of sums, ns, by blocks x threads on a multiprocessor", markdown)
    return lines + pivot(figures, "of a team", name, placed, nanoseconds, markdown)


def resident_tables(figures: Sequence[Figure], markdown: bool) -> list[str]:
    """Copies through shared memory as shares of plain ones."""
    copies = {f["mib"]: gb_per_s(f) for f in of_table(figures, "copies") if "error" not in f}
    lines = title("Load a slice, exchange, store it: share of a plain copy of the same size, by MiB", markdown)
    lines += pivot(
        of_table(figures, "tensors"),
        "blocks x threads on a multiprocessor, team",
        lambda f: f"{placed(f)}, {f['schedule']}",
        lambda f: str(f["mib"]),
        lambda f: f"{gb_per_s(f) / copies.get(f['mib'], float('nan')):.0%}",
        markdown,
    )
    cells = [f"{copies[mib]:.0f}" for mib in copies]
    return lines + ["", *table(["plain copy", *map(str, copies)], [["GB/s", *cells]], markdown)]


def cache_tables(figures: Sequence[Figure], markdown: bool) -> list[str]:
    """Second reads."""
    lines = title("Behind a read of the same memory: GB/s, by MiB", markdown)
    first = [
        f | {"what": "(the first read)", "us": f["first_us"]}
        for f in figures
        if f["what"] == "read backwards" and "error" not in f
    ]
    return lines + pivot([*first, *figures], "then", lambda f: f["what"], lambda f: str(f["mib"]), rate, markdown)


def slice_tables(figures: Sequence[Figure], markdown: bool) -> list[str]:
    """Narrow slices as shares of whole pixels."""
    whole = {(f["what"], f["pitch"]): f for f in figures if f["slice"] == f["pitch"] and "error" not in f}

    def share(figure: Figure) -> str:
        reference = whole.get((figure["what"], figure["pitch"]))
        return "?" if reference is None else f"{reference['us'] / figure['us']:.0%}"

    lines = title("channels_last in slices: share of the rate of whole pixels, by bytes of a pixel", markdown)
    lines += pivot(
        [figure for figure in figures if figure["slice"] != figure["pitch"]],
        "slice",
        lambda f: f"{f['what']}, {f['slice']} bytes",
        lambda f: str(f["pitch"]),
        share,
        markdown,
    )
    whole_pixels = [figure for figure in figures if figure["slice"] == figure["pitch"]]
    lines += ["", *pivot(whole_pixels, "whole pixels", lambda f: f["what"], lambda f: str(f["pitch"]), rate, markdown)]
    return lines


TABLES = {
    "copy": copy_tables,
    "launches": launch_tables,
    "barriers": barrier_tables,
    "resident": resident_tables,
    "cache": cache_tables,
    "slices": slice_tables,
}


def head(run: dict[str, Any], device: dict[str, Any]) -> list[str]:
    """What was measured, and with what."""
    return [
        f"{run['name']}, compute capability {device['compute_capability']}, {device['multiprocessors']} "
        f"multiprocessors, {device['l2_bytes'] / 2**20:.0f} MiB of L2",
        f"driver {run['driver']}, {run['nvcc']}, {run['architecture']}, {run['date']}",
        f"medians of {device['samples']} runs, every result checked",
    ]


def missing(parts: dict[str, Any]) -> list[str]:
    """Parts and figures that are not there, and why."""
    lines = []
    for name, part in parts.items():
        if "error" in part or not part["complete"]:
            lines.append(f"{name}: {part.get('error', 'its time was over')}")
        reasons: dict[str, int] = {}
        for figure in part["figures"]:
            if "error" in figure:
                reasons[figure["error"]] = reasons.get(figure["error"], 0) + 1
        lines += [f"{name}, figures without a value: {count}, {reason}" for reason, count in reasons.items()]
    return lines


def report(path: Path, markdown: bool) -> str:
    """Make the whole report on one file; raise FileError if that cannot be done."""
    found = read_json(path)
    try:
        parts = found["parts"]
        figures = {name: parts.get(name, {}).get("figures", []) for name in TABLES}
        lines = [f"- {line}" * markdown or line for line in head(found["run"], found["device"])]
        for name, tables in TABLES.items():
            lines += tables(figures[name], markdown) if figures[name] else []
        lines += title("As the planner counts: a wave of blocks", markdown)
        lines += waves(figures["resident"], figures["copy"], markdown)
        gone = missing(parts)
        lines += [*title("Missing", markdown), *(f"- {line}" for line in gone)] if gone else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} was not written by benchmarks.device_limits: {error!r}") from error
    return "\n".join(lines)
