"""Fused modules: when the generated code runs, and when the original forward."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import (
    BOTH,
    FUSED,
    INNER_ONLY,
    RELU,
    SEPARATE,
    Scaled,
    Small,
    assert_same,
    calls,
    fused_and_stock,
    outer,
    seen_of,
    x_of,
)
from torch import Tensor, nn

import bn_ext


def test_across_modules() -> None:
    fused, stock = outer()
    assert_same(fused, stock, (x_of().requires_grad_(),))
    assert seen_of(fused.inner, x_of()) == INNER_ONLY  # by itself it does what it did
    assert_same(fused.inner, stock.inner, (x_of().requires_grad_(),))


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], list[tuple[Any, bool]]]] = {
    "setting of the parent": (lambda m: setattr(m, "power", 2), INNER_ONLY),
    "setting of the child": (lambda m: setattr(m.inner[0], "scale", 2.0), [(None, False)] * 2),
    "setting of the activation": (lambda m: setattr(m.act, "negative_slope", 0.5), INNER_ONLY),
    "another activation": (lambda m: setattr(m, "act", nn.SiLU()), INNER_ONLY),
    "a subclass of the activation": (lambda m: setattr(m.act, "__class__", Scaled), INNER_ONLY),
    "another end": (lambda m: setattr(m.inner[0], "end", nn.Sigmoid()), [(None, False)] * 2),
    "an attribute in front of a child": (lambda m: vars(m).update(act=nn.SiLU()), INNER_ONLY),
    "one more child": (lambda m: m.inner.append(nn.Tanh()), INNER_ONLY),
    "a hook on the child": (lambda m: m.inner[0].register_forward_hook(lambda m, i, o: o * 2), INNER_ONLY),
    "a hook on the sequence": (lambda m: m.inner.register_forward_hook(lambda m, i, o: o * 2), INNER_ONLY),
    "a hook on the parent": (lambda m: m.register_forward_hook(lambda m, i, o: o * 2), BOTH),
    "a forward of the child's own": (lambda m: setattr(m.inner[0], "forward", torch.exp), []),
    "what a call of the child does": (lambda m: setattr(m.inner[0], "_call_impl", torch.exp), []),
    "another mode of the child": (lambda m: m.inner[0].eval(), INNER_ONLY),
    "an activation of the batch norm": (lambda m: setattr(m.inner[0].bn2, "activation", "silu"), None),
    "a compiled child": (lambda m: m.inner[0].compile(backend="eager"), INNER_ONLY),
    "momentum": (lambda m: setattr(m.inner[0].bn2, "momentum", 0.3), BOTH),
    "stock batch norms": (lambda m: bn_ext.revert(m.inner[0].bn2), SEPARATE),
    "no batch norm": (lambda m: setattr(m.inner[0], "bn2", nn.Identity()), SEPARATE),
    "folding": (
        lambda m: m.eval() and setattr(m.inner[0], "bn1", nn.Identity()),
        [(None, False)],
    ),
}


def test_a_change_of_the_class_of_an_activation_is_heeded() -> None:
    fused, stock = outer()
    x = x_of()
    with mock.patch.object(type(stock.act), "forward", lambda self, x: x * 3):
        torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_fusing_are_heeded(name: str) -> None:
    fused, stock = outer()
    change, expected = CHANGES[name]
    if name == "another mode of the child":  # only matters to forms that differ
        for model in (fused, stock):
            model.inner[0].dropout = 0.5
        bn_ext.fuse(fused)
    for model in (fused, stock):
        change(model)
    x = x_of()
    if name == "an activation of the batch norm":
        bn_ext.convert(stock)
        stock.inner[0].bn2.activation = "silu"
        expected = [("relu", False), (None, False)]
    elif name in ("setting of the child", "another end"):
        expected = INNER_ONLY if name == "another end" else [(None, False)] * 2
    torch.manual_seed(2)
    with calls() as seen:
        actual = fused(x)
    torch.manual_seed(2)
    torch.testing.assert_close(actual, stock(x))
    if name != "another end":
        assert seen == expected


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm])
def test_conversions_by_torch_keep_the_activations(convert: Callable[[nn.Module], nn.Module]) -> None:
    fused, stock = outer()
    fused, stock, x = convert(fused).eval(), convert(stock).eval(), x_of()
    assert type(fused.inner[0].bn1) is nn.SyncBatchNorm
    torch.testing.assert_close(fused(x), stock(x))


def test_arguments_of_other_kinds_run_the_original() -> None:
    fused, stock = outer()
    x = x_of()
    for arguments, keywords in [
        ((x, 2.0), {}),
        ((x, x), {}),
        ((x,), {"offset": 3}),
        ((), {"x": x}),
        ((x,), {"scale": x}),
    ]:
        torch.testing.assert_close(fused(*arguments, **keywords), stock(*arguments, **keywords))
        assert seen_of(fused, *arguments, **keywords) == INNER_ONLY
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fused()


def test_global_hooks_run() -> None:
    fused, _ = outer()
    kinds = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: kinds.append(type(m)))
    try:
        assert seen_of(fused, x_of()) == [(None, False)] * 2
    finally:
        handle.remove()
    assert nn.LeakyReLU in kinds


def test_two_forms() -> None:
    """Dropout between, in training only; the modules that the code goes past must be in the mode of the whole."""

    def body(self: Small, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.act(F.dropout(y, 0.5) if self.training else y)

    fused, stock, told = fused_and_stock(Small(body).double())
    assert told == ["batch_norm in training, batch_norm + relu in evaluation"]
    assert seen_of(fused.train(), x_of()) == SEPARATE
    assert seen_of(fused.eval(), x_of()) == FUSED
    stock.load_state_dict(fused.state_dict())
    assert_same(fused, stock, (x_of(),), modes=(True, False))


class Listed(nn.Module):
    """Forward looks at a function, at a tuple, and at the children of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3, dtype=torch.float64)
        self.after = F.relu
        self.factors = (1.0, 2.0)
        self.layers = nn.ModuleList([nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.bn(x)) * self.factors[1]
        for layer in self.layers:
            y = layer(y)
        return y


@pytest.mark.parametrize("change", ["function", "tuple", "list"])
def test_what_forward_looks_at_may_change(change: str) -> None:
    fused, stock, told = fused_and_stock(Listed())
    assert told == [RELU]
    assert seen_of(fused, x_of()) == FUSED
    for model in (fused, stock):
        if change == "function":
            model.after = torch.tanh
        elif change == "tuple":
            model.factors = (1.0, 3.0)
        else:
            model.layers.append(nn.Sigmoid())
    assert seen_of(fused, x_of()) == SEPARATE
    stock.load_state_dict(fused.state_dict())
    assert_same(fused, stock, (x_of(),))
