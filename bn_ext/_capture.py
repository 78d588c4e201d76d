"""Snapshots of values for later comparison; refuses values whose state cannot be compared."""

import copyreg
import enum
import functools
import logging
import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bn_ext._contents import (
    ABSENT,
    _Absent,
    attributes,
    description,
    is_data,
    is_library,
    is_of_numpy,
    kind_of_parts,
    parts,
    state_of_function,
)
from bn_ext._snapshots import (
    AnyTensor,
    Child,
    Children,
    Composite,
    Constant,
    Function,
    Library,
    Property,
    Same,
    TensorLike,
    UserClass,
    find,
    original_class,
)
from bn_ext._undo import Slots


class NotFaithfulError(Exception):
    """The graph of a forward() would not do everything that forward() does; the message is the reason."""


_MOST_VALUES = 1000  # nested values of one attribute; each call compares all of them
_CONSTANTS = (bool, int, float, complex, str, bytes, range, torch.Size, torch.device)
_BY_IDENTITY = (
    *(type(None), type(...), type(NotImplemented), _Absent, type, enum.Enum, re.Pattern, logging.Logger),
    *(types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType),
    *(types.MethodWrapperType, types.GenericAlias, types.UnionType, types.MemberDescriptorType),
    *(torch.dtype, torch.layout, torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
    *(type(functools.lru_cache(len)), torch.jit.ScriptFunction),
)


def unwrapped(value: Any) -> Any:
    """The original of a function that torch.fx replaces while it traces; any other value unchanged."""
    while isinstance(value, types.FunctionType) and value.__globals__.get("__name__") == "torch.fx._symbolic_trace":
        if not hasattr(value, "__wrapped__"):
            break
        value = value.__wrapped__
    return value


class Snapshots:
    """Makes snapshots for one trace of one module.

    Args:
        root: The traced module; other modules are identified by their paths from it.
        watch: Called with each container before its contents are taken, so that changes can be undone.
    """

    def __init__(self, root: torch.nn.Module, watch: Callable[[Any, str], None]) -> None:
        self.paths = {id(module): tuple(path.split(".")) if path else () for path, module in root.named_modules()}
        self.functions: set[types.CodeType] = set()
        """Code of the functions whose closures are part of a snapshot."""
        self._numbered: dict[int, tuple[int, object]] = {}  # keeps the objects alive, so that addresses stay unique
        self._watch = watch
        self._open: list[int] = []
        self._count = 0

    def number(self, value: object) -> int:
        """The number of an object; the same object always has the same number."""
        return self._numbered.setdefault(id(value), (len(self._numbered), value))[0]

    def of(self, value: Any, name: str) -> Any:
        """The snapshot of a value; the error message uses `name`.

        Raises:
            NotFaithfulError: Its state cannot be compared or holds too many values.
        """
        self._count = self._count + 1 if self._open else 0
        kind = type(value)
        if self._count > _MOST_VALUES:
            raise NotFaithfulError(f"forward() reads {name}, which holds more than {_MOST_VALUES} values")
        if kind in _CONSTANTS:
            return Constant(kind, value)
        if isinstance(value, torch.nn.Module):
            return self._of_module(value, name)
        if isinstance(value, Tensor):
            return TensorLike(description(value), self.number(value))
        if isinstance(value, types.FunctionType):
            return self._of_function(unwrapped(value), name)
        if isinstance(value, type) and not is_library(value.__module__) and id(value) not in self._open:
            data = {key: part for key, part in vars(value).items() if is_data(key, part)}
            return UserClass(value, tuple(zip(data, self._nested(value, (*data.values(),), name), strict=True)))
        if (
            isinstance(value, _BY_IDENTITY)
            or kind is object
            or kind.__module__ == "typing"
            or is_of_numpy(kind, "dtype")
        ):
            return Same(value)
        if isinstance(value, types.ModuleType) and is_library(value.__name__):
            return Library(value.__name__)
        is_namespace = isinstance(value, dict) and "__builtins__" in value
        if id(value) in self._open or is_namespace or not _has_visible_state(value):
            raise NotFaithfulError(f"forward() reads {name}, whose state cannot be compared ({kind.__qualname__})")
        return self._of_parts(value, name)

    def of_attribute(self, module: torch.nn.Module, name: str) -> Any:
        """The snapshot of an attribute of a module; runs no code of the attribute."""
        value = find(module, name)
        if name == "_modules":
            return Children(tuple(value), tuple([self.of(child, key) for key, child in value.items()]))
        if isinstance(value, Tensor) and name not in vars(module):
            return AnyTensor(self.number(value))
        if isinstance(value, property):
            return self.of_class(original_class(type(module)), name)
        return self.of(value, name)

    def of_class(self, owner: type, name: str) -> Any:
        """The snapshot of an attribute of a class."""
        value = getattr(owner, name, ABSENT)
        snapshot = self.of(value, f"{owner.__name__}.{name}")
        has_state = isinstance(value, property) and bool(getattr(snapshot.parts[0], "state", ()))
        return Property(owner, name, value) if isinstance(value, property) and not has_state else snapshot

    def _of_module(self, module: torch.nn.Module, name: str) -> Child:
        if id(module) not in self.paths:
            raise NotFaithfulError(f"forward() reads {name}, a module outside the traced module")
        return Child(original_class(type(module)), self.number(module))

    def _of_function(self, function: types.FunctionType, name: str) -> Same | Function:
        if is_library(function.__module__) or id(function) in self._open:
            return Same(function)
        self.functions.add(function.__code__)
        state = self._nested(function, state_of_function(function), name)
        for cell in function.__closure__ or ():
            self._watch(cell, name)
        self._watch(vars(function), name)
        return Function(function, function.__code__, state)

    def _of_parts(self, value: Any, name: str) -> Composite:
        own = attributes(value)
        slots = Slots(value, tuple(copyreg._slotnames(type(value))))  # type: ignore[attr-defined]
        for container in (value, getattr(value, "__dict__", None), slots):
            self._watch(container, name)
        number, values = self.number(value), self._nested(value, parts(value), name)
        attributes_now = self._nested(value, (*own.values(),), name)
        return Composite(type(value), number, values, tuple(zip(own, attributes_now, strict=True)))

    def _nested(self, owner: Any, values: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        self._open.append(id(owner))
        try:
            return tuple([self.of(value, name) for value in values])
        finally:
            self._open.pop()


def _has_visible_state(value: Any) -> bool:
    """Whether parts and attributes hold all state of an object; most classes written in C have hidden state."""
    if kind_of_parts(value) is not None or type(value) is types.SimpleNamespace:
        return True
    try:
        return bool(object.__reduce_ex__(value, 2)) and getattr(type(value), "__reduce__", None) is object.__reduce__
    except Exception:
        return False
