"""bn_ext.fuse: places that are not safe are left alone, with a reason."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import (
    ADD_RELU,
    RELU,
    UNUSED,
    Block,
    assert_same,
    check,
    fused_and_stock,
    inputs,
    seen_of,
)
from torch import Tensor, nn

import bn_ext

Function = Callable[..., Any]


def meanwhile(change: Function, fresh: bool) -> Function:
    """A body in which something is changed between the batch norm and the addition of what is so far not read."""

    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        x = self.conv(x) if fresh else x * 2
        y = self.bn(x)
        w = change(self, z if fresh else x)
        return F.relu(y + w)

    return body


def doubled_by_statement(self: Block, t: Tensor) -> Tensor:
    t *= 2
    return t


CHANGES: dict[str, Function] = {
    "method": lambda self, t: t.mul_(2),
    "statement": doubled_by_statement,
    "function": lambda self, t: torch.relu_(t),
    "inplace": lambda self, t: F.relu(t, inplace=True),
    "inplace by position": lambda self, t: F.dropout(t, 0.0, True, True),
    "module": lambda self, t: self.act(t),
    "operator": lambda self, t: operator.imul(t, 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_input_that_is_changed_in_place_meanwhile(name: str) -> None:
    """Where the batch norm's input is out of reach of others, it is fused all the same."""
    model = Block(meanwhile(CHANGES[name], fresh=False), nn.ReLU(inplace=True))
    fused, stock, told = fused_and_stock(model)
    assert told == ["its input may be changed in place before the activation or addition", UNUSED]
    with torch.no_grad():  # a batch norm saves its input: torch refuses the backward pass
        for training in (True, False):
            results = [m.train(training)(*arguments) for m in (fused, stock) for arguments in [inputs_of_seed()]]
            torch.testing.assert_close(*results)
    check(meanwhile(CHANGES[name], fresh=True), [ADD_RELU, UNUSED], nn.ReLU(inplace=True))


def inputs_of_seed() -> tuple[Tensor, Tensor]:
    """The same in each call."""
    torch.manual_seed(0)
    return inputs()


def summand_changed_later(self: Block, x: Tensor, z: Tensor) -> Tensor:
    z = z * 1
    y = F.hardswish(self.bn(self.conv(x)) + z)
    z.flatten(1).mul_(2)
    return y + z


def summand_changed_before_the_activation(self: Block, x: Tensor, z: Tensor) -> Tensor:
    z = z * 1
    s = self.bn(self.conv(x)) + z
    w = z.detach().mul_(2)
    return F.relu(s) + w


def write_to_the_other(self: Block, x: Tensor, z: Tensor) -> Tensor:
    z = z * 1
    w = z.view_as(z)
    z += self.bn(self.conv(x))
    return z.relu() + w


def twice(self: Block, x: Tensor, z: Tensor) -> Tensor:
    return self.bn(self.bn(x).relu()).relu()


UNSAFE: dict[str, tuple[Function, str]] = {
    "used elsewhere": (lambda self, x, z: (y := self.bn(x)).relu() + y.sum(), "its result is used 2 times"),
    "returned too": (lambda self, x, z: ((y := self.bn(x)).relu(), y), "its result is used 2 times"),
    "returned": (lambda self, x, z: self.bn(x), "nothing to fuse: its result is returned"),
    "unused": (lambda self, x, z: (self.bn(x), z * 2)[1], "its result is not used"),
    "doubled": (lambda self, x, z: (lambda y: y + y)(self.bn(x)).relu(), "its result is added to itself"),
    "number": (lambda self, x, z: (self.bn(x) + 1).relu(), "nothing to fuse: it is followed by add"),
    "alpha": (lambda self, x, z: torch.add(self.bn(x), z, alpha=2), "nothing to fuse: it is followed by add"),
    "hardtanh": (lambda self, x, z: F.hardtanh(self.bn(x)), "nothing to fuse: it is followed by hardtanh"),
    "softplus": (lambda self, x, z: F.softplus(self.bn(x)), "nothing to fuse: it is followed by softplus"),
    "slope given": (lambda self, x, z: F.prelu(self.bn(x), z[0, :, 0, 0]), "nothing to fuse: it is followed by prelu"),
    "twice": (twice, "it is called more than once"),
    "other tensor written": (write_to_the_other, "the addition writes to its other operand"),
    "summand changed": (summand_changed_later, "its residual is changed in place later"),
    "summand changed early": (
        summand_changed_before_the_activation,
        "its residual is changed in place later",
    ),
    "statistics": (
        lambda self, x, z: self.bn(x).relu() + self.bn.running_mean[:, None, None],
        "its parameters or statistics are also used elsewhere",
    ),
    "keyword": (lambda self, x, z: self.bn(input=x).relu(), "it is not called with exactly one positional argument"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_places_are_left_alone(name: str) -> None:
    body, reason = UNSAFE[name]
    fused = check(body, [reason, UNUSED])
    assert set(seen_of(fused, *inputs())) == {(None, False)}


def test_summand_changed_later_by_a_module() -> None:
    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        z = z * 1
        y = F.hardswish(self.bn(self.conv(x)) + z)
        return y + self.act(z)

    check(body, ["its residual is changed in place later", UNUSED], nn.ReLU(inplace=True))
    check(body, ["batch_norm + add + hardswish", UNUSED], nn.ReLU())


def test_aliases_of_what_is_added_in_place() -> None:
    """torch.fx has no x += y; w is the same tensor as y, so it must see the sum."""

    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        y = x * 2
        w = y
        y *= 3
        y -= z
        return self.bn(self.conv(x)).relu() + y + w

    assert seen_of(check(body, [RELU, UNUSED]), *inputs()) == [("relu", False)]


def test_integers_that_are_raised_are_not_shared() -> None:
    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        n = x.shape[0]
        m = n
        n += 1
        return self.bn(self.conv(x)).relu() * n + m

    check(body, [RELU, UNUSED])


class Sub(nn.BatchNorm2d):
    """Who knows."""


@pytest.mark.filterwarnings("ignore:bn_ext.convert did not convert these")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Sub(3), "it is a Sub, which may compute something else"),
        (lambda: bn_ext.BatchNorm2d(3, activation="silu"), "it has its own activation"),
        (lambda: nn.LazyBatchNorm2d(), "it is lazy: run the model once, then call fuse"),
    ],
)
def test_batch_norms_of_other_kinds(make: Function, reason: str) -> None:
    model, report = bn_ext.fuse(nn.Sequential(make(), nn.ReLU()), report=True)
    assert [row.reason for row in report.rows] == [reason]
    assert not report.fused
    torch.testing.assert_close(model(torch.randn(2, 3, 4, 4)).shape, torch.Size([2, 3, 4, 4]))


