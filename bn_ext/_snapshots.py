"""Values as they were when a forward was traced, to be compared with those that it would read now."""

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
    """The objects that one comparison has met, by the numbers that they had when they were recorded.

    The same number must be the same object, and another number another one: forward() may ask for `a is b`.
    """

    def __init__(self) -> None:
        self._objects: dict[int, object] = {}
        self._numbers: dict[int, int] = {}

    def is_same(self, number: int, value: object) -> bool:
        """Whether an object is the one of this number, so far as is known."""
        if number in self._objects:
            return self._objects[number] is value
        self._objects[number] = value
        return self._numbers.setdefault(id(value), number) == number


class SeenByCompiler(Seen):
    """The same in words that torch.compile knows: it may have no id() of tensors and lists."""

    def is_same(self, number: int, value: object) -> bool:
        """Whether an object is the one of this number, so far as is known; tensors may have several."""
        if self._objects.setdefault(number, value) is not value:
            return False
        if isinstance(value, Tensor):
            return True
        if _HAS_NO_ID:
            return not any([other is value for key, other in self._objects.items() if key != number])
        return self._numbers.setdefault(id(value), number) == number


_HAS_NO_ID = torch.__version__ < "2.13"
"""Whether torch.compile may know no id() of lists."""


class Same(NamedTuple):
    """The same object: None, functions, classes, members of an Enum, dtypes."""

    value: Any

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still the same."""
        return now is self.value


class Property(NamedTuple):
    """A property of a class: the same object. Pickled by its name and a digest of its code."""

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
    """The property, if a program that reads the pickle has the same; otherwise one that does not hold."""
    now = getattr(owner, name, ABSENT)
    is_same = isinstance(now, property) and digest(getattr(now.fget, "__code__", None)) == digest_then
    return Property(owner, name, now if is_same else object())


def digest(code: types.CodeType | None) -> str:
    """The same for the same code in another process, as the value of a frozenset's repr is not."""
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
    """A number, a string or the like: an equal one of the same type."""

    kind: type
    value: Any

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether the value is still the same; repr tells 0.0 from -0.0 and finds NaN equal to itself."""
        if now is self.value:
            return True
        if is_compiling():  # which knows no repr of numbers
            return bool(type(now) is self.kind and now == self.value)
        return type(now) is self.kind and repr(now) == repr(self.value)


class Library(NamedTuple):
    """A Python module, by its name, because modules cannot be pickled."""

    name: str

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether it still is that module."""
        return now is sys.modules.get(self.name)


class AnyTensor(NamedTuple):
    """A parameter or buffer that the graph reads anew: it must be there, the same one as elsewhere."""

    number: int

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether there still is a tensor."""
        return isinstance(now, Tensor) and seen.is_same(self.number, now)


class TensorLike(NamedTuple):
    """A tensor whose description, but not whose values, forward() could read."""

    description: tuple[Any, ...]
    number: int

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether it still is a tensor of that description, the same one as elsewhere."""
        return isinstance(now, Tensor) and description(now) == self.description and seen.is_same(self.number, now)


class Child(NamedTuple):
    """A module of a certain class."""

    kind: type
    number: int

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether it still is a module of that class, the same one as elsewhere."""
        return is_of(self.kind, now) and seen.is_same(self.number, now)


class Children(NamedTuple):
    """The children of a module in their order: names, and snapshots of them; None among them too."""

    names: tuple[str, ...]
    children: tuple[Any, ...]

    def holds(self, now: Any, seen: Seen) -> bool:
        """Whether it still has such children."""
        return tuple(now) == self.names and _all_hold(self.children, tuple(now.values()), seen)


class Function(NamedTuple):
    """A Python function, with its code, the contents of its closure, its defaults and its attributes."""

    function: Any
    code: types.CodeType
    state: tuple[Any, ...]

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether it still is that function, with such contents."""
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
    """A class, with its data."""

    kind: type
    attributes: tuple[tuple[str, Any], ...]

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether it still is that class, with such data."""
        if now is not self.kind:
            return False
        return all([expected.holds(getattr(now, name, ABSENT), seen) for name, expected in self.attributes])


def _function(function: Any, digest_then: str, state: tuple[Any, ...]) -> Function:
    """The function, if a program that reads the pickle has the same; otherwise one that does not hold."""
    is_same = digest(function.__code__) == digest_then
    return Function(function if is_same else object(), function.__code__, state)


class Composite(NamedTuple):
    """A container or an object: its type, its parts, and its attributes."""

    kind: type
    number: int
    parts: tuple[Any, ...]
    attributes: tuple[tuple[str, Any], ...]

    def holds(self, now: object, seen: Seen) -> bool:
        """Whether there still is one of this type with such contents, the same one as elsewhere; order counts."""
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
    """The class that a fused module had. A class that FSDP makes of a fused one counts as it, a user's does not."""
    fused: Any = getattr(kind, "_bn_ext_fused", None)
    if fused is None or (fused is not kind and not kind.__module__.startswith("torch.")):
        return kind
    if fused.forward is not fused._bn_ext_forward:  # type(model).forward = another
        return kind
    original: type = fused._bn_ext_original
    return original


def is_of(kind: type, module: object) -> bool:
    """Whether a module is of this class, or was before it was fused."""
    return type(module) is kind or original_class(type(module)) is kind


def submodule(root: Any, path: tuple[str, ...]) -> Any:
    """The module at a path, or None."""
    for name in path:
        if root is None:
            return None
        root = root._modules.get(name)
    return root


def find(module: torch.nn.Module, name: str) -> Any:
    """What `module.name` reads, without running code: descriptors themselves, not what they return."""
    own = module.__dict__
    if name in own:
        return own[name]
    if name in own["_modules"]:
        return own["_modules"][name]
    if name in own["_parameters"]:
        return own["_parameters"][name]
    if name in own["_buffers"]:
        return own["_buffers"][name]
    kind = type(module)  # a fused class has the attributes of the original one, and those that a user gave it since
    value = getattr(original_class(kind) if name == "forward" else kind, name, ABSENT)
    if is_compiling() and not isinstance(value, property):
        getattr(module, name, ABSENT)  # torch.compile guards this, but not that a name is missing in a __dict__
    return value


def is_traceable(snapshot: Any) -> bool:
    """Whether torch.compile can follow, and guard, the comparison with a snapshot."""
    if isinstance(snapshot, Composite):
        return snapshot.kind in (list, tuple, dict) and all(map(is_traceable, snapshot.parts))
    if isinstance(snapshot, Children):
        return True
    if isinstance(snapshot, Function):
        return set(snapshot.code.co_freevars) <= {"__class__"}
    return not isinstance(snapshot, TensorLike)
