"""A change of anything that the original forward could read voids the fusion: never a wrong number."""

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import helpers.changing as state
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.changing import Config, Leaf, Mode, Net, fused_and_stock, parameter
from helpers.fusing import FUSED, SEPARATE, calls, seen_of, x_of
from torch import Tensor, nn

import bn_ext


def renamed(m: Net) -> None:
    m.named["r"] = m.named.pop("q")


def reordered(m: Net) -> None:
    m.named["p"] = m.named.pop("p")


def with_cell(m: Net) -> None:
    m.closure.__closure__[0].cell_contents = [4.0]


CHANGES: dict[str, Callable[[Net], Any]] = {
    "an Enum member": lambda m: setattr(m, "mode", Mode.B),
    "a numpy scalar": lambda m: setattr(m, "number", np.float32(2)),
    "a value in a numpy array": lambda m: m.array.__setitem__(0, 2),
    "a list that is replaced": lambda m: setattr(m, "depths", [2]),
    "a list that is changed in place": lambda m: m.depths.__setitem__(0, 2),
    "a list in a dict": lambda m: m.nested["a"].__setitem__(0, 1),
    "a dict in a list in a dict": lambda m: m.nested["a"][1].update(b=1),
    "a set": lambda m: m.choices.add(3),
    "the order of a dict": lambda m: m.table.update(x=m.table.pop("x")),
    "a tuple": lambda m: setattr(m, "pair", (2.0, [1.0])),
    "a list in a tuple": lambda m: m.pair[1].__setitem__(0, 2.0),
    "an object that is replaced": lambda m: setattr(m, "config", Config()) or setattr(m.config, "scale", 2.0),
    "an attribute of an object": lambda m: setattr(m.config, "scale", 2.0),
    "a list in an object in an object": lambda m: m.config.inner.scales.__setitem__(0, 2.0),
    "an object's default that is overridden": lambda m: setattr(m.config, "shift", 2.0),
    "an object with slots": lambda m: setattr(m.slotted, "scale", 2.0),
    "a function": lambda m: setattr(m, "function", torch.neg),
    "a closure": with_cell,
    "a list in a closure": lambda m: m.closure.__closure__[0].cell_contents.__setitem__(0, 2.0),
    "an activation function": lambda m: setattr(m, "activation", torch.tanh),
    "a method on the instance": lambda m: setattr(m, "post", lambda y: y * 7),
    "an attribute that was missing": lambda m: setattr(m, "missing", 2.0),
    "an attribute that was asked for by hasattr": lambda m: setattr(m, "absent", None),
    "a buffer of a missing name": lambda m: m.register_buffer("missing", torch.tensor(2.0)),
    "a class default that is overridden": lambda m: setattr(m, "flag", True),
    "a parameter that was None": lambda m: setattr(m, "gain", parameter(2.0)),
    "a parameter that is registered": lambda m: m.register_parameter("gain", parameter(2.0)),
    "a buffer that was None": lambda m: setattr(m, "offset", torch.ones(3, 1, 1)),
    "an attribute of a child": lambda m: setattr(m.leaf, "scale", 2.0),
    "a container of a child": lambda m: m.leaf.sizes["a"].__setitem__(0, 2),
    "a child that was None": lambda m: setattr(m, "optional", nn.Softplus()),
    "an empty ModuleList": lambda m: m.extra.append(nn.Softplus()),
    "an empty Sequential": lambda m: m.steps.append(nn.Softplus()),
    "a ModuleDict with one more": lambda m: m.named.update({"s": Leaf()}),
    "a ModuleDict whose keys are renamed": renamed,
    "a ModuleDict that is reordered": reordered,
    "a tensor that is no parameter": lambda m: setattr(m, "plain", torch.ones(1, 3, 1, 1)),
    "a parameter of the batch norm": lambda m: m.bn.register_parameter("third", parameter(1.0)),
    "two children that become one": lambda m: setattr(m, "right", m.left),
    "one child of two names that becomes two": lambda m: setattr(m, "other", copy.deepcopy(m.leaf)),
    "two lists that become one": lambda m: setattr(m, "two", m.one),
    "one list of two names that becomes two": lambda m: setattr(m, "three", [1.0]),
    "the class of a child": lambda m: m.named.__setitem__("p", nn.Tanh()),
}


def assert_heeded(fused: nn.Module, stock: nn.Module, change: Callable[[], Any]) -> None:
    """The change matters, and the fused model does what stock does, in training and evaluation, before and after."""
    x = x_of()
    for training in (True, False):
        before = stock.train(training)(x)
        torch.testing.assert_close(fused.train(training)(x), before)
    change()
    for training in (True, False):
        torch.testing.assert_close(fused.train(training)(x), stock.train(training)(x))
    assert not torch.equal(stock(x), before)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a deepcopy"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_voids_the_fusion(name: str, copied: bool) -> None:
    fused, stock = fused_and_stock()
    if copied:
        fused = copy.deepcopy(fused)
        assert seen_of(fused, x_of()) == FUSED
        stock.load_state_dict(fused.state_dict())

    def change() -> None:
        for model in (fused, stock):
            CHANGES[name](model)

    assert_heeded(fused, stock, change)
    # A module that is called as a whole is called as it is now.
    assert seen_of(fused, x_of()) == (FUSED if name == "an empty Sequential" else SEPARATE)


