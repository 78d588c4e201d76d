"""Tables and pictures of whole models: `python -m benchmarks.training.report FILE [--markdown] [--plot PNG]`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..cells import FileError, drawing, read_json
from ..tables import table, title, versions

MIB = 1 << 20
STOCK = "stock"  # as in trainee.py, which is not imported: a report needs neither torch nor bn_ext
NORM, ELEMENTWISE, OTHER = "batch norm", "element-wise", "other"  # likewise, of step_profile.py
# In this order, and no sooner than this is a variant called slower than stock, of the median of whole steps.
SLOWER = 1.005
HEADER = [
    *("model, variant", "images/s", "of stock", "ms", "least to most"),
    *("kept MiB", "of stock", "peak MiB", "activations", "of stock", "norm", "norm +"),
]


def share(part: float | None, whole: float | None) -> str:
    """Give a percentage, or a dash where one of both is not known."""
    return "-" if part is None or not whole else f"{part / whole:.0%}"


def mib(count: float | None) -> str:
    """Give a size, or a dash."""
    return "-" if count is None else f"{count / MIB:.1f}" if count < 1000 * MIB else f"{count / MIB:.0f}"


def speed(images: float) -> str:
    """Give images per second, with three digits at least."""
    return f"{images:.0f}" if images >= 100 else f"{images:.3g}"


def activations(found: dict[str, Any]) -> float | None:
    """Give the bytes that a step adds at most to what lies there between steps."""
    return found["peak_bytes"] - found["resident_bytes"] if "peak_bytes" in found else None


def profiled(found: dict[str, Any], *classes: str) -> float | None:
    """Give the share of some classes of kernels in a step's device time."""
    if "profile" not in found:
        return None
    seconds = found["profile"]["seconds"]
    return sum(seconds[name] for name in classes) / sum(seconds.values())


def row(label: str, found: dict[str, Any], stock: dict[str, Any], batch: int) -> list[str]:
    """Give the cells of one variant of a model."""
    milliseconds = {key: f"{found['seconds'][key] * 1e3:.0f}" for key in ("median", "min", "max")}
    return [
        label,
        speed(batch / found["seconds"]["median"]),
        share(stock["seconds"]["median"], found["seconds"]["median"]),
        milliseconds["median"],
        f"{milliseconds['min']} to {milliseconds['max']}",
        mib(found.get("saved_bytes")),
        share(found.get("saved_bytes"), stock.get("saved_bytes")),
        mib(found.get("peak_bytes")),
        mib(activations(found)),
        share(activations(found), activations(stock)),
        share(profiled(found, NORM), 1.0),
        share(profiled(found, NORM, ELEMENTWISE), 1.0),
    ]


def head(about: dict[str, Any], groups: list[dict[str, Any]]) -> list[str]:
    """Say what the figures were measured on, with what, and what they are."""
    rounds = [found["seconds"]["rounds"] for group in groups for found in group["variants"].values()]
    steps = " to ".join(str(count) for count in sorted({min(rounds), max(rounds)})) if rounds else "no"
    cuda = about["device"] == "cuda"
    lines = [*versions(about, about["date"]), f"allocator: {about['allocator']}"]
    if cuda:
        tf32 = ", ".join(f"{what} {'TF32' if on else 'float32'}" for what, on in about["tf32"].items())
        lines.append(f"cuDNN {about['cudnn']}, which searched for the fastest convolutions; in float32: {tf32}")
    lines += [
        f"batch size {about['batch']} unless a row says otherwise, images of {about['size']} x {about['size']};"
        " bfloat16 is under autocast",
        f"ms: medians of {steps} rounds of whole steps, the variants in turns; images/s: of the median; of stock: above"
        " 100 % is faster",
        "kept: what forward leaves for backward, each storage once; of stock: below 100 % is less, here and for"
        " activations",
        "peak: parameters, buffers, momentum and batch, and what a step adds to them at most, activations above all ("
        + ("torch.cuda.max_memory_allocated" if cuda else "the highest sum of live storages")
        + "); activations: without what is there between steps",
        f"norm: share of batch norm in the {'time of all kernels' if cuda else 'own time of all operators'} of a step; "
        "norm +:"
        " with all other element-wise arithmetic, which in stock is mostly what bn_ext's and the compiler's kernels do"
        " within batch norm: activations and additions",
        "-: not measured" + " (the parts of compiled code are not seen on a CPU)" * (not cuda),
    ]
    return lines + ["a quick run: it shows that everything works, its times are rough"] * about["quick"]


