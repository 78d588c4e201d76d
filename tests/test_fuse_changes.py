"""A change of anything that the original forward could read voids the fusion: never a wrong number."""

import copy
import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import helpers.changing as state
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.changing import Config, Leaf, Mode, Net
from helpers.fusing import FUSED, SEPARATE, calls, seen_of, x_of
from torch import Tensor, nn

import bn_ext


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((3, 1, 1), value))


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


def fused_and_stock() -> tuple[Net, Net]:
    torch.manual_seed(0)
    fused = bn_ext.fuse(Net().double())
    assert type(fused) is not Net
    assert seen_of(fused, x_of()) == FUSED
    stock = Net().double()
    stock.load_state_dict(fused.state_dict())
    return fused, stock


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


EDITED: dict[str, tuple[Any, str, Any]] = {
    "forward": (state.Coded, "forward", lambda self, x: self.bn(x) * 7),
    "a method": (state.Coded, "post", lambda self, y: y * 7),
    "a function": (state, "scaled", lambda y: y * 7),
    "a property": (state.Coded, "half", property(lambda self: 3.0)),
}


@pytest.mark.parametrize("name", EDITED)
@pytest.mark.parametrize("how", ["between", "before", "gone"])
def test_a_file_holds_for_the_code_that_it_was_made_with(how: str, name: str) -> None:
    """Edited between writing and reading, or in the process before it is written; or the name has gone."""
    owner, attribute, value = EDITED[name]
    stock = state.Coded().double().eval()
    fused = bn_ext.fuse(copy.deepcopy(stock))
    data, x = pickle.dumps(fused), x_of()
    before = stock(x)
    assert seen_of(pickle.loads(data), x) == FUSED
    with mock.patch.object(owner, attribute, value):
        if how == "gone":
            delattr(owner, attribute)
            pickle.loads(data)
            setattr(owner, attribute, value)
        loaded = pickle.loads(pickle.dumps(copy.deepcopy(fused)) if how == "before" else data)
        torch.testing.assert_close(loaded(x), stock(x))
        assert not torch.equal(loaded(x), before)


def test_a_copy_holds_for_the_code_that_its_original_was_made_with() -> None:
    fused, stock = fused_and_stock()
    code, x = state.scaled.__code__, x_of()
    try:
        state.scaled.__code__ = (lambda y: y * 7).__code__
        torch.testing.assert_close(copy.deepcopy(fused)(x), stock(x))
    finally:
        state.scaled.__code__ = code


def test_a_model_with_a_decorated_forward_comes_from_a_file_unfused() -> None:
    """The decorator's inner function has no name to be found by; a deepcopy keeps it."""
    fused = bn_ext.fuse(state.Decorated().double())
    assert seen_of(fused, x_of()) == seen_of(copy.deepcopy(fused), x_of()) == FUSED
    loaded, x = pickle.loads(pickle.dumps(fused)), x_of()
    assert type(loaded) is state.Decorated
    torch.testing.assert_close(loaded(x), fused(x))


GLOBALS: dict[str, tuple[Any, str, Any]] = {
    "a global that a function reads": (state, "GLOBAL", 2.0),
    "a global function": (state, "scaled", torch.neg),
    "an attribute of a Python module": (state.ELSEWHERE, "scale", 2.0),
    "an attribute of the class": (Net, "flag", True),
    "an attribute of the class that type(self) reads": (Net, "classwide", 2.0),
    "an attribute that was missing in the class": (Net, "missing", 2.0),
    "an attribute of the base class": (state.Base, "base_scale", 2.0),
    "a method": (Net, "post", lambda self, y: y * 7),
    "a method that super() calls": (state.Base, "post", lambda self, y: y * 7),
    "a method of an object": (state.Helper, "run", lambda self, y: y * 7),
    "a property of an object": (state.Helper, "scale", property(lambda self: 7.0)),
    "an attribute of a class that is an attribute": (state.Block, "expansion", 7),
    "a property": (Net, "half", property(lambda self: 3.0)),
    "the forward of the class": (Net, "forward", lambda self, x: self.bn(x)),
    "the forward of a child that is called": (nn.Sequential, "forward", lambda self, x: x * 3),
}


@pytest.mark.parametrize("name", GLOBALS)
def test_a_change_of_classes_and_globals_voids_the_fusion(name: str) -> None:
    owner, attribute, value = GLOBALS[name]
    fused, stock = fused_and_stock()
    x = x_of()
    before = stock(x)
    with mock.patch.object(owner, attribute, value, create=True):
        torch.testing.assert_close(fused(x), stock(x))
        assert name == "a global function" or not torch.equal(stock(x), before)
    assert seen_of(fused, x) == FUSED


