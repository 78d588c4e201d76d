"""Print the table of a run of `python -m benchmarks.training`."""

from pathlib import Path
from typing import Any

from .cells import FileError, read_json
from .tables import table, versions

MIB = 1 << 20


def row(model: str, variant: str, found: dict[str, Any]) -> list[str]:
    """Give the cells of one variant of a model."""
    of_stock = {key: f"{share:.0%}" for key, share in found["of_stock"].items()}
    seconds = {key: f"{value * 1e3:.0f}" for key, value in found["seconds"].items()}
    return [
        f"{model}, {variant}",
        *(f"{found['saved_bytes'] / MIB:.1f}", of_stock["saved_bytes"]),
        *(f"{found['peak_bytes'] / MIB:.1f}", of_stock["peak_bytes"]),
        *(seconds["median"], f"{seconds['min']} to {seconds['max']}", of_stock["seconds"]),
    ]


def head(about: dict[str, Any], models: dict[str, Any]) -> list[str]:
    """Say what the figures were measured on, with what, and what they are."""
    rounds = [found["seconds"]["rounds"] for variants in models.values() for found in variants.values()]
    steps = " to ".join(str(count) for count in sorted({min(rounds), max(rounds)}))
    peak = "max_memory_allocated" if about["device"] == "cuda" else "the highest sum of live storages"
    lines = [
        *versions(about, about["date"]),
        f"allocator: {about['allocator']}",
        f"batch size {about['batch']}, images of {about['size']} x {about['size']}, {about['dtype']}"
        + " under autocast" * (about["dtype"] != "float32"),
        "saved: what forward leaves for backward, each storage once",
        f"peak: parameters, buffers, momentum and batch, plus what a step adds to them at most ({peak})",
        f"ms: medians of {steps} steps, the variants in turns; of stock: below 100 % is less",
    ]
    return lines + ["a quick run: it shows that everything works, its times are rough"] * about["quick"]


def report(path: Path, markdown: bool) -> str:
    """Make the whole report on one file; raise FileError if that cannot be done."""
    run = read_json(path)
    try:
        lines = [f"- {line}" * markdown or line for line in head(run["run"], run["models"])]
        rows = [
            row(model, name, found) for model, variants in run["models"].items() for name, found in variants.items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} was not written by benchmarks.training: {error!r}") from error
    header = ["model, variant", "saved MiB", "of stock", "peak MiB", "of stock", "ms", "least to most", "of stock"]
    return "\n".join([*lines, "", *table(header, rows, markdown)])
