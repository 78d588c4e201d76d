"""Classes of fused modules: they run generated code while its guards hold, and the original forward() otherwise."""

import copy
import copyreg
import functools
import pickle
from collections import deque
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy

from bn_ext._capture import Snapshots
from bn_ext._comparison import comparison
from bn_ext._contents import ABSENT
from bn_ext._operations import plain
from bn_ext._reads import Global, OfClass
from bn_ext._recompute import recompute
from bn_ext._snapshots import Seen, SeenByCompiler, find, is_of, is_traceable, original_class, submodule


class Guard(NamedTuple):
    """The state of one module when the code was generated; the code may run only if the state is the same."""

    path: tuple[str, ...]
    kind: type[torch.nn.Module]
    number: int
    is_plain: bool
    """Whether the code replaces a call of the module, which must then have no hooks."""
    reads: tuple[tuple[str, Any], ...]
    """Names of attributes, and snapshots of their values."""
    base: tuple[str, ...] = ()
    """Path of the traced module, at which `path` and the numbering of objects start."""

    def holds(self, root: torch.nn.Module, seen: Seen) -> bool:
        """Whether the module's state is still the same."""
        module = submodule(root, self.base + self.path)
        if module is None or not is_of(self.kind, module) or not seen.is_same(self.number, module):
            return False
        if self.is_plain and not plain(module):
            return False
        for name, expected in self.reads:  # noqa: SIM110, a generator is slower
            if not expected.holds(find(module, name), seen):
                return False
        return True

    def within(self, path: tuple[str, ...]) -> "Guard":
        """The same guard for a root module that contains this root at `path`."""
        return self._replace(base=path + self.base)


class Form(NamedTuple):
    """Generated code and its guards; equal forms are shared, and modules are pickled with their forms."""

    source: str
    arguments: int
    guards: tuple[Guard, ...]
    outside: tuple[Global | OfClass, ...]
    """Guards for globals and classes."""

    def compile(self) -> Callable[..., Any]:
        """Return the function that the source defines."""
        names: dict[str, Any] = {"__name__": __name__}
        exec(compile(self.source, "<bn_ext.fuse>", "exec"), names)
        function: Callable[..., Any] = names["forward"]
        for name, value in names.items():
            if (
                isinstance(value, FunctionType)
                and value is not function
                and not (value.__module__ or "").startswith("torch.")
            ):
                names[name] = _recorded(value)
        return function

    def is_traceable(self) -> bool:
        """Whether torch.compile can trace holds()."""
        snapshots = [snapshot for guard in self.guards for _, snapshot in guard.reads]
        return all(map(is_traceable, [*snapshots, *(guard.expected for guard in self.outside)]))

    def takes(self, module: torch.nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the code accepts these arguments of a call of the module."""
        if len(args) != self.arguments or _has_any_global_hook():
            return False
        for argument in args:
            if isinstance(argument, TracedValue):
                if module not in argument.tracer.inlined:  # type: ignore[attr-defined]
                    return False  # a direct call of .forward(): the trace must record the original's reads
            elif not isinstance(argument, Tensor):
                return False
        return True

    def holds(self, module: torch.nn.Module) -> bool:
        """Whether the code computes the same as the module's original forward(); torch.compile can trace this check."""
        seen: dict[tuple[str, ...], SeenByCompiler] = {(): SeenByCompiler()}
        for guard in self.guards:
            if guard.base not in seen:
                seen[guard.base] = SeenByCompiler()
            if not guard.holds(module, seen[guard.base]):
                return False
        return all([name.holds(seen[()]) for name in self.outside])


class TracedValue(Proxy):
    """A proxy of fuse()'s own trace. Other traces see the original forward(), because they need its nodes."""


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that the code calls so that torch.fx records a call and does not trace into it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if isinstance(argument, Proxy):
                return argument.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def guard_part(snapshots: Snapshots, root: torch.nn.Module, path: str, *names: str) -> Guard:
    """A guard for a module that the code replaces: its class, its forward() and the attributes `names`."""
    module = root.get_submodule(path)
    if not type(module).__module__.startswith("bn_ext."):  # this package's forward() needs no guard
        names = (*names, "forward")
    reads = [(name, snapshots.of_attribute(module, name)) for name in names if find(module, name) is not ABSENT]
    place, kind = tuple(path.split(".")), original_class(type(module))
    return Guard(place, kind, snapshots.number(module), True, tuple(reads))


def _has_any_global_hook() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())


class Forms(NamedTuple):
    """The forms that define a fused class of an original class; equal forms give the same class."""

    training: Form | None = None
    evaluation: Form | None = None
    recomputes: bool = False
    """Whether forward() runs inside recompute()."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forms":
        parts: Any = copy.deepcopy(tuple(self), memo)
        return Forms(*parts)

    def __reduce__(self) -> Any:
        """Pickle; drop the forms if they hold an object of this process only, such as a decorator's inner function."""
        try:
            return _forms, (pickle.dumps(tuple(self)), self.recomputes)
        except Exception:
            return Forms, (None, None, self.recomputes)


