"""Records reads of forward() while torch.fx traces it; generated code is valid until one of the values changes."""

import builtins
import contextlib
import os
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch

from bn_ext import _bytecode
from bn_ext._capture import NotFaithfulError, Snapshots, unwrapped
from bn_ext._contents import ABSENT, is_library
from bn_ext._effects import (
    DECORATORS,
    EFFECTFUL_MODULES,
    HARMLESS_MODULES,
    INTROSPECTION,
    MACHINERY,
    OBSERVERS,
    READS_OF_VALUES,
    SEEDS,
    TRACING_MODULES,
    accesses_mode,
    is_harmless,
)
from bn_ext._operations import may_be_none
from bn_ext._snapshots import Seen, original_class, submodule
from bn_ext._undo import Undo, Variable

CONTEXT = f"forward() {_bytecode.CONTEXT}"
NONE = "forward() tests for None, which a module or function that is not traced may return"


class Global(NamedTuple):
    """A global name of a Python module and its chain of attributes: F.relu is ("F", "relu") in the user's module."""

    module: str
    names: tuple[str, ...]
    expected: Any

    def holds(self, seen: Seen) -> bool:
        """Whether the value is still the recorded one."""
        value: Any = sys.modules.get(self.module)
        for name in self.names:
            value = getattr(value, name, ABSENT)
        return bool(self.expected.holds(value, seen) or self.expected.holds(unwrapped(value), seen))


class OfClass(NamedTuple):
    """An attribute of a class that super() or type(self) reads; reads of modules do not include it."""

    owner: type
    name: str
    expected: Any

    def holds(self, seen: Seen) -> bool:
        """Whether the value is still the recorded one."""
        return bool(self.expected.holds(getattr(self.owner, self.name, ABSENT), seen))