HOOKS: dict[str, Function] = {
    "forward": lambda m, f: m.register_forward_hook(lambda m, i, o: f()),
    "forward pre": lambda m, f: m.register_forward_pre_hook(lambda m, i: f()),
    "backward": lambda m, f: m.register_full_backward_hook(lambda m, i, o: f()),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, o: f()),
}


@pytest.mark.parametrize("where", ["bn", "act"])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_still_run(kind: str, later: bool, where: str) -> None:
    model, called = Block(lambda self, x, z: self.act(self.bn(self.conv(x)))), []

    def hook() -> None:
        HOOKS[kind](getattr(model, where), lambda: called.append(1))

    if not later:
        hook()
    fused, _, told = fused_and_stock(model)
    reasons = {"bn": "it has hooks or its own forward method", "act": "nothing to fuse: it is followed by ReLU"}
    assert told[0] == (RELU if later else reasons[where])
    if later:
        assert seen_of(fused, *inputs()) == [("relu", False)]
        hook()
    fused(*inputs()).sum().backward()
    assert called == [1]


class Peek(nn.Module):
    """Reads the statistics of a batch norm that it has no name for."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = [norm]

    def forward(self, z: Tensor) -> Tensor:
        return z * self.norms[0].running_mean[:, None, None] if z.shape[0] else z


class Multiply(nn.Module):
    """Writes to its argument by a parameter that is computed at each call, so its class says that it is torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight.sum()) * 1


READ_STATE: dict[str, Function] = {
    "a view of a statistic": lambda self, x, z: F.relu(self.bn(self.conv(x)) + (z + self.stat)),
    "a view of a view": lambda self, x, z: (m := self.mean.view(3, 1, 1), F.relu(self.bn(self.conv(x)) + z * m))[1],
    "a module": lambda self, x, z: F.relu(self.bn(self.conv(x)) + self.peek(z)),
}


@pytest.mark.parametrize("name", READ_STATE)
def test_statistics_that_may_be_read_meanwhile(name: str) -> None:
    model = Block(READ_STATE[name])
    model.stat, model.peek = model.bn.running_mean[:, None, None], Peek(model.bn)
    model.register_buffer("mean", model.bn.running_mean[:])
    fused, stock, told = fused_and_stock(model)
    fused.peek.norms, stock.peek.norms = [fused.bn], [stock.bn]  # deepcopy of the model has kept them together
    assert told[0].startswith("batch_norm in training, batch_norm + add + relu in evaluation")
    assert_same(fused, stock, inputs())


def test_a_parametrized_class_is_not_torchs() -> None:
    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        t = x.tanh()
        y = self.bn(t)
        return F.relu(y + self.multiply(t))

    model = Block(body)
    model.multiply = nn.utils.parametrizations.weight_norm(Multiply())
    fused, stock, told = fused_and_stock(model)
    assert told[0] == "its input may be changed in place before the activation or addition"
    with torch.no_grad():
        torch.testing.assert_close(fused(*(arguments := inputs())), stock(*arguments))