COMPILED = [
    *("an Enum member", "a list that is changed in place", "a list in a dict", "the order of a dict", "a tuple"),
    *("an attribute that was missing", "a class default that is overridden"),
    *("a buffer of a missing name", "an attribute of a child", "an empty ModuleList", "a parameter that was None"),
    *("a child that was None", "an activation function", "two children that become one"),
    *("one child of two names that becomes two", "two lists that become one"),
]


@pytest.mark.parametrize("before", [True, False], ids=["before it", "after it"])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_change_around_compilation_voids_the_fusion(name: str, before: bool) -> None:
    fused, stock, x = bn_ext.fuse(state.Simple().double()), state.Simple().double(), x_of()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    if not before:
        with calls() as seen:
            torch.testing.assert_close(compiled(x), stock(x))
        assert seen == FUSED
    for model in (fused, stock):  # eager: compiled, stock does not heed all of them
        CHANGES[name](model)
    torch.testing.assert_close(compiled(x), stock(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_change_of_a_global_after_compilation_voids_the_fusion() -> None:
    fused, stock, x = bn_ext.fuse(state.Simple().double()), state.Simple().double(), x_of()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    with mock.patch.object(state, "GLOBAL", 2.0):
        torch.testing.assert_close(compiled(x), stock(x))


@pytest.mark.parametrize("name", ["a closure", "an attribute of an object", "a numpy scalar"])
@pytest.mark.usefixtures("fresh_compiler")
def test_state_that_torch_compile_cannot_compare_runs_the_original(name: str) -> None:
    fused, stock = fused_and_stock()
    compiled, expected, x = torch.compile(fused, backend="eager"), torch.compile(stock, backend="eager"), x_of()
    with calls() as seen:
        torch.testing.assert_close(compiled(x), expected(x))
    assert seen == SEPARATE
    for model in (fused, stock):
        CHANGES[name](model)
    torch.testing.assert_close(compiled(x), expected(x))


class Closing(nn.Module):
    """Reads a closure, and nothing else that torch.compile cannot compare."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.closure = nn.BatchNorm2d(3), state.with_closure([1.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.closure(F.relu(self.bn(x)))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_closure_that_torch_compile_cannot_compare_runs_the_original() -> None:
    fused, stock, x = bn_ext.fuse(Closing().double()), Closing().double(), x_of()
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(x), stock(x))
    for model in (fused, stock):
        model.closure.__closure__[0].cell_contents[0] = 2.0
    torch.testing.assert_close(compiled(x), stock(x))


PICKLED = ["an Enum member", "an attribute of an object", "a list in a dict", "an attribute that was missing", "a set"]


@pytest.mark.parametrize("name", PICKLED)
def test_a_change_of_a_model_from_a_file_voids_the_fusion(name: str) -> None:
    fused, stock = (Net().double() for _ in range(2))
    for model in (fused, stock):
        model.closure = torch.abs  # the other one cannot be pickled
    fused = pickle.loads(pickle.dumps(bn_ext.fuse(fused)))
    assert seen_of(fused, x_of()) == FUSED
    stock.load_state_dict(fused.state_dict())
    assert_heeded(fused, stock, lambda: [CHANGES[name](model) for model in (fused, stock)])


def test_a_model_with_a_decorated_forward_comes_from_a_file_unfused() -> None:
    """The decorator's inner function has no name to be found by; a deepcopy keeps it."""
    fused = bn_ext.fuse(state.Decorated().double())
    assert seen_of(fused, x_of()) == seen_of(copy.deepcopy(fused), x_of()) == FUSED
    loaded, x = pickle.loads(pickle.dumps(fused)), x_of()
    assert type(loaded) is state.Decorated
    torch.testing.assert_close(loaded(x), fused(x))


@pytest.mark.parametrize("name", ["missing", "optional", "flag", "config"])
def test_an_attribute_that_is_deleted_raises_what_the_original_raises(name: str) -> None:
    fused, stock = fused_and_stock()
    for model in (fused, stock):
        setattr(model, name, {"missing": 2.0, "optional": None, "flag": True, "config": None}[name])
        delattr(model, name)
    if name in ("optional", "config"):
        for model in (fused, stock):
            with pytest.raises(AttributeError, match=f"'Net' object has no attribute '{name}'"):
                model(x_of())
    else:
        x = x_of()
        torch.testing.assert_close(fused(x), stock(x))