class Reads:
    """The reads of one trace; :func:`recorded` fills it.

    Args:
        root: The traced module.
        traced: The modules whose forward() runs: `root` and the inlined modules.
        undo: Watches every container that is read.
    """

    def __init__(self, root: torch.nn.Module, traced: Iterable[torch.nn.Module], undo: Undo) -> None:
        self.of_modules: dict[tuple[str, ...], dict[str, Any]] = {}
        """Snapshots by path of the module and name of the attribute."""
        self.of_globals: dict[tuple[str, tuple[str, ...]], Any] = {}
        self.of_classes: dict[tuple[type, str], Any] = {}
        self.refused = ""
        """Why the graph cannot be used; empty if all reads can be compared and all calls are allowed."""
        self._root, self._undo = root, undo
        bases = {base: None for module in traced for base in original_class(type(module)).__mro__}
        self._classes = [base for base in bases if not is_library(base.__module__)]
        self.snapshots = Snapshots(root, undo.watch)
        kinds = {base for module in root.modules() for base in type(module).__mro__ if not is_library(base.__module__)}
        if any("__getattribute__" in vars(kind) for kind in kinds):
            raise NotFaithfulError(
                "its reads cannot be recorded, because a class of the model defines __getattribute__"
            )
        self._codes: dict[types.CodeType, set[str]] = {}
        """Code that has run, and the locals that it compares with None."""
        self.compares_with_none = False
        """Whether other values than such locals and state are compared with None."""
        self._nested: set[types.CodeType] = set()

    def outside_of_modules(self) -> list[Global | OfClass]:
        """The guards for reads of globals and classes."""
        names = [Global(module, names, expected) for (module, names), expected in self.of_globals.items()]
        return [*names, *(OfClass(owner, name, expected) for (owner, name), expected in self.of_classes.items())]

    def refuse(self, reason: str) -> NoReturn:
        """End the trace. The first reason is stored too, because forward() might catch the error."""
        self.refused = self.refused or reason
        raise NotFaithfulError(reason)

    def is_state(self, container: object) -> bool:
        """Whether a container was read from the model, globals or closures."""
        return self._undo.watches(container)

    def attribute(self, module: torch.nn.Module, name: str) -> None:
        """Record a read of a module's attribute."""
        path = self.snapshots.paths.get(id(module))
        if path is None:
            self.refuse(f"forward() reads {name!r} of a module outside the traced module")
        reads = self.of_modules.setdefault(path or (), {})
        if name in reads or name == "__class__":
            return
        try:
            reads[name] = self.snapshots.of_attribute(module, name)
        except NotFaithfulError as error:
            self.refuse(str(error))

    def path(self, target: str) -> None:
        """Record a read by the graph, which uses an attribute's first name; forward() may use another name."""
        *parents, name = target.split(".")
        for depth, parent in enumerate(parents):
            self._step(tuple(parents[:depth]), parent)
        self._step(tuple(parents), name)

    def _step(self, path: tuple[str, ...], name: str) -> None:
        reads = self.of_modules.setdefault(path, {})
        if name not in reads and "_modules" not in reads:
            reads[name] = self.snapshots.of_attribute(submodule(self._root, path), name)

    def call(self, frame: types.FrameType) -> None:
        """Record a call of a Python function."""
        module, code, caller = _module_of(frame), frame.f_code, frame.f_back
        is_decorator = (module, code.co_name) in DECORATORS
        is_called_by_user = caller is not None and not is_library(_module_of(caller))
        is_mode_access = caller is not None and accesses_mode(_module_of(caller), module, code.co_name)
        if is_mode_access or (code.co_name in SEEDS and module.partition(".")[0] == "torch"):
            self.refuse(CONTEXT)
        if is_library(module) and not is_called_by_user and not is_decorator:
            return
        if _is_importing(frame):
            return
        if is_decorator or code.co_name in ("__enter__", "__exit__", "__array__"):
            self.refuse(CONTEXT)
        if not is_library(module):
            self._code(frame)
        elif module in MACHINERY and code.co_name.startswith(("register_", "zero_grad", "requires_grad_")):
            self.refuse(f"forward() calls {code.co_name}() of a module")
        elif module.partition(".")[0] not in HARMLESS_MODULES or module.startswith(EFFECTFUL_MODULES):
            self.refuse(f"forward() calls {code.co_name} of {module}, which may do more than return a value")

    def end(self, frame: types.FrameType) -> None:
        """Check at the end of a Python function that the locals that it compared with None cannot become None."""
        if is_library(_module_of(frame)):
            return
        values: list[Any] = [frame.f_locals.get(name) for name in self._codes.get(frame.f_code, ())]
        if any(issubclass(type(value), torch.fx.Proxy) and may_be_none(value.node, self._root) for value in values):
            self.refuse(NONE)

    def call_of_builtin(self, frame: types.FrameType, function: Any) -> None:
        """Check a call of a function written in C."""
        module = _module_of(frame)
        owner = getattr(function, "__self__", None)
        is_of_torch = owner is None or isinstance(owner, types.ModuleType)
        if is_of_torch and accesses_mode(module, "torch", function.__name__):
            self.refuse(CONTEXT)
        if is_library(module):
            return
        if function in INTROSPECTION and not _is_importing(frame):
            self.refuse(f"forward() calls {function.__name__}()")
        if isinstance(owner, torch.Tensor) and (
            function.__name__ in READS_OF_VALUES or function.__name__.endswith("_")
        ):
            self.refuse(f"forward() calls {function.__name__}() of a tensor that is not traced")
        if not is_harmless(function) and not _is_importing(frame):
            name = getattr(function, "__qualname__", str(function))
            self.refuse(f"forward() calls {name}, which may do more than return a value")

    def _code(self, frame: types.FrameType) -> None:
        code, names = frame.f_code, frame.f_globals
        if code in self._codes:
            return
        self._codes[code], is_more = _bytecode.compared_with_none(code)
        self.compares_with_none = self.compares_with_none or is_more
        try:
            self._require_visible_closure(code)
            self._require_no_effects(code, names)
            self._method(frame)
            for chain in _bytecode.global_names(code):
                self._global(names, chain)
            for name in code.co_names:
                if any(name in vars(owner) for owner in self._classes):
                    for owner in self._classes:  # every class, because one in between may get the name later
                        self.of_classes[owner, name] = self.snapshots.of_class(owner, name)
        except NotFaithfulError as error:
            self.refuse(str(error))
        self._nested.update(_bytecode.codes_within(code))

    def _method(self, frame: types.FrameType) -> None:
        """Record which class defines the method that runs, because the class may later get another method."""
        code = frame.f_code
        if not code.co_argcount:
            return
        kind = type(frame.f_locals.get(code.co_varnames[0]))
        owners = [base for base in kind.__mro__ if not is_library(base.__module__)]
        functions = [(n, getattr(value, "fget", value)) for base in owners for n, value in vars(base).items()]
        names = [n for n, function in functions if getattr(function, "__code__", None) is code]
        for name in names:
            for owner in owners:
                self.of_classes[owner, name] = self.snapshots.of_class(owner, name)

    def _require_visible_closure(self, code: types.CodeType) -> None:
        """Require that a snapshot of the function holds its closure, or that the trace created the closure."""
        outer = set(code.co_freevars) - {"__class__"}
        if outer and code not in self._nested and code not in self.snapshots.functions:
            raise NotFaithfulError(f"forward() calls {code.co_name}, whose closure cannot be inspected")

    def _require_no_effects(self, code: types.CodeType, names: dict[str, Any]) -> None:
        for name in _bytecode.globals_set(code):
            self._undo.watch(Variable(names, name), name)
        reason = _bytecode.reason_not_to_fuse(code)
        if reason:
            raise NotFaithfulError(f"forward() {reason}")

    def _watch_namespace(self, value: Any) -> None:
        if isinstance(value, types.ModuleType | type) and not is_library(getattr(value, "__module__", value.__name__)):
            self._undo.watch(value, "")

    def _global(self, names: dict[str, Any], chain: tuple[str, ...]) -> None:
        module = str(names.get("__name__"))
        if vars(sys.modules.get(module, builtins)) is not names:
            raise NotFaithfulError(f"forward() uses {chain[0]} of {module}, which is not an imported module")
        value, depth = names.get(chain[0], ABSENT), 1
        if value is ABSENT:  # a builtin, until the module defines the name
            chain = chain[:1]
        self._watch_namespace(value)
        while depth < len(chain) and isinstance(value, types.ModuleType | type):
            value, depth = getattr(value, chain[depth], ABSENT), depth + 1
            self._watch_namespace(value)
        key = module, chain[:depth]
        if key in self.of_globals:
            return
        if value is type and chain[:depth] != ("type",):
            raise NotFaithfulError("forward() reads the type of a value")
        if str(getattr(value, "__module__", "")).startswith(TRACING_MODULES):
            raise NotFaithfulError(f"forward() tests whether it is traced ({'.'.join(chain[:depth])})")
        self.of_globals[key] = self.snapshots.of(unwrapped(value), ".".join(chain[:depth]))


