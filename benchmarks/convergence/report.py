"""Whether training ended as well: the sentence and the picture of a run of `python -m benchmarks.convergence`.

`python -m benchmarks.convergence.report FILE [--plot PNG]`; exit status 1 if a difference is not within noise.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from ..cells import FileError, drawing, read_json
from ..tables import versions

STOCK, FUSED = "stock", "fused"
LAST = 5  # measurements whose median is a training's final accuracy: at a single one it may dip
# Student's t for 2 (n - 1) degrees of freedom, which chance alone exceeds in one of twenty cases.
T = {2: 4.303, 3: 2.776, 4: 2.447, 5: 2.306}
RULE = (
    "final accuracy: the median of a training's last five measurements; within noise: the means of stock and fused"
    " differ by at most one test image, or by no more than chance alone exceeds in one of twenty cases (t-test, over"
    " the seeds)"
)


def finals(trainings: list[dict[str, Any]], variant: str) -> list[float]:
    """List the final accuracies, in percent, one for each seed."""
    return [statistics.median(each["variants"][variant]["accuracy"][-LAST:]) for each in trainings]


def verdict(trainings: list[dict[str, Any]], test_images: int) -> tuple[str, bool]:
    """Compare the final accuracies of one dtype, in a sentence; and say whether they are within noise."""
    stock, fused = finals(trainings, STOCK), finals(trainings, FUSED)
    means = [statistics.mean(values) for values in (stock, fused)]
    deviations = [statistics.stdev(values) if len(values) > 1 else math.nan for values in (stock, fused)]
    said = ", ".join(
        f"{name} {mean:.2f} % (standard deviation {deviation:.2f})"
        for name, mean, deviation in zip((STOCK, FUSED), means, deviations, strict=True)
    )
    if not all(found["finite"] for each in trainings for found in each["variants"].values()):
        return f"{said}; a weight or a running statistic is not finite", False
    if len(stock) not in T:
        return f"{said}; {len(stock)} seed alone tells nothing of the noise", True
    apart = abs(means[0] - means[1])
    chance = T[len(stock)] * math.sqrt(sum(deviation**2 for deviation in deviations) / len(stock))
    allowed = max(chance, 100 / test_images)
    close = apart <= allowed + 1e-9
    return (
        f"{said}; {apart:.2f} points apart, up to {allowed:.2f} is noise: {'' if close else 'NOT '}within noise",
        close,
    )


def by_dtype(run: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Gather the trainings of each dtype."""
    gathered: dict[str, list[dict[str, Any]]] = {}
    for training in run["trainings"]:
        gathered.setdefault(training["dtype"], []).append(training)
    return gathered


def report(run: dict[str, Any]) -> tuple[str, bool]:
    """Give the text on a run, and whether everything is within noise."""
    about = run["run"]
    lines = [*versions(about, about["date"]), RULE]
    lines += ["a quick run: it shows that everything works, nothing has converged"] * about["quick"]
    all_close = True
    for dtype, trainings in by_dtype(run).items():
        said, close = verdict(trainings, about["test_images"])
        all_close &= close
        seeds = ", ".join(str(each["seed"]) for each in trainings)
        lines.append(f"{dtype}, {trainings[0]['steps'][-1]} steps, seeds {seeds}: {said}")
    lines += [f"no time was left for {each['dtype']}, seed {each['seed']}" for each in run["left_out"]]
    return "\n".join(lines), all_close


def draw(run: dict[str, Any], picture: Path) -> None:
    """Draw the curves of every dtype."""
    with drawing():
        from . import plots

        plots.save(run, picture)


def show(path: Path, picture: Path | None) -> int:
    """Print the text on a file and draw it; give the exit status."""
    run = read_json(path)
    try:
        text, close = report(run)
        print(text)
        if picture and run["trainings"]:
            draw(run, picture)
            print(f"drawn: {picture}", file=sys.stderr)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} was not written by benchmarks.convergence: {error!r}") from error
    return 0 if close else 1


def main(arguments: list[str] | None = None) -> int:
    """Print the text and draw, or say on stderr why that cannot be done (exit status 2)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("json", type=Path, help="what `python -m benchmarks.convergence` wrote")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw")
    options = parser.parse_args(arguments)
    try:
        return show(options.json, options.plot)
    except FileError as error:
        print(f"benchmarks.convergence.report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
