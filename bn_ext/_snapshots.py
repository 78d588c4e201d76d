"""Snapshots of the values that forward() read during the trace, for comparison with the present values."""

import copy
import hashlib
import sys
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bn_ext._contents import ABSENT, attributes, description, parts, state_of_function


class Seen:
    """The objects that one comparison has visited, by the numbers that the trace gave them.

    Equal numbers must be the same object, and different numbers different objects, because forward() may test `a is b`.
    """

    def __init__(self) -> None:
        self._objects: dict[int, object] = {}
        self._numbers: dict[int, int] = {}

    def is_same(self, number: int, value: object) -> bool:
        """Whether an object is the one of this number, as far as visited objects show."""
        if number in self._objects:
            return self._objects[number] is value
        self._objects[number] = value
        return self._numbers.setdefault(id(value), number) == number


class SeenByCompiler(Seen):
    """The same for torch.compile, which may not support id() of tensors and lists."""

    def is_same(self, number: int, value: object) -> bool:
        """Whether an object is the one of this number, as far as visited objects show; a tensor may have several."""
        if self._objects.setdefault(number, value) is not value:
            return False
        if isinstance(value, Tensor):
            return True
        if _HAS_NO_ID:
            return not any([other is value for key, other in self._objects.items() if key != number])
        return self._numbers.setdefault(id(value), number) == number


_HAS_NO_ID = torch.__version__ < "2.13"
"""Whether torch.compile does not support id() of lists."""


class Same(NamedTuple):
    """A value compared by identity: None, functions, classes, members of an Enum, dtypes."""

    value: Any

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still the same."""
        return now is self.value


class Property(NamedTuple):
    """A property of a class, compared by identity. It is pickled by its name and a digest of its code."""

    owner: type
    name: str
    value: Any

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the class still has the same property."""
        return now is self.value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Property":
        return self

    def __reduce__(self) -> Any:
        return _property, (self.owner, self.name, digest(getattr(self.value.fget, "__code__", None)))


def _property(owner: type, name: str, digest_then: str) -> Property:
    """The property, if the program that unpickles it has the same one; otherwise one that never holds."""
    now = getattr(owner, name, ABSENT)
    is_same = isinstance(now, property) and digest(getattr(now.fget, "__code__", None)) == digest_then
    return Property(owner, name, now if is_same else object())


