"""The README's example runs as pasted."""

import re
from pathlib import Path
from typing import Any

import torch

import bn_ext

README = Path(__file__).parents[1] / "README.md"


def test_example_of_the_readme_trains_a_fused_model() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert isinstance(names["model"][1], bn_ext.BatchNorm2d)
    assert type(names["model"]) is not torch.nn.Sequential, "nothing was fused"
    assert all(p.grad is not None for p in names["model"].parameters())
