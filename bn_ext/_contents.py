"""The visible contents of objects (parts, attributes, closures), and which Python modules are libraries."""

import collections
import copyreg
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Absent:
    """The type of ABSENT, the value of an attribute that does not exist."""

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


_LIBRARIES = {"torch", "bn_ext", "functorch", "numpy", *sys.stdlib_module_names}
_FOLDERS = tuple({os.path.dirname(os.__file__) + os.sep, os.path.join(sys.base_exec_prefix, "DLLs") + os.sep})
_shadowed: dict[str, tuple[object, bool]] = {}
"""For each name of a standard module: the module of that name, and whether it is a different one."""


def is_library(name: str | None) -> bool:
    """Whether a Python module belongs to torch, Python, NumPy or this package, and so holds no state of a model."""
    name = name or ""
    top = name.partition(".")[0]
    is_one = top in _LIBRARIES and not _is_shadowed(top)
    return is_one or name.startswith("namedtuple_")  # the modules of their constructors


def _is_shadowed(name: str) -> bool:
    """Whether a file of the user has the name of a standard module, for example code.py."""
    module = sys.modules.get(name)
    known = _shadowed.get(name)
    if known is None or known[0] is not module:
        file = getattr(module, "__file__", None) or ""  # builtin modules have none
        is_own = file.startswith(_FOLDERS) and not {"site-packages", "dist-packages"} & {*file.split(os.sep)}
        known = _shadowed[name] = module, bool(file and name in sys.stdlib_module_names and not is_own)
    return known[1]


def description(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    has_grad = tensor.is_leaf and tensor.grad is not None
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.layout,
        tensor.shape,
        strides,
        tensor.requires_grad,
        has_grad,
    )


def is_of_numpy(kind: type, name: str) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(kind, getattr(numpy, name))


def state_of_function(function: Any) -> tuple[Any, ...]:
    """Values that a function reads besides arguments and globals, without the cell of super(), which never changes."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    contents = [_content(cell) for name, cell in cells if name != "__class__"]
    own = [value for name, value in vars(function).items() if name != "__wrapped__"]
    return (*contents, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *own)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return ABSENT


_MOST_BYTES = 2000  # per array
_PARTS: dict[Any, Callable[[Any], tuple[Any, ...]]] = {
    list: tuple,
    tuple: tuple,
    collections.deque: tuple,
    dict: lambda value: (*value, *value.values()),
    set: lambda value: tuple(sorted(value, key=_order)),
    frozenset: lambda value: tuple(sorted(value, key=_order)),
    slice: lambda value: (value.start, value.stop, value.step),
    functools.partial: lambda value: (value.func, value.args, value.keywords),
    types.MethodType: lambda value: (value.__func__, value.__self__),
    property: lambda value: (value.fget,),
    staticmethod: lambda value: (value.__func__,),
    classmethod: lambda value: (value.__func__,),
    int: lambda value: (int.__index__(value),),
    float: lambda value: (float.__float__(value),),
    str: lambda value: (str.__str__(value),),
}


def _order(value: object) -> tuple[str, str]:
    return type(value).__qualname__, repr(value)


def kind_of_parts(value: object) -> Any:
    if is_of_numpy(type(value), "ndarray") or is_of_numpy(type(value), "generic"):
        return None if value.dtype.hasobject or value.nbytes > _MOST_BYTES else "numpy"  # type: ignore[attr-defined]
    for kind in _PARTS:
        if isinstance(value, kind):
            return kind
    return None


def parts(value: Any) -> tuple[Any, ...]:
    """The values in a container; empty for other objects."""
    kind = type(value)
    if kind is list or kind is tuple:
        return tuple(value)
    kind = kind_of_parts(value)
    if kind == "numpy":
        return value.dtype.str, value.shape, value.tobytes()
    return () if kind is None else _PARTS[kind](value)


_PLAIN = (list, tuple, dict, set, frozenset)


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object: its own, and the data of its class."""
    kind = type(value)
    if kind in _PLAIN:
        return {}
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not is_library(base.__module__):
            found.update({name: part for name, part in vars(base).items() if is_data(name, part)})
    for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]
        found[name] = getattr(value, name, ABSENT)
    return {**found, **getattr(value, "__dict__", {})}


def is_data(name: str, value: object) -> bool:
    """Whether an entry of a class is data rather than a method or other descriptor."""
    described = callable(value) or hasattr(value, "__get__")
    return not described and not (name.startswith("__") and name.endswith("__")) and not name.startswith("_abc_")
