"""Tables and headings of the reports, for a terminal or for a Markdown page."""

from typing import Any


def table(header: list[str], rows: list[list[str]], markdown: bool) -> list[str]:
    """Lay out a table; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded)

    rule = ["-" * widths[0]] + ["-" * (width - markdown) + ":" * markdown for width in widths[1:]]
    return [line(header), line(rule), *map(line, rows)]


def title(text: str, markdown: bool) -> list[str]:
    """Set a heading apart by blank lines."""
    return ["", f"### {text}", ""] if markdown else ["", text]


def bullets(lines: list[str], markdown: bool) -> list[str]:
    """Make a list of sentences."""
    return [f"- {line}" for line in lines] if markdown else lines


def versions(about: dict[str, Any], date: str) -> list[str]:
    """Name the machine and the software."""
    if about["device"] == "cuda":
        return [
            f"{about['name']}, driver {about.get('driver') or 'unknown'}, CUDA {about.get('cuda') or 'unknown'}",
            f"torch {about['torch']}, bn_ext {about['bn_ext']} (sources {about.get('sources') or 'unknown'}), {date}",
        ]
    return [
        f"{about['name']}, {about['device']}, {about['threads']} threads",
        f"torch {about['torch']}, bn_ext {about['bn_ext']} ({about['instruction_set']}), {date}",
    ]