def tables(groups: list[dict[str, Any]], batch: int, markdown: bool) -> list[str]:
    """Give a table for each dtype and layout."""
    lines: list[str] = []
    for kind in dict.fromkeys((group["dtype"], group["layout"]) for group in groups):
        rows = []
        for group in groups:
            if (group["dtype"], group["layout"]) == kind:
                other = f" (batch {group['batch']})" * (group["batch"] != batch)
                variants = group["variants"]
                for name, found in variants.items():
                    rows.append(row(f"{group['model']}{other}, {name}", found, variants[STOCK], group["batch"]))
        lines += title(", ".join(kind), markdown) + table(HEADER, rows, markdown)
    return lines


def slower(groups: list[dict[str, Any]]) -> list[str]:
    """Name every variant of ours that takes longer than stock, compiled ones than compiled stock."""
    cases, losses = 0, []
    for group in groups:
        for name, found in group["variants"].items():
            rival = "stock+compile" if name.endswith("+compile") else STOCK
            if name == rival or rival not in group["variants"]:
                continue
            cases += 1
            ratio = found["seconds"]["median"] / group["variants"][rival]["seconds"]["median"]
            if ratio > SLOWER:
                losses.append(f"- {place(group)}, {name}: {ratio - 1:.1%} longer than {rival}")
    return [
        "",
        f"more than {SLOWER - 1:.1%} slower than stock, or compiled than compiled stock: {len(losses)} of {cases}",
        *losses,
    ]


def missing(run: dict[str, Any]) -> list[str]:
    """Name what is not in the tables, by reasons."""
    reasons: dict[str, dict[str, list[str]]] = {}

    def note(reason: str, group: dict[str, Any], *variant: str) -> None:
        reasons.setdefault(reason, {}).setdefault(place(group), []).extend(variant)

    for group in run["groups"]:
        for batch in group["out_of_memory_at"]:
            note(f"out of memory at batch size {batch}, so a smaller one", group)
        for name, reason in group["left_out"].items():
            note(reason, group, name)
        for name, found in group["variants"].items():
            if "profile_failed" in found:
                note(f"not profiled: {found['profile_failed']}", group, name)
    for group in run["left_out"]:
        note(group["reason"], group)
    lines = []
    for reason, places in reasons.items():
        lines += ["", f"{reason}:"]
        lines += [f"- {': '.join([where, *[', '.join(names)] * bool(names)])}" for where, names in places.items()]
    return lines


def place(group: dict[str, Any]) -> str:
    """Name a group."""
    return f"{group['model']}, {group['dtype']}, {group['layout']}"


def load(path: Path) -> dict[str, Any]:
    """Read the JSON of a run."""
    run = read_json(path)
    if not isinstance(run, dict) or not {"run", "groups", "left_out"} <= run.keys():
        raise FileError(f"{path} was not written by benchmarks.training: no run, groups and left_out")
    return run


def report(path: Path, markdown: bool) -> str:
    """Make the whole report on one file; raise FileError if that cannot be done."""
    run = load(path)
    try:
        lines = [f"- {line}" * markdown or line for line in head(run["run"], run["groups"])]
        lines += tables(run["groups"], run["run"]["batch"], markdown)
        lines += slower(run["groups"]) + missing(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} was not written by benchmarks.training: {error!r}") from error
    return "\n".join(lines)


def draw(path: Path, picture: Path) -> list[Path]:
    """Draw the pictures of one file; raise FileError if that cannot be done."""
    with drawing():
        from . import plots

        return plots.save(load(path), picture)


def main(arguments: list[str] | None = None) -> int:
    """Print the report and draw, or say on stderr why that cannot be done (exit status 2)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.report", description="Tables and pictures of a run of whole models."
    )
    parser.add_argument("json", type=Path, help="what `python -m benchmarks.training` wrote")
    parser.add_argument("--markdown", action="store_true", help="tables for a Markdown page")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw; of several dtypes, one picture each")
    options = parser.parse_args(arguments)
    try:
        print(report(options.json, options.markdown))
        for picture in draw(options.json, options.plot) if options.plot else []:
            print(f"drawn: {picture}", file=sys.stderr)
    except FileError as error:
        print(f"benchmarks.training.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
