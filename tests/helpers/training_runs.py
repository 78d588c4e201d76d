"""Runs of the benchmark of whole models, on tiny ones."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.training import __main__ as training

SIZE = 18


def tiny() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))


class Run:
    """Calls the benchmark on tiny models, and reads its JSON."""

    def __init__(self, path: Path):
        self.path = path
        self.models = ["tiny"]

    def options(self, *arguments: str) -> list[str]:
        """Make a command line."""
        return ["--quick", "--models", *self.models, "--size", str(SIZE), "--json", str(self.path), *arguments]

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """Run, and give the JSON."""
        training.run(training.parse(self.options(*arguments)))
        return self.read()

    def main(self, *arguments: str) -> int:
        """Give the exit status."""
        return training.main(self.options(*arguments))

    def read(self) -> dict[str, Any]:
        """Give the JSON."""
        content: dict[str, Any] = json.loads(self.path.read_text())
        return content


def cost(whole: float, **compiled: float) -> dict[str, Any]:
    return {"cost_seconds": {"whole": whole, "compiled": compiled}}
