"""The look of all figures, of the demo's and of the benchmarks': drawn without a display."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

DOTS_PER_INCH = 150
# bn_ext is drawn thin and dashed over a broad torch.nn: where they coincide, both stay visible.
# The colours are from the palette of Okabe and Ito, which colour-blind readers can tell apart.
BROAD: dict[str, Any] = {"color": "#0072B2", "linewidth": 5.0, "alpha": 0.4}
DASHED: dict[str, Any] = {"color": "#D55E00", "linewidth": 1.5, "linestyle": (0, (4, 1.5))}


def new_figure(width: float, height: float, title: str) -> Figure:
    """Make an empty figure of that many inches under a title."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Give a panel its title, its axes' names, and a grid behind what is drawn."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
