"""The two figures of the demo, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from .covariate_shift import PERCENTILES, Curve, typical_unit
from .figure import BROAD, DASHED, DOTS_PER_INCH, new_figure, tidy
from .residual import Comparison, Trainee

GOAL = 90.0  # percent of test accuracy, whose step the legend names
STROKES: dict[str, dict[str, Any]] = {
    "no BN": {"color": "#555555", "linewidth": 1.8},
    "torch.nn BN": BROAD,
    "torch.nn": BROAD,
    "bn_ext BN": DASHED,
    "bn_ext": DASHED,
}


def save_covariate_shift(curves: Sequence[Curve], path: Path) -> None:
    """Draw accuracy against steps, and a typical sigmoid's input for each network."""
    title = "What batch normalisation does to a sigmoid network (digits of 8 x 8 pixels)"
    figure = new_figure(11.5, 8, title)
    grid = figure.add_gridspec(2, len(curves), height_ratios=(1.1, 1))
    _draw_accuracy(figure.add_subplot(grid[0, :]), curves)

    unit = typical_unit(curves[0])
    first = figure.add_subplot(grid[1, 0])
    for column, curve in enumerate(curves):
        panel = first if column == 0 else figure.add_subplot(grid[1, column], sharey=first)
        _draw_percentiles(panel, curve, unit)
        panel.label_outer()
    first.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_accuracy(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        steps = curve.steps_to(GOAL)
        reached = f"after {steps} steps" if steps is not None else "not reached"
        label = f"{curve.name}: {GOAL:.0f} % {reached}"
        axes.plot(curve.steps, curve.accuracy, label=label, **STROKES[curve.name])
    axes.axhline(GOAL, color="#222222", linewidth=0.7, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(curves[0].steps[0], curves[0].steps[-1])
    axes.set_ylim(0, 101)
    tidy(axes, "Test accuracy", "training step (logarithmic scale)", "test images correct (%)")
    axes.legend(loc="lower right")


def _draw_percentiles(panel: Axes, curve: Curve, unit: int) -> None:
    low, median, high = torch.stack(curve.percentiles)[:, :, unit].T.tolist()
    colour = STROKES[curve.name]["color"]
    label = f"{PERCENTILES[0]}th to {PERCENTILES[2]}th percentile"
    panel.fill_between(curve.steps, low, high, color=colour, alpha=0.2, linewidth=0, label=label)
    panel.plot(curve.steps, low, color=colour, linewidth=0.7)
    panel.plot(curve.steps, high, color=colour, linewidth=0.7)
    panel.plot(curve.steps, median, color=colour, linewidth=1.6, label="median")
    tidy(panel, curve.name, "training step", f"input of sigmoid {unit}, last hidden layer")


def save_residual(outcome: Comparison, path: Path) -> None:
    """Draw loss, accuracy and step time of torch.nn and bn_ext."""
    pair = (outcome.torch_nn, outcome.bn_ext)
    title = "Residual network on digits of 8 x 8 pixels: the same seed, the same batches"
    figure = new_figure(13, 4.4, title)
    loss, accuracy, times = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.8))

    at = outcome.measured_at
    every = at[0]
    for trainee in pair:
        means = torch.tensor(trainee.losses)[: at[-1]].view(-1, every).mean(dim=1).tolist()
        loss.plot(at, means, label=trainee.name, **STROKES[trainee.name])
        accuracy.plot(at, trainee.accuracy, label=trainee.name, **STROKES[trainee.name])
    loss.set_yscale("log")
    accuracy.set_ylim(top=101)
    tidy(loss, "Training loss", "training step", f"cross-entropy, mean of {every} steps (nats)")
    tidy(accuracy, "Test accuracy", "training step", "test images correct (%)")
    loss.legend(loc="upper right")
    accuracy.legend(loc="lower right")
    _draw_times(times, pair)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_times(panel: Axes, trainees: Sequence[Trainee]) -> None:
    for position, trainee in enumerate(trainees):
        low, median, high = trainee.step_milliseconds()
        panel.bar(position, median, width=0.55, color=STROKES[trainee.name]["color"], alpha=0.75)
        reach = [[median - low], [high - median]]
        panel.errorbar(position, median, yerr=reach, color="#222222", capsize=5, linewidth=1.2)
        panel.annotate(f"{median:.2f} ms", (position, high), (0, 6), textcoords="offset points", ha="center")
    panel.set_xticks(range(len(trainees)), [trainee.name for trainee in trainees])
    panel.margins(x=0.25, y=0.15)
    tidy(panel, "Step time", "median, whiskers at the quartiles", "forward, backward, update (ms)")
    panel.grid(axis="x", visible=False)
