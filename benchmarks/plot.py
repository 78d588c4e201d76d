"""Draw a run's speed as shares of the copy's: a panel for each layout and direction, a bar for each provider."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .cells import Cell, Key, Run
from .names import COMPILED, CUDNN_GRAPH, OURS, PROVIDERS, RIVAL, WITHOUT_CUDNN
from .operations import PLAIN
from .rivals import ceiling
from .shapes import RESNET50

COLOURS = {OURS: "#d1495b", RIVAL: "#30638e", WITHOUT_CUDNN: "#7fa6c9", COMPILED: "#edae49", CUDNN_GRAPH: "#66a182"}
LAYOUTS = ("contiguous", "channels_last")
DIRECTIONS = ("forward", "backward")
SHAPES = tuple(shape.name for shape in RESNET50)


def chosen(run: Run) -> tuple[str, int]:
    """Choose the dtype and the batch size that are drawn: bfloat16 and the largest, if they were measured."""
    keys = [key for key in run.cells if drawn(key)]
    dtype = min((key.dtype for key in keys), default="bfloat16")
    batches = [key.shape[0] for key in keys if key.dtype == dtype]
    return dtype, max(batches, key=lambda batch: (batches.count(batch), batch), default=0)


def drawn(key: Key) -> bool:
    """Say whether a cell is of a kind that is drawn."""
    return key.operation == PLAIN and key.clock == "kernels" and key.case in SHAPES and key.direction in DIRECTIONS


def bars(axes: Axes, cells: dict[str, Cell], providers: list[str], top: float) -> None:
    """Draw one panel: all shapes, and for each those who were timed, side by side around its place."""
    width = 0.8 / max(1, len(providers))
    for place, shape in enumerate(SHAPES):
        timed = [name for name in providers if shape in cells and name in cells[shape].sides]
        for i, provider in enumerate(timed):
            share = 100 * cells[shape].gb_per_s(provider) / top
            axes.bar(place + width * (i - (len(timed) - 1) / 2), share, width, color=COLOURS[provider], zorder=2)
    axes.axhline(100, color="#444444", linewidth=1, linestyle="--", zorder=1)
    names = [shape.split("_")[1] for shape in SHAPES]
    axes.set_xticks(range(len(SHAPES)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw(run: Run, path: Path) -> None:
    """Write the plot."""
    dtype, batch = chosen(run)
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    panels = figure.subplots(len(LAYOUTS), len(DIRECTIONS), sharex=True, sharey=True)
    shown = {key: cell for key, cell in run.cells.items() if drawn(key) and (key.dtype, key.shape[0]) == (dtype, batch)}
    timed = {name for cell in shown.values() for name in cell.sides}
    providers = [name for name in (OURS, *PROVIDERS[:-1]) if name in timed]
    for layout, row in zip(LAYOUTS, panels, strict=True):
        for direction, axes in zip(DIRECTIONS, row, strict=True):
            cells = {k.case: c for k, c in shown.items() if (k.layout, k.direction) == (layout, direction)}
            bars(axes, cells, providers, ceiling(run))
            axes.set_title(f"{layout}, {direction}", loc="left", fontsize=11)
    for row in panels:
        row[0].set_ylabel("least bytes / time, % of a copy")
    handles = [Patch(color=COLOURS[name], label=name) for name in providers]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False)
    made_on = ", ".join([run.about["name"], f"torch {run.about['torch']}", run.about["date"]])
    figure.suptitle(
        f"Batch norm of ResNet-50's layers, {dtype}, N = {batch}: {made_on}"
        "\n100 % (dashed): the copy of a large tensor in the same run; kernel times with a cold cache",
        fontsize=11,
        ha="left",
        x=0.01,
    )
    figure.savefig(path, dpi=120)