def _forms(pickled: bytes, recomputes: bool) -> Forms:
    """Unpickle; drop the forms if they refer to an object that no longer exists, such as a renamed function."""
    try:
        return Forms(*pickle.loads(pickled))
    except Exception:
        return Forms(None, None, recomputes)


def forms_of(module: torch.nn.Module) -> Forms:
    """The forms of a module; empty if it is not fused."""
    forms: Forms = getattr(type(module), "_bn_ext_forms", Forms())
    return forms


def fused_class(original: type, forms: Forms) -> type:
    """A subclass of the same name that runs the forms; the same subclass for equal arguments."""
    return original if forms == Forms() else _fused_class(original, forms)


@functools.cache
def _fused_class(original: Any, forms: Forms) -> type:
    training, evaluation, recomputes = forms
    run_training, run_evaluation = _runner(training), _runner(evaluation)
    compiling, within = is_compiling, recompute  # local, because the global names are replaced: see _in_the_place_of

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        form, (run, is_traceable, holds) = (training, run_training) if self.training else (evaluation, run_evaluation)
        if form is None or kwargs or not form.takes(self, args):
            return original.forward(self, *args, **kwargs)
        if (is_traceable and form.holds(self)) if compiling() else holds(self):
            return run(self, *args)
        return original.forward(self, *args, **kwargs)

    def recomputing_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with within():
            return forward(self, *args, **kwargs)

    def reduce(self: torch.nn.Module, protocol: Any) -> Any:
        """Pickle the original class and the forms, because the fused class itself cannot be imported."""
        reduced: Any = original.__reduce_ex__(self, max(protocol, 2))
        made, arguments, *state = reduced
        if made is not copyreg.__newobj__ or arguments[0] is not kind:  # type: ignore[attr-defined]
            return reduced
        return _new, (original, forms, *arguments[1:]), *state

    metaclass: Any = _metaclass(type(original))  # type: ignore[arg-type]
    kind: type = metaclass(
        original.__name__,
        (original,),
        {
            **{name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")},
            "_bn_ext_original": original,
            "_bn_ext_forms": forms,
            "_bn_ext_replaced": {},
            "forward": _in_the_place_of(original.forward, recomputing_forward if recomputes else forward),
            "__reduce_ex__": reduce,
        },
    )
    type.__setattr__(kind, "_bn_ext_forward", kind.forward)  # type: ignore[attr-defined]
    type.__setattr__(kind, "_bn_ext_fused", kind)
    return kind


_NESTED_PATCHES = 16
"""How many previous values of each class attribute are kept, for nested patches."""


@functools.cache
def _metaclass(original: Any) -> Any:
    """A metaclass that redirects class attributes to the original class, so type(model).name = value changes that."""

    class _Fused(original):
        def __setattr__(self, name: str, value: Any) -> None:
            # Not forward: a wrapper of it was built around this class's forward, not around the original one.
            if not _is_made(self) or name == "forward":
                super().__setattr__(name, value)
                return
            own: Any = vars(self._bn_ext_original)
            if name in own:
                self._bn_ext_replaced.setdefault(name, deque(maxlen=_NESTED_PATCHES)).append(own[name])
            setattr(self._bn_ext_original, name, value)

        def __delattr__(self, name: str) -> None:
            if not _is_made(self) or name == "forward":
                super().__delattr__(name)
            elif self._bn_ext_replaced.get(name):
                # unittest.mock.patch deletes an attribute that it found in a base class instead of restoring it.
                setattr(self._bn_ext_original, name, self._bn_ext_replaced[name].pop())
            else:
                delattr(self._bn_ext_original, name)

    return _Fused


def _is_made(kind: type) -> bool:
    """Whether this is a complete fused class, and not a subclass of one."""
    return "_bn_ext_fused" in vars(kind)


@functools.cache
def _runner(form: Form | None) -> tuple[Any, bool, Any]:
    """A form's function, whether torch.compile can trace its guards, and the comparison of its guards."""
    if form is None:
        return None, False, None
    return form.compile(), form.is_traceable(), comparison(form.guards, form.outside)


def _in_the_place_of(original: FunctionType, function: Any) -> Any:
    """A copy of a function, which must use no global names, with the global names of the original.

    torch.jit.script compiles the source of the wrapped original and looks up its names in the wrapper.
    """
    same = FunctionType(function.__code__, original.__globals__, closure=function.__closure__)
    return functools.wraps(original)(same)


def _new(original: type[torch.nn.Module], forms: Forms, *arguments: Any) -> Any:
    """Create an empty module of a fused class, for pickle."""
    kind = fused_class(original, forms)
    return kind.__new__(kind, *arguments)


def restore_class(module: torch.nn.Module) -> None:
    """Undo the swap of a module's class."""
    if "_bn_ext_original" in vars(type(module)):
        module.__class__ = vars(type(module))["_bn_ext_original"]
