"""For the tests of changes after fusing: a module whose forward reads state of every kind."""

import enum
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from helpers.fusing import FUSED, seen_of, x_of

GLOBAL = 1.0
SETTINGS: dict[str, Any] = {"scales": [1.0]}
ELSEWHERE = ModuleType("helpers_elsewhere")
ELSEWHERE.scale = 1.0  # type: ignore[attr-defined]
sys.modules[ELSEWHERE.__name__] = ELSEWHERE


class Mode(enum.Enum):
    """How."""

    A = 1
    B = 2


class Config:
    """Settings as an object, with a default of the class."""

    shift = 0.0

    def __init__(self) -> None:
        self.scale, self.inner = 1.0, SimpleNamespace(scales=[1.0])


class Helper:
    """An object with a method."""

    def run(self, y: Tensor) -> Tensor:
        return y * 1.0

    @property
    def scale(self) -> float:
        return 1.0


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


def scaled(y: Tensor) -> Tensor:
    """A function that forward() calls."""
    return y * GLOBAL


def with_closure(scale: list[float]) -> Callable[[Tensor], Tensor]:
    """A function with a closure."""
    return lambda y: y * scale[0]


class Leaf(nn.Module):
    """A child with settings that its parent reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.sizes = 1.0, {"a": [1, 2]}

    def forward(self, x: Tensor) -> Tensor:
        return x


class Block:
    """A class that is an attribute, as those of residual networks."""

    expansion = 1


class Base(nn.Module):
    """What a subclass reads by super()."""

    base_scale = 1.0

    def post(self, y: Tensor) -> Tensor:
        return y * self.base_scale


class Net(Base):
    """Reads attributes of every kind; all are such that they change nothing at first."""

    flag = False
    classwide = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.mode, self.number, self.array, self.device = Mode.A, np.float32(1), np.ones(2), torch.device("cpu")
        self.depths, self.nested, self.choices, self.table = [0], {"a": [0, {"b": 0}]}, {1, 2}, {"x": 1.0, "y": 2.0}
        self.config, self.slotted, self.pair = Config(), Slotted(), (1.0, [1.0])
        self.helper = Helper()
        self.function, self.closure, self.activation = scaled, with_closure([1.0]), F.relu
        self.extra, self.steps, self.named = nn.ModuleList(), nn.Sequential(), nn.ModuleDict({"p": Leaf(), "q": Leaf()})
        self.leaf, self.optional = Leaf(), None
        self.block = Block
        self.register_parameter("gain", None)
        self.register_buffer("offset", None)
        self.plain = torch.full((3, 1, 1), 2.0)
        self.left, self.right, self.other = nn.Identity(), nn.Identity(), self.leaf
        self.one, self.two = [1.0], [1.0]
        self.three = self.one

    @property
    def half(self) -> float:
        return self.config.scale / 2

    def post(self, y: Tensor) -> Tensor:
        return super().post(y)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.bn(x))
        y = y * 2 if self.mode is Mode.B else y
        y = y * float(self.number) * float(self.array[0])
        for _ in range(self.depths[0] + self.nested["a"][0] + self.nested["a"][1]["b"]):
            y = y + 1
        y = y * 5 if 3 in self.choices else y
        y = y * next(iter(self.table.values())) * self.pair[0] * self.pair[1][0]
        y = y * self.config.scale * self.config.inner.scales[0] * self.slotted.scale + self.config.shift
        y = self.closure(self.function(y)) * self.half * 2
        y = self.helper.run(y) * self.helper.scale * self.block.expansion
        for module in self.extra:
            y = module(y)
        y = self.steps(y)
        for number, (name, module) in enumerate(self.named.items()):
            y = module(y) + number * len(name) * (name == "q")
        y = y * self.leaf.scale + self.leaf.sizes["a"][0] - 1
        y = y if self.optional is None else self.optional(y)
        y = y if self.gain is None else y * self.gain
        y = y if self.offset is None else y + self.offset
        y = y * getattr(self, "missing", 1.0)
        y = y + 1 if hasattr(self, "absent") else y
        y = y * 3 if self.flag else y
        y = y * type(self).classwide * SETTINGS["scales"][0] * ELSEWHERE.scale
        y = y * self.plain if self.plain.dim() == 3 else y
        y = y * (2 if self.left is self.right else 3) * (5 if self.other is self.leaf else 7)
        y = y * (2 if self.one is self.two else 3) * (5 if self.one is self.three else 7)
        return self.post(y) + len(self.bn._parameters) - 2


class Simple(nn.Module):
    """Reads only what torch.compile can compare: no closures, objects or arrays."""

    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.mode, self.depths, self.nested, self.table = Mode.A, [0], {"a": [0]}, {"x": 1.0, "y": 2.0}
        self.pair, self.activation = (1.0, [1.0]), F.relu
        self.extra, self.leaf, self.optional = nn.ModuleList(), Leaf(), None
        self.register_parameter("gain", None)
        self.left, self.right, self.other = nn.Identity(), nn.Identity(), self.leaf
        self.one, self.two = [1.0], [1.0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.bn(x))
        y = y * 2 if self.mode is Mode.B else y
        for _ in range(self.depths[0] + self.nested["a"][0]):
            y = y + 1
        y = y * next(iter(self.table.values())) * self.pair[0] * self.pair[1][0] * self.leaf.scale
        for module in self.extra:
            y = module(y)
        y = y if self.optional is None else self.optional(y)
        y = y if self.gain is None else y * self.gain
        y = y * getattr(self, "missing", 1.0)
        y = y * 3 if self.flag else y
        y = y * (2 if self.left is self.right else 3) * (5 if self.other is self.leaf else 7)
        return y * (2 if self.one is self.two else 3) * GLOBAL


class Coded(nn.Module):
    """Code of every kind that forward() runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    @property
    def half(self) -> float:
        return 0.5

    def post(self, y: Tensor) -> Tensor:
        return y * 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.post(scaled(F.relu(self.bn(x)))) * self.half


def doubling(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that does not name its inner function after the outer one."""

    def inner(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x) * 2

    return inner


class Decorated(nn.Module):
    """A forward behind a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    @doubling
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).relu()


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((3, 1, 1), value))


def fused_and_stock() -> tuple[Net, Net]:
    torch.manual_seed(0)
    fused = bn_ext.fuse(Net().double())
    assert type(fused) is not Net
    assert seen_of(fused, x_of()) == FUSED
    stock = Net().double()
    stock.load_state_dict(fused.state_dict())
    return fused, stock
