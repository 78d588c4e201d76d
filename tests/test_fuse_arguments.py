"""bn_ext.fuse: a fused forward passes and returns the same values as the original one."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import FUSED, Small, fused_and_stock, seen_of, x_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Appending(nn.Module):
    """Adds to a list; torch.fx cannot trace it."""

    def forward(self, x: Tensor, features: list[Tensor], *_: Any) -> Tensor:
        if x.shape[0]:
            features.append(x * 2)
        return x


class Counting(nn.Module):
    """Counts in a dict."""

    def forward(self, x: Tensor, counts: dict[str, int]) -> Tensor:
        counts["n"] = counts.get("n", 0) + (1 if x.shape[0] else 0)
        return x * counts["n"]


def append(y: Tensor, features: Any) -> Tensor:
    """As the module, in a tuple."""
    if y.shape[0]:
        features[0].append(y * 2)
    return y


@dataclass
class Doubling:
    """Its constructor does more than store."""

    y: Tensor
    n: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        self.y = self.y * 2


class Name(str):
    """A string of another class."""

    def __repr__(self) -> str:
        return "Name()"


class Mode(enum.Enum):
    """Members are made again by name."""

    NEAREST = "nearest"


class Scaling(nn.Module):
    """Takes an Enum member."""

    def forward(self, x: Tensor, mode: Mode) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode=mode.value) if x.shape[0] else x


class Small2(Small):
    """With children and containers for a body."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__(body)
        self.append, self.count, self.scale, self.wrapped = (
            Appending(),
            Counting(),
            Scaling(),
            nn.Sequential(Counting()),
        )
        self.history, self.counts, self.factor, self.name = [1], {"n": 2}, np.sqrt(2.0), Name("nearest")

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x, append)


def a_local_list_for_a_module(self: Small2, x: Tensor, _: Any) -> Tensor:
    features: list[Tensor] = []
    return self.append(self.act(self.bn(x)), features) + sum(features)


def a_local_list_for_a_function(self: Small2, x: Tensor, append: Any) -> Tensor:
    features: list[Tensor] = []
    return append(self.act(self.bn(x)), (features,)) + sum(features)


def a_list_twice(self: Small2, x: Tensor, _: Any) -> Any:
    outputs = [self.act(self.bn(x))]
    return outputs, outputs


OTHERS = "forward() passes a list or a dict to a module or function that is not torch's"
HELD = "forward() returns a list or a dict that is also stored elsewhere"
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a local list for a module": (a_local_list_for_a_module, OTHERS),
    "a local list for a function": (a_local_list_for_a_function, ""),
    "a dict of the model": (lambda self, x, _: self.count(self.act(self.bn(x)), self.counts), OTHERS),
    "a dict for a child of torch's": (lambda self, x, _: self.act(self.bn(x)) + self.wrapped[0](x, {}), OTHERS),
    "a returned list of the model": (lambda self, x, _: (self.act(self.bn(x)), self.history), HELD),
    "a list twice": (a_list_twice, HELD),
    "a dataclass": (
        lambda self, x, _: Doubling(self.act(self.bn(x))),
        "forward() creates or uses a value of type Doubling",
    ),
    "a NumPy number": (
        lambda self, x, _: self.act(self.bn(x)) * self.factor,
        "forward() creates or uses a value of type float64",
    ),
    "a string of another class": (
        lambda self, x, _: F.interpolate(self.act(self.bn(x)), scale_factor=2, mode=self.name),
        "forward() creates or uses a value of type Name, which the generated code cannot create",
    ),
}


def tensors_of(output: Any) -> list[Any]:
    return tree_leaves(vars(output) if isinstance(output, Doubling) else output)


@pytest.mark.parametrize("name", REFUSED)
def test_what_others_may_keep_or_change_is_refused(name: str) -> None:
    body, reason = REFUSED[name]
    fused, stock, [told] = fused_and_stock(Small2(body).double())
    assert told.startswith(reason)
    x = x_of()
    for _ in range(2):  # counts and lists grow
        outputs, expected = fused(x), stock(x)
        torch.testing.assert_close(tensors_of(outputs), tensors_of(expected))
    if name == "a list twice":
        assert outputs[0] is outputs[1]
    if name == "a returned list of the model":
        assert outputs[1] is fused.history


def returning_a_dict(self: Small2, x: Tensor, _: Any) -> Any:
    outputs = {"y": self.act(self.bn(x)), "all": [x]}
    outputs["all"].append(x * 2)
    return outputs


FUSABLE: dict[str, Callable[..., Any]] = {
    "a list for torch": lambda self, x, _: torch.cat([self.act(self.bn(x)), x], dim=1),
    "a list for a method": lambda self, x, _: self.act(self.bn(x)).permute([0, 2, 3, 1])[:, [0, 1]],
    "a fresh dict": returning_a_dict,
    "an Enum member": lambda self, x, _: self.scale(self.act(self.bn(x)), Mode.NEAREST),
}


@pytest.mark.parametrize("name", FUSABLE)
def test_what_the_code_makes_again_is_fused(name: str) -> None:
    fused, stock, _ = fused_and_stock(Small2(FUSABLE[name]).double())
    x = x_of()
    assert seen_of(fused, x) == FUSED
    stock.load_state_dict(fused.state_dict())
    outputs, expected = fused(x), stock(x)
    assert type(outputs) is type(expected)
    torch.testing.assert_close(tensors_of(outputs), tensors_of(expected))
