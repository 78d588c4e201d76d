"""The picture of a run of `python -m benchmarks.convergence`: a row for each dtype, all seeds and their means."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from examples.digits.figure import BROAD, DASHED, DOTS_PER_INCH, new_figure, tidy

from .report import FUSED, STOCK, by_dtype, finals

STROKES = {STOCK: BROAD, FUSED: DASHED}
ZOOM_FROM = 0.25  # of the steps, in the panel that shows the end


def draw_curves(panel: Axes, trainings: list[dict[str, Any]], what: str, first: int = 0) -> None:
    """Draw each seed, thin, and the means."""
    steps = trainings[0]["steps"][first:]
    for name, stroke in STROKES.items():
        curves = [training["variants"][name][what][first:] for training in trainings]
        for curve in curves:
            panel.plot(steps, curve, color=stroke["color"], linewidth=0.7, alpha=0.45)
        panel.plot(steps, [statistics.mean(values) for values in zip(*curves, strict=True)], label=name, **stroke)


def draw_finals(panel: Axes, trainings: list[dict[str, Any]]) -> None:
    """Draw the final accuracies, each seed's pair joined by a line, and their means."""
    for training in trainings:
        pair = [finals([training], name)[0] for name in STROKES]
        panel.plot([0, 1], pair, color="#AAAAAA", linewidth=1, zorder=1)
    for position, (name, stroke) in enumerate(STROKES.items()):
        values = finals(trainings, name)
        mean = statistics.mean(values)
        panel.scatter([position] * len(values), values, color=stroke["color"], s=28, zorder=2)
        panel.hlines(mean, position - 0.22, position + 0.22, color=stroke["color"], linewidth=2)
        panel.annotate(f"{mean:.2f}", (position + 0.26, mean), va="center", fontsize=9)
    panel.set_xticks([0, 1], list(STROKES))
    panel.set_xlim(-0.4, 1.65)


def save(run: dict[str, Any], path: Path) -> None:
    """Draw a run into a file."""
    rows = by_dtype(run)
    title = f"Residual network on handwritten digits, three seeds, on {run['run']['name']}"
    figure = new_figure(13, 0.8 + 3.5 * len(rows), title)
    panels = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(1.1, 1.1, 0.7))
    for (dtype, trainings), (loss, accuracy, final) in zip(rows.items(), panels, strict=True):
        draw_curves(loss, trainings, "loss")
        loss.set_yscale("log")
        every = trainings[0]["steps"][0]
        tidy(loss, f"Training loss, {dtype}", "training step", f"cross-entropy, mean of {every} steps (nats)")
        loss.legend(title="mean; thin: each seed", loc="upper right")
        draw_curves(accuracy, trainings, "accuracy", int(ZOOM_FROM * len(trainings[0]["steps"])))
        tidy(accuracy, f"Test accuracy, {dtype}", "training step", "test images correct (%)")
        draw_finals(final, trainings)
        tidy(final, "Final accuracy", "each dot a seed; bar: the mean", "test images correct (%)")
        final.grid(axis="x", visible=False)
        for panel in (accuracy, final):
            panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    figure.savefig(path, dpi=DOTS_PER_INCH)