def test_a_change_of_code_in_place_voids_the_fusion() -> None:
    """As tools that reload notebooks make it."""
    fused, stock = fused_and_stock()
    code, x = state.scaled.__code__, x_of()
    before = stock(x)
    try:
        state.scaled.__code__ = (lambda y: y * 7).__code__
        torch.testing.assert_close(fused(x), stock(x))
        assert not torch.equal(stock(x), before)
    finally:
        state.scaled.__code__ = code


def test_a_list_in_a_global_voids_the_fusion() -> None:
    fused, stock = fused_and_stock()
    with mock.patch.dict(state.SETTINGS, scales=[2.0]):
        assert seen_of(fused, x_of()) == SEPARATE
        x = x_of()
        torch.testing.assert_close(fused(x), stock(x))


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


@pytest.mark.parametrize("name", ["flag", "classwide", "post"])
def test_a_change_of_type_of_a_model_concerns_all_of_the_class(name: str) -> None:
    """Copies and other models too, as of a class that is not fused."""
    value = (lambda self, y: y * 7) if name == "post" else 7.0
    fused, stock = fused_and_stock()
    x, before = x_of(), stock(x_of())
    with mock.patch.object(type(fused), name, value):
        assert vars(Net)[name] is value
        for model in (fused, copy.deepcopy(fused), fused_and_stock()[0]):
            torch.testing.assert_close(model(x), stock(x))
        assert not torch.equal(stock(x_of()), before)
    assert seen_of(fused, x) == FUSED


def test_forward_of_the_type_of_a_model_is_wrapped_and_patched() -> None:
    fused, stock = fused_and_stock()
    x, original = x_of(), Net.forward
    expected = stock(x)
    kind: Any = type(fused)
    try:
        wrapped = kind.forward
        kind.forward = lambda self, x: wrapped(self, x) * 2
        torch.testing.assert_close(fused(x), expected * 2)
        kind.forward = wrapped
        for autospec in (False, True):
            with mock.patch.object(kind, "forward", autospec=autospec) as patched:
                patched.side_effect = lambda *arguments: arguments[-1]
                assert fused(x) is x
        assert Net.forward is original
        torch.testing.assert_close(fused(x), stock(x))
    finally:
        Net.forward = original  # type: ignore[method-assign]


def test_another_forward_of_the_type_of_an_inlined_child_is_heeded() -> None:
    fused, x = bn_ext.fuse(Outer().double()), x_of()
    assert seen_of(fused, x) == [("relu", False)] * 2
    with mock.patch.object(type(fused.block), "forward", lambda self, x: x * 7):
        torch.testing.assert_close(fused(x), F.relu(x * 7))
    assert type(bn_ext.revert(fused).block) is Half


def test_a_patch_of_the_type_of_a_model_leaves_what_was_set_before() -> None:
    kind: Any = type(fused_and_stock()[0])
    with mock.patch.object(Net, "classwide", 1.0):
        kind.classwide = 2.0
        with mock.patch.object(kind, "classwide", 9.0), mock.patch.object(kind, "classwide", 11.0):
            assert Net.classwide == 11.0
        assert Net.classwide == 2.0


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
    """What it calls."""

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


def test_a_subclass_of_the_class_of_a_model_is_heeded() -> None:
    fused, stock = fused_and_stock()
    members = {"post": lambda self, y: y * 7}
    fused.__class__, stock.__class__ = type("Net", (type(fused),), members), type("Net", (Net,), members)
    x = x_of()
    torch.testing.assert_close(fused(x), stock(x))


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


SHADOW = """
import torch

SCALE = 1.0


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act = torch.nn.BatchNorm2d(3), torch.nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(x)) * SCALE
"""


def test_a_file_with_the_name_of_a_module_of_python_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tabnanny.py").write_text(SHADOW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tabnanny", None)  # and back to what was there, at the end
    del sys.modules["tabnanny"]
    module = importlib.import_module("tabnanny")
    stock = module.Net().double().eval()
    fused = bn_ext.fuse(copy.deepcopy(stock))
    x = x_of()
    assert seen_of(fused, x) == FUSED
    module.SCALE = 7.0
    torch.testing.assert_close(fused(x), stock(x))
