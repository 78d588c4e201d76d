"""The picture of a run of whole models, one for each dtype: speed, memory, and what a step's time is spent on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from examples.digits.figure import DOTS_PER_INCH, new_figure, tidy

from .report import ELEMENTWISE, NORM, OTHER, STOCK, activations

# After the palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {
    STOCK: "#999999",
    "converted": "#F0B95C",
    "fused": "#D55E00",
    "fused+recompute": "#8C3B7A",
    "stock+compile": "#56B4E9",
    "fused+compile": "#0072B2",
}
MODELS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "densenet121": "DenseNet-121",
    "mobilenet_v3_large": "MobileNetV3-Large",
    "efficientnet_b0": "EfficientNet-B0",
}
BAR = 0.84  # of the distance between two models, for all their bars together
Group = dict[str, Any]
# Of a variant of a group: a percentage of stock's with its quartiles, or None where one of both is not known.
Share = Callable[[Group, str], tuple[float, float, float] | None]


def speed(group: Group, name: str) -> tuple[float, float, float] | None:
    """Give images per second: in the median, and where the step's time has its upper and its lower quartile."""
    seconds, stock = (group["variants"][each]["seconds"] for each in (name, STOCK))
    median = 100 * stock["median"]
    middle = seconds["median"]
    return median / middle, median / seconds.get("high", middle), median / seconds.get("low", middle)


def memory(group: Group, name: str) -> tuple[float, float, float] | None:
    """Give the peak of activations."""
    found, stock = (activations(group["variants"][each]) for each in (name, STOCK))
    return (100 * found / stock,) * 3 if found is not None and stock else None


def bars(groups: list[Group], names: list[str]) -> list[tuple[float, Group, str]]:
    """Lay out the bars: for each model those of its variants, side by side around a whole number."""
    width = BAR / len(names)
    return [
        (index + (names.index(name) - (len(names) - 1) / 2) * width, group, name)
        for index, group in enumerate(groups)
        for name in names
        if name in group["variants"]
    ]


def draw_shares(panel: Axes, groups: list[Group], names: list[str], share: Share) -> list[float]:
    """Draw bars that start from stock's 100 %, with their values; give all heights."""
    width = BAR / len(names)
    heights = [98.0, 102.0]
    for position, group, name in bars(groups, names):
        found = share(group, name)
        if found is None:
            continue
        value, low, high = found
        panel.bar(position, value - 100, 0.92 * width, bottom=100, color=COLOURS[name])
        if low < high:
            panel.vlines(position, low, high, color="#222222", linewidth=1)
        up = value >= 100
        panel.annotate(
            f"{value:.0f}", (position, max(high, 100) if up else min(low, 100)), (0, 3 if up else -3),
            textcoords="offset points", ha="center", va="bottom" if up else "top", fontsize=7.5,
        )  # fmt: skip
        heights += [low, high]
    panel.axhline(100, color="#222222", linewidth=1)
    return heights


def draw_time(panel: Axes, groups: list[Group], names: list[str]) -> None:
    """Draw what a step's time is spent on, as a percentage of all of stock's."""
    width = BAR / len(names)
    for position, group, name in bars(groups, names):
        found, stock = (group["variants"][each].get("profile") for each in (name, STOCK))
        if found is None or stock is None:
            continue
        whole = sum(stock["seconds"].values())
        bottom = 0.0
        for kind, alpha in ((NORM, 1.0), (ELEMENTWISE, 0.55), (OTHER, 0.18)):
            height = 100 * found["seconds"][kind] / whole
            panel.bar(position, height, 0.92 * width, bottom=bottom, color=COLOURS[name], alpha=alpha)
            bottom += height


def label_models(panel: Axes, groups: list[Group], batch: int) -> None:
    """Write the models under their bars, with the batch size where it is another than asked for."""
    names = [MODELS.get(group["model"], group["model"]) for group in groups]
    sizes = [f"\nbatch {group['batch']}" * (group["batch"] != batch) for group in groups]
    panel.set_xticks(range(len(groups)), [name + size for name, size in zip(names, sizes, strict=True)])
    panel.set_xlim(-0.55, len(groups) - 0.45)
    panel.grid(axis="x", visible=False)
    panel.tick_params(axis="x", length=0)


def picture(run: dict[str, Any], dtype: str, path: Path) -> None:
    """Draw one dtype: a column for each layout."""
    groups = [group for group in run["groups"] if group["dtype"] == dtype]
    columns = {layout: [each for each in groups if each["layout"] == layout] for layout in layouts(groups)}
    names = [name for name in COLOURS if any(name in group["variants"] for group in groups)]
    others = [name for name in names if name != STOCK]
    profiled = any("profile" in found for group in groups for found in group["variants"].values())
    about = run["run"]

    width = sum(max(4.5, 0.5 + 0.26 * len(here) * len(names)) for here in columns.values())
    title = f"Training steps on {about['name']}, {dtype}, batch {about['batch']}, {about['size']} x {about['size']}"
    figure = new_figure(max(width, 8), 0.9 + 3.1 * (2 + profiled), title)
    panels = figure.subplots(2 + profiled, len(columns), squeeze=False, sharey="row")
    heights: list[list[float]] = [[], []]
    for column, (layout, here) in enumerate(columns.items()):
        heights[0] += draw_shares(panels[0, column], here, others, speed)
        tidy(panels[0, column], f"Images per second, {layout}", "", "% of stock's; up is faster")
        heights[1] += draw_shares(panels[1, column], here, others, memory)
        tidy(panels[1, column], f"Peak memory of activations, {layout}", "", "% of stock's; down is less")
        if profiled:
            draw_time(panels[2, column], here, names)
            shades = "from dark to pale: batch norm, other element-wise arithmetic, the rest"
            of = "kernels" if about["device"] == "cuda" else "operators"
            tidy(panels[2, column], f"Time of a step's {of}, {layout}", shades, "% of stock's")
        for panel in panels[:, column]:
            label_models(panel, here, about["batch"])
    for row, ends in enumerate(heights):
        room = 0.1 * (max(ends) - min(ends))  # for the values beside the bars
        panels[row, 0].set_ylim(min(ends) - room, max(ends) + room)
    for panel in panels[:, 1:].flat:
        panel.set_ylabel("")
    colours = [Patch(color=COLOURS[name], label=name) for name in (names if profiled else others)]
    figure.legend(handles=colours, loc="outside lower center", ncols=len(colours), frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def layouts(groups: list[Group]) -> list[str]:
    """List the layouts in the order of the run."""
    return list(dict.fromkeys(group["layout"] for group in groups))


def save(run: dict[str, Any], path: Path) -> list[Path]:
    """Draw a run: into `path` if it has one dtype, else into a file for each, named after it."""
    dtypes = list(dict.fromkeys(group["dtype"] for group in run["groups"]))
    paths = [path if len(dtypes) == 1 else path.with_stem(f"{path.stem}-{dtype}") for dtype in dtypes]
    for dtype, each in zip(dtypes, paths, strict=True):
        picture(run, dtype, each)
    return paths
