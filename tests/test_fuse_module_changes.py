"""A change of how modules and tensors of a model hang together voids the fusion."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.changing import parameter
from helpers.fusing import FUSED, seen_of, x_of
from torch import Tensor, nn

import bn_ext


class Tied(nn.Module):
    """One tensor and one module under two names, of which the graph knows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act, self.first = nn.BatchNorm2d(3), nn.ReLU(), nn.Softplus()
        self.second = self.first
        self.a = self.b = parameter(2.0)
        self.listed = [self.first]
        self.register_buffer("c", torch.full((3, 1, 1), 3.0))
        self.register_buffer("d", self.c)
        self.plain = self.same = torch.full((3, 1, 1), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.bn(x))) * self.b + self.d * self.same.dim()
        return self.listed[0](y) if self.plain is self.same else y


UNTIED: dict[str, Callable[[Tied], Any]] = {
    "a parameter": lambda m: setattr(m, "b", parameter(5.0)),
    "a parameter, by its first name": lambda m: setattr(m, "a", parameter(5.0)),
    "a buffer": lambda m: setattr(m, "d", torch.ones(3, 1, 1)),
    "a module": lambda m: setattr(m, "second", nn.Softplus(beta=3.0)),
    "a module, by its first name": lambda m: setattr(m, "first", nn.Softplus(beta=3.0)),
    "a tensor that is no parameter": lambda m: setattr(m, "same", m.same.clone()),
    "parameters that are assigned": lambda m: m.load_state_dict(
        {name: tensor * (1 + 2 * (name == "b")) for name, tensor in m.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("name", UNTIED)
def test_what_was_one_and_becomes_two_voids_the_fusion(name: str) -> None:
    stock = Tied().double().eval()
    fused = bn_ext.fuse(copy.deepcopy(stock))
    x = x_of()
    assert seen_of(fused, x) == FUSED
    before = stock(x)
    for model in (fused, stock):
        UNTIED[name](model)
    torch.testing.assert_close(fused(x), stock(x))
    assert "first name" in name or not torch.equal(stock(x), before)


class Direct(nn.Module):
    """forward() of a child, which is fused itself, without its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.bn, self.act = Inner(), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.block.forward(x)))


class Inner(nn.Module):
    """A batch norm and an activation, which are fused, and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act, self.scale = nn.BatchNorm2d(3), nn.ReLU(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x)) * self.scale


DIRECT: dict[str, Callable[[Direct], Any]] = {
    "an attribute": lambda m: setattr(m.block, "scale", 3.0),
    "an activation": lambda m: setattr(m.block, "act", nn.Tanh()),
    "a hook": lambda m: m.block.act.register_forward_hook(lambda module, args, y: y * 3),
    "a mode": lambda m: m.block.train(),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_change_of_a_child_whose_forward_is_called_voids_the_fusion(name: str) -> None:
    stock = Direct().double().eval()
    fused = bn_ext.fuse(copy.deepcopy(stock))
    x = x_of()
    before = stock(x)
    for model in (fused, stock):
        DIRECT[name](model)
    expected = stock(x)
    torch.testing.assert_close(fused(x), expected)
    torch.testing.assert_close(fused.state_dict(), stock.state_dict())
    assert not torch.equal(expected, before)


class Outer(nn.Module):
    """An activation behind a child that is inlined, and fused itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act = Half(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.block(x))


class Half(nn.Module):
    """Two batch norms, of which one is followed by an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def test_a_subclass_of_the_class_of_an_inlined_child_is_heeded() -> None:
    stock = Outer().double().eval()
    fused, x = bn_ext.fuse(copy.deepcopy(stock)), x_of()
    assert seen_of(fused, x) == [("relu", False)] * 2
    for model in (fused, stock):
        model.block.__class__ = type("Half", (type(model.block),), {"forward": lambda self, x: x * 7})
    torch.testing.assert_close(fused(x), stock(x))


def test_another_forward_of_the_type_of_an_inlined_child_is_heeded() -> None:
    fused, x = bn_ext.fuse(Outer().double()), x_of()
    assert seen_of(fused, x) == [("relu", False)] * 2
    with mock.patch.object(type(fused.block), "forward", lambda self, x: x * 7):
        torch.testing.assert_close(fused(x), F.relu(x * 7))
    assert type(bn_ext.revert(fused).block) is Half


class Between(nn.Module):
    """A call between the batch norm and the addition that takes it over must not write to the batch norm's input."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.bn, self.side = first, nn.BatchNorm2d(3), nn.Sequential(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        t = self.first(x)
        y = self.bn(t)
        return F.relu(y + self.side(x if isinstance(self.first, nn.Conv2d | nn.Identity) else t))


MOVED: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
    "the side becomes in-place": (nn.Tanh(), lambda m: setattr(m.side[0], "inplace", True)),
    "the side is replaced": (nn.Tanh(), lambda m: m.side.__setitem__(0, nn.ReLU(inplace=True))),
    "the side gets a child": (nn.Tanh(), lambda m: m.side.append(nn.Hardtanh(-0.1, 0.1, inplace=True))),
    "the side gets a hook": (nn.Tanh(), lambda m: m.side[0].register_forward_pre_hook(lambda m, x: x[0].mul_(2))),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_change_of_a_call_between_voids_the_fusion(name: str) -> None:
    first, change = MOVED[name]
    fused, stock = (Between(first).double() for _ in range(2))
    assert seen_of(bn_ext.fuse(fused), x_of()) == [("relu", True)]
    stock.load_state_dict(fused.state_dict())
    x = x_of()
    for model in (fused, stock):
        change(model)
    with torch.no_grad():  # autograd refuses to write to a saved input
        torch.testing.assert_close(fused(x.clone()), stock(x.clone()))


def test_a_change_of_the_convolution_before_voids_the_fusion() -> None:
    """Its result is new memory, so that nothing between can write to it; that of an Identity is the input itself."""
    fused, stock = (Between(nn.Conv2d(3, 3, 1)).double() for _ in range(2))
    for model in (fused, stock):
        model.side[0].inplace = True
    assert seen_of(bn_ext.fuse(fused), x_of()) == [("relu", True)]
    stock.load_state_dict(fused.state_dict())
    x = x_of()
    for model in (fused, stock):
        model.first = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), stock(x.clone()))
