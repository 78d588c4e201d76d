"""Print tables of a run from its JSON: `python -m benchmarks.report FILE [--markdown] [--beside F] [--plot F.png]`."""

import argparse
import sys
from pathlib import Path

from . import pairs, rivals, threads
from .cells import FileError, Run, drawing, load
from .names import OURS, RIVAL
from .tables import bullets, versions


def head(run: Run, markdown: bool) -> list[str]:
    """Say what the figures were measured on, and with."""
    about = run.about
    copy = ", ".join(f"{value:.1f}" for value in about["copy_gb_per_s"])
    lines = [
        *versions(about, about["date"]),
        *([allocator(run)] if about["device"] == "cpu" else []),
        f"copy_ of large tensors: {copy} GB/s read and written, best at the start and at the end",
        *(rivals if about["device"] == "cuda" else pairs).LEGEND,
        f"batch size {batch_sizes(run)}; times are medians",
    ]
    if about.get("over_budget"):
        lines.append(f"{about['over_budget']} cells were not measured, because the time that was given was over")
    if about["quick"]:
        lines.append("a quick run: it shows that everything works, its ratios are rough")
    return bullets(lines, markdown)


def allocator(run: Run) -> str:
    """Say how many page faults are in the times."""
    about = run.about
    faults = max((timing.page_faults for cell in run.cells.values() for timing in cell.sides.values()), default=0.0)
    left = f"{about.get('page_faults_per_64_mib', '?')} page faults per new 64 MiB, at most {faults:.0f} per timed call"
    return f"allocator: {about['allocator']} ({left})"


def batch_sizes(run: Run) -> str:
    """Name the batch sizes of the cases of four dimensions whose kernels were timed."""
    sizes = {key.shape[0] for key in run.cells if len(key.shape) == 4 and key.clock == "kernels"}
    return ", ".join(str(size) for size in sorted(sizes)) or "of each case"


def report(path: Path, markdown: bool) -> str:
    """Make the whole report on one file; raise FileError if that cannot be done."""
    run = load(path)
    if not any({RIVAL, OURS} <= cell.sides.keys() for cell in run.cells.values()):
        raise FileError(f"{path} holds no case with both {RIVAL} and {OURS}: nothing to compare")
    try:
        kind = rivals if run.about["device"] == "cuda" else pairs
        return "\n".join(head(run, markdown) + kind.report(run, markdown))
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} was not written by this suite: {error!r}") from error


def draw(run: Run, path: Path) -> None:
    """Draw the plot; raise FileError if that cannot be done."""
    with drawing():
        from . import plot

        plot.draw(run, path)


def main(arguments: list[str] | None = None) -> int:
    """Print the report, or on stderr why there is none (exit status 2)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Ratios from a run's JSON.")
    parser.add_argument("json", type=Path, help="what `python -m benchmarks` wrote")
    parser.add_argument("--markdown", action="store_true", help="tables for a Markdown page")
    parser.add_argument(
        "--beside", type=Path, metavar="FILE1", help="also the gain over that run, of another number of threads"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the shares of the copy's speed")
    options = parser.parse_args(arguments)
    try:
        text = report(options.json, options.markdown)
        if options.beside:
            text += "\n" + threads.report(options.json, options.beside, options.markdown)
        print(text)
        if options.plot:
            draw(load(options.json), options.plot)
    except FileError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