def digest(code: types.CodeType | None) -> str:
    """A digest that is the same in every process; the repr of a frozenset, for example, is not."""
    if code is None:
        return ""
    constants = [
        digest(value)
        if isinstance(value, types.CodeType)
        else str(sorted(map(repr, value)))
        if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    ]
    names = (code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
    return hashlib.sha256(repr((code.co_code, names, code.co_argcount, constants)).encode()).hexdigest()


class Constant(NamedTuple):
    """A number, a string or similar, compared by type and value."""

    kind: type
    value: Any

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still the same; repr distinguishes 0.0 from -0.0, and NaN equals itself."""
        if now is self.value:
            return True
        if is_compiling():  # torch.compile does not support repr of numbers
            return bool(type(now) is self.kind and now == self.value)
        return type(now) is self.kind and repr(now) == repr(self.value)


class Library(NamedTuple):
    """A Python module, stored by name because modules cannot be pickled."""

    name: str

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still that module."""
        return now is sys.modules.get(self.name)


class AnyTensor(NamedTuple):
    """A parameter or buffer that the graph reads at each call; it must exist and match its number."""

    number: int

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still a tensor, the one of this number."""
        return isinstance(now, Tensor) and seen.is_same(self.number, now)


class TensorLike(NamedTuple):
    """A tensor of which forward() could read only the description (shape, dtype and so on), not the values."""

    description: tuple[Any, ...]
    number: int

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still a tensor of that description, the one of this number."""
        return isinstance(now, Tensor) and description(now) == self.description and seen.is_same(self.number, now)


class Child(NamedTuple):
    """A module of a given class."""

    kind: type
    number: int

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still a module of that class, the one of this number."""
        return is_of(self.kind, now) and seen.is_same(self.number, now)


class Children(NamedTuple):
    """The children of a module in order: names and snapshots, including children that are None."""

    names: tuple[str, ...]
    children: tuple[Any, ...]

    def holds(self, now: Any, seen: Seen) -> bool:
        """Whether the children are still the same."""
        return tuple(now) == self.names and _all_hold(self.children, tuple(now.values()), seen)


class Function(NamedTuple):
    """A Python function, with its code, the contents of its closure, its defaults and its attributes."""

    function: Any
    code: types.CodeType
    state: tuple[Any, ...]

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still that function, with equal contents."""
        if now is not self.function or is_compiling():  # torch.compile guards a function's defaults
            return now is self.function
        if getattr(now, "__code__", None) is not self.code:
            return False
        return _all_hold(self.state, state_of_function(self.function), seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Function":
        return Function(self.function, self.code, copy.deepcopy(self.state, memo))

    def __reduce__(self) -> Any:
        return _function, (self.function, digest(self.code), self.state)


class UserClass(NamedTuple):
    """A class with its data attributes."""

    kind: type
    attributes: tuple[tuple[str, Any], ...]

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still that class, with equal data."""
        if now is not self.kind:
            return False
        return all([expected.holds(getattr(now, name, ABSENT), seen) for name, expected in self.attributes])


def _function(function: Any, digest_then: str, state: tuple[Any, ...]) -> Function:
    """The function, if the program that unpickles it has the same one; otherwise one that never holds."""
    is_same = digest(function.__code__) == digest_then
    return Function(function if is_same else object(), function.__code__, state)


class Composite(NamedTuple):
    """A container or an object, compared by type, parts in order, and attributes."""

    kind: type
    number: int
    parts: tuple[Any, ...]
    attributes: tuple[tuple[str, Any], ...]

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value still has this type and equal contents, and is the one of this number."""
        if type(now) is not self.kind or not seen.is_same(self.number, now):
            return False
        found = attributes(now)
        if len(found) != len(self.attributes) or not _all_hold(self.parts, parts(now), seen):
            return False
        return all([expected.holds(found.get(name, ABSENT), seen) for name, expected in self.attributes])


def _all_hold(expected: tuple[Any, ...], now: tuple[Any, ...], seen: Seen) -> bool:
    if len(expected) != len(now):
        return False
    return all([snapshot.holds(value, seen) for snapshot, value in zip(expected, now, strict=True)])


def original_class(kind: type) -> type:
    """The class before fusing. FSDP's subclass of a fused class counts as fused, a user's subclass does not."""
    fused: Any = getattr(kind, "_bn_ext_fused", None)
    if fused is None or (fused is not kind and not kind.__module__.startswith("torch.")):
        return kind
    if fused.forward is not fused._bn_ext_forward:  # forward was replaced: type(model).forward = ...
        return kind
    original: type = fused._bn_ext_original
    return original


def is_of(kind: type, module: object) -> bool:
    """Whether a module has this class, or had it before it was fused."""
    return type(module) is kind or original_class(type(module)) is kind


def submodule(root: Any, path: tuple[str, ...]) -> Any:
    """The module at a path, or None if there is none."""
    for name in path:
        if root is None:
            return None
        root = root._modules.get(name)
    return root


def find(module: torch.nn.Module, name: str) -> Any:
    """The value of `module.name` without running code: a descriptor itself, not its result."""
    own = module.__dict__
    if name in own:
        return own[name]
    if name in own["_modules"]:
        return own["_modules"][name]
    if name in own["_parameters"]:
        return own["_parameters"][name]
    if name in own["_buffers"]:
        return own["_buffers"][name]
    kind = type(module)  # a fused class has the original's attributes, and those set by a user later
    value = getattr(original_class(kind) if name == "forward" else kind, name, ABSENT)
    if is_compiling() and not isinstance(value, property):
        getattr(module, name, ABSENT)  # torch.compile guards this read, but not the absence of a name in a __dict__
    return value


def is_traceable(snapshot: Any) -> bool:
    """Whether torch.compile can trace and guard the comparison with a snapshot."""
    if isinstance(snapshot, Composite):
        return snapshot.kind in (list, tuple, dict) and all(map(is_traceable, snapshot.parts))
    if isinstance(snapshot, Children):
        return True
    if isinstance(snapshot, Function):
        return set(snapshot.code.co_freevars) <= {"__class__"}
    return not isinstance(snapshot, TensorLike)
