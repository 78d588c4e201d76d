"""A change of functions, classes or global names that a forward method uses voids the fusion."""

import copy
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import helpers.changing as state
import pytest
import torch
from helpers.changing import Net, fused_and_stock
from helpers.fusing import FUSED, SEPARATE, seen_of, x_of
from torch import nn

import bn_ext

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


def test_a_patch_of_the_type_of_a_model_leaves_what_was_set_before() -> None:
    kind: Any = type(fused_and_stock()[0])
    with mock.patch.object(Net, "classwide", 1.0):
        kind.classwide = 2.0
        with mock.patch.object(kind, "classwide", 9.0), mock.patch.object(kind, "classwide", 11.0):
            assert Net.classwide == 11.0
        assert Net.classwide == 2.0


def test_a_subclass_of_the_class_of_a_model_is_heeded() -> None:
    fused, stock = fused_and_stock()
    members = {"post": lambda self, y: y * 7}
    fused.__class__, stock.__class__ = type("Net", (type(fused),), members), type("Net", (Net,), members)
    x = x_of()
    torch.testing.assert_close(fused(x), stock(x))


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
