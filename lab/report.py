"""Prints predicted beside measured: `python -m lab.report RESULTS`, as lab.first_minutes does at its end."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.tables import table

from .plan import ITEMS

PREDICTIONS = Path(__file__).parent / "predictions.json"
CODES = ("bc0faca", "mended")  # what a prediction is of: the code that the model was made for, and what became of it
HEADER = ["item, run, case", "quantity", "predicted, bc0faca", "predicted, mended", "measured", "measured/predicted"]
Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The results; a last line that was cut off in the middle is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def read_predictions() -> list[Line]:
    """Each holds for the lines that have its `of`: bounds, the code that it is of, where it is from."""
    found: list[Line] = json.loads(PREDICTIONS.read_text())["predictions"]
    return found


def predicted(line: Line, code: str, predictions: Iterable[Line]) -> tuple[float, float] | None:
    """The bounds of what is predicted for a line."""
    for each in predictions:
        if each["code"] == code and each["of"].items() <= line.items():
            low, high = each["predicted"] if isinstance(each["predicted"], list) else [each["predicted"]] * 2
            return float(low), float(high)
    return None


def ratio(value: float, bounds: tuple[float, float]) -> float:
    """Measured by predicted; 1 within the bounds, else by the nearer of them."""
    low, high = bounds
    return 1.0 if low <= value <= high else value / (low if value < low else high)


def words(bounds: tuple[float, float] | None) -> str:
    """A prediction for the table."""
    return "-" if bounds is None else "-".join(f"{value:g}" for value in dict.fromkeys(bounds))


def row(line: Line, predictions: list[Line]) -> list[str]:
    """A line of the table; its ratio is that of the mended code's prediction, if there is one."""
    of_codes = [predicted(line, code, predictions) for code in CODES]
    best = of_codes[1] or of_codes[0]
    names = [str(line[name]) for name in ("run", "case", "operation", "direction", "team") if name in line]
    return [
        f"{line['item']} " + ", ".join(names),
        f"{line['quantity']}, {line['unit']}" if line["unit"] else line["quantity"],
        *map(words, of_codes),
        f"{line['value']:.4g}",
        "-" if best is None else f"{ratio(line['value'], best):.2f}",
    ]


def report(lines: list[Line], markdown: bool = False) -> str:
    """The table, and what could not be measured."""
    predictions = read_predictions()
    figures = [line for line in lines if "value" in line]
    rows = [row(line, predictions) for item in ITEMS for line in figures if line["item"] == item]
    text = table(HEADER, rows, markdown) if rows else ["nothing was measured"]
    text += [f"item {line['item']}, {line['run']}: {line['problem']}" for line in lines if "problem" in line]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    """Print the table of a file."""
    parser = argparse.ArgumentParser(prog="python -m lab.report", description=str(__doc__).splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    print(report(read_lines(options.results), options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
