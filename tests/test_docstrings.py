"""Docstrings of the public API: every name has one, it lists the parameters, and its example runs."""

import ast
import dataclasses
import doctest
import inspect
import re
import textwrap
from typing import Any

import pytest
import torch

import bn_ext
from bn_ext import testing

TESTING = {name: value for name, value in vars(testing).items() if getattr(value, "__module__", "") == testing.__name__}
PUBLIC: dict[str, Any] = {
    **{f"bn_ext.{name}": getattr(bn_ext, name) for name in bn_ext.__all__},
    **{f"bn_ext.testing.{name}": f for name, f in TESTING.items() if inspect.isfunction(f) and name[0] != "_"},
}
CLASSES = {
    **{name: value for name, value in PUBLIC.items() if inspect.isclass(value)},
    **{f"bn_ext.testing.{name}": c for name, c in TESTING.items() if inspect.isclass(c) and name[0] != "_"},
}
REFERENCE = re.compile(r"(?:the arguments are those of|turns it into a) `(\w+)`")
"""A docstring may refer to that of another class for its parameters."""


def docstring(value: Any) -> str:
    """Not an inherited one, and not the one that dataclasses generates."""
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    if not doc or (inspect.isclass(value) and doc.startswith(f"{value.__name__}(")):
        return ""
    return inspect.cleandoc(doc)


def documented_arguments(doc: str) -> list[str]:
    """The names of the entries in the section Args."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    return re.findall(r"^    (\*{0,2}\w+):", section[1], re.MULTILINE) if section else []


def documented_fields(kind: type) -> list[str]:
    """The fields of a dataclass that are followed by a string."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    return [
        ast.unparse(field.target)
        for field, after in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(getattr(after.value, "value", None), str)
    ]


def parameters(value: Any) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name != "self"]


def test_every_class_of_functions_is_covered() -> None:
    assert {"bn_ext.batch_norm", "bn_ext.BatchNorm2d", "bn_ext.explain", "bn_ext.testing.check"} <= PUBLIC.keys()
    assert {"bn_ext.PassPlan", "bn_ext.recompute", "bn_ext.testing.Case"} <= CLASSES.keys()


@pytest.mark.parametrize("name", PUBLIC | CLASSES)
def test_public_name_has_a_docstring(name: str) -> None:
    assert docstring((PUBLIC | CLASSES)[name])


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_have_docstrings_that_list_their_parameters(name: str) -> None:
    for kind in CLASSES[name].__mro__:
        if not kind.__module__.startswith("bn_ext"):
            continue
        for method, value in vars(kind).items():
            function = value.fget if isinstance(value, property) else value
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            assert docstring(function), method
            assert documented_arguments(docstring(function)) == parameters(function), method


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_lists_the_parameters(name: str) -> None:
    """A dataclass documents its fields instead; `*args` stands for the parameters of torch.nn's class."""
    value = PUBLIC[name]
    if dataclasses.is_dataclass(value):
        assert documented_fields(value) == [field.name for field in dataclasses.fields(value)]
        return
    doc, expected = docstring(value), parameters(value)
    while reference := REFERENCE.search(doc):
        doc = docstring(PUBLIC[f"bn_ext.{reference[1]}"])
    documented = documented_arguments(doc)
    if "*args" in documented:
        inherited = getattr(torch.nn, value.__name__)
        documented.remove("*args")
        expected = [parameter for parameter in expected if parameter not in parameters(inherited)]
    assert documented == expected


@pytest.mark.parametrize("name", PUBLIC)
def test_example_prints_the_result_that_it_shows(name: str) -> None:
    names = {**TESTING, "bn_ext": bn_ext, "torch": torch}
    example = doctest.DocTestParser().get_doctest(docstring(PUBLIC[name]), names, name, None, None)
    assert example.examples, "no example"
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert failed == 0, "".join(report)