_OWN_FILES = os.path.dirname(__file__) + os.sep


def _module_of(frame: types.FrameType) -> str:
    """The Python module whose code runs. Code of fused classes has the globals of the original class."""
    return __package__ if frame.f_code.co_filename.startswith(_OWN_FILES) else str(frame.f_globals.get("__name__"))


def _is_importing(frame: types.FrameType | None) -> bool:
    """Whether code runs because a Python module is imported: torch imports some of its modules late."""
    while frame is not None and frame.f_globals.get("__name__") != "importlib._bootstrap":
        frame = frame.f_back
    return frame is not None


def _is_read_by_forward(frame: types.FrameType | None, name: str) -> bool:
    """Whether forward() reads, rather than torch.fx or the attribute lookup of torch.nn.Module."""
    if frame is not None and name == "__dict__" and _module_of(frame) in MACHINERY:
        return False
    while frame is not None and _module_of(frame) in MACHINERY:
        frame = frame.f_back
    return frame is not None and not f"{_module_of(frame)}.".startswith(OBSERVERS)


@contextlib.contextmanager
def recorded(reads: Reads) -> Iterator[None]:
    """Record which attributes of modules this thread reads and which functions it calls."""
    thread = threading.get_ident()

    def read(module: torch.nn.Module, name: str) -> Any:
        if threading.get_ident() == thread and _is_read_by_forward(sys._getframe(1), name):
            reads.attribute(module, name)
        return object.__getattribute__(module, name)

    def profile(frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            reads.call(frame)
        elif event == "return":
            reads.end(frame)
        elif event == "c_call":
            reads.call_of_builtin(frame, argument)

    profiler, before = sys.getprofile(), vars(torch.nn.Module).get("__getattribute__")
    resume = getattr(profiler, "enable", None)  # cProfile's is written in C, and sys.setprofile does not accept it
    if profiler is not None and not callable(profiler) and resume is None:
        raise NotFaithfulError(f"it cannot be traced while a profiler is active ({type(profiler).__name__})")
    torch.nn.Module.__getattribute__ = read  # type: ignore[assignment,method-assign]
    try:
        sys.setprofile(profile)
        yield
    finally:
        sys.setprofile(None)
        del torch.nn.Module.__getattribute__
        if before is not None:
            torch.nn.Module.__getattribute__ = before  # type: ignore[method-assign]
        if callable(profiler):
            sys.setprofile(profiler)
        elif resume is not None:
            resume()
