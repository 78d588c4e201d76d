"""Restores objects that forward() changes while it is traced."""

import collections
import contextlib
import types
from typing import Any, NamedTuple

import torch

Contents = dict[Any, Any] | list[Any]


class Variable(NamedTuple):
    """A global name."""

    names: dict[str, Any]
    name: str


class Slots(NamedTuple):
    """The attributes of an object that are stored in __slots__."""

    owner: Any
    names: tuple[str, ...]


class Undo:
    """Stores the contents of containers, variables, classes and Python modules, and restores them."""

    def __init__(self) -> None:
        self._watched: dict[Any, tuple[Any, str, Contents]] = {}

    def watch(self, container: Any, name: str) -> None:
        """Store the contents. Changes are reported under `name`, or under the changed keys if `name` is empty."""
        key: Any = (id(container.names), container.name) if isinstance(container, Variable) else id(container)
        if isinstance(container, (*_KINDS, Slots)) or _is_array(container):
            key = ("slots", id(container.owner)) if isinstance(container, Slots) else key
            with contextlib.suppress(Exception):  # a user's container may refuse to be read
                self._watched.setdefault(key, (container, name, _contents(container)))

    def watches(self, container: object) -> bool:
        """Whether the contents of this container are stored."""
        return id(container) in self._watched

    def restore(self) -> str:
        """Restore everything that changed; return the names of the changes, or an empty string."""
        changed: list[str] = []
        for container, name, before in self._watched.values():
            different = _different(before, _contents(container), name)
            if different:
                _restore(container, before)
                changed += different
        return ", ".join(sorted(set(changed)))


_KINDS = (dict, list, set, collections.deque, types.CellType, Variable, type, types.ModuleType, torch.Tensor)
_TENSOR_ATTRIBUTES = ("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks")


def _contents(container: Any) -> Contents:
    if isinstance(container, torch.Tensor):
        return {name: getattr(container, name) for name in _TENSOR_ATTRIBUTES if container.is_leaf}
    if _is_array(container):
        return [container.tobytes()]
    if isinstance(container, Slots):
        return {name: getattr(container.owner, name, None) for name in container.names}
    if isinstance(container, types.CellType):
        try:
            return [container.cell_contents]
        except ValueError:  # not assigned yet
            return []
    if isinstance(container, Variable):
        return [container.names[container.name]] if container.name in container.names else []
    if isinstance(container, type | types.ModuleType):
        return dict(vars(container))
    return dict(container) if isinstance(container, dict) else list(container)


def _different(before: Contents, now: Contents, name: str) -> list[str]:
    """The names of the differences."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key, before) is not now.get(key, before)]
        is_same = not keys and list(before) == list(now)
        return [] if is_same else [name] if name else [str(key) for key in keys]
    is_same = len(before) == len(now) and all(a is b or _equal_bytes(a, b) for a, b in zip(before, now, strict=True))
    return [] if is_same else [name]


def _equal_bytes(left: object, right: object) -> bool:
    return isinstance(left, bytes) and left == right


def _is_array(value: object) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(value, "flat")


def _restore(container: Any, contents: Any) -> None:
    if isinstance(container, torch.Tensor | Slots):
        owner = container.owner if isinstance(container, Slots) else container
        for name, value in contents.items():
            setattr(owner, name, value)
    elif _is_array(container):
        container.flat[:] = type(container)(container.shape, container.dtype, contents[0]).flat
    elif isinstance(container, types.CellType):
        container.cell_contents = contents[0]
    elif isinstance(container, Variable):
        container.names.pop(container.name, None)
        if contents:
            container.names[container.name] = contents[0]
    elif isinstance(container, type | types.ModuleType):
        for name in [name for name, value in vars(container).items() if value is not contents.get(name, contents)]:
            setattr(container, name, contents[name]) if name in contents else delattr(container, name)
    else:
        container.clear()
        (container.update if isinstance(container, dict | set) else container.extend)(contents)
