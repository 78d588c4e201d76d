"""Generates straight-line code that checks the guards of a form; a loop over them takes twice the time."""

from collections.abc import Callable
from typing import Any

import torch

from bn_ext._operations import plain
from bn_ext._snapshots import Child, Children, Constant, Same, Seen, find, is_of


def comparison(guards: Any, outside: Any) -> Callable[[torch.nn.Module], bool]:
    """A function that returns the same as Form.holds(), for calls outside torch.compile."""
    source = _Source({(guard.base, guard.path) for guard in guards})
    for guard in guards:
        source.guard(guard)
    for name in outside:
        source.require(f"{source.constant(name)}.holds({source.seen(())})")
    lines = ["def holds(root):", " try:", *source.lines, "  return True", " except Exception:", "  return False"]
    exec(compile("\n".join(lines), "<bn_ext.fuse: guards>", "exec"), source.names)
    function: Callable[[torch.nn.Module], bool] = source.names["holds"]
    return function


class _Source:
    def __init__(self, guarded: set[Any]) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"__name__": __name__, "Seen": Seen, "find": find, "is_of": is_of, "plain": plain}
        self._guarded = guarded
        self._modules: dict[tuple[str, ...], str] = {(): "root"}
        self._seen: dict[tuple[str, ...], str] = {}

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def require(self, condition: str) -> None:
        self.lines.append(f"  if not ({condition}): return False")

    def seen(self, base: tuple[str, ...]) -> str:
        if base not in self._seen:
            self._seen[base] = f"s{len(self._seen)}"
            self.lines.append(f"  {self._seen[base]} = Seen()")
        return self._seen[base]

    def module(self, path: tuple[str, ...]) -> str:
        if path not in self._modules:
            parent = self.module(path[:-1])
            self._modules[path] = f"m{len(self._modules)}"
            self.lines.append(f"  {self._modules[path]} = {parent}._modules[{path[-1]!r}]")
        return self._modules[path]

    def guard(self, guard: Any) -> None:
        module, seen, kind = self.module(guard.base + guard.path), self.seen(guard.base), self.constant(guard.kind)
        self.require(f"type({module}) is {kind} or is_of({kind}, {module})")
        self.require(f"{seen}.is_same({guard.number}, {module})")
        if guard.is_plain:
            self.require(f"plain({module})")
        for name, expected in guard.reads:
            self.require(self._read(guard, name, expected, module, kind, seen))

    def _read(self, guard: Any, name: str, expected: Any, module: str, kind: str, seen: str) -> str:
        value = f"find({module}, {name!r})"
        if isinstance(expected, Child) and self._is_guarded(guard, name):
            return f"{name!r} not in {module}.__dict__"
        if isinstance(expected, Children):
            return self._children(guard, expected, module, seen)
        if isinstance(expected, Same) and name == "forward":
            return f"'forward' not in {module}.__dict__ and {kind}.forward is {self.constant(expected.value)}"
        if isinstance(expected, Same):
            return f"{value} is {self.constant(expected.value)}"
        if isinstance(expected, Constant):
            constant = self.constant(expected.value)
            return f"(value := {value}) is {constant} or {self.constant(expected)}.holds(value, {seen})"
        return f"{self.constant(expected)}.holds({value}, {seen})"

    def _children(self, guard: Any, expected: Children, module: str, seen: str) -> str:
        conditions = [f"tuple({module}._modules) == {self.constant(expected.names)}"]
        for name, child in zip(expected.names, expected.children, strict=True):
            if not (isinstance(child, Child) and self._is_guarded(guard, name)):
                conditions.append(f"{self.constant(child)}.holds({module}._modules[{name!r}], {seen})")
        return " and ".join(conditions)

    def _is_guarded(self, guard: Any, name: str) -> bool:
        """Whether a child has its own guard, which checks its class and number."""
        return (guard.base, (*guard.path, name)) in self._guarded
