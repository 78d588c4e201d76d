"""Classes of fused modules: what torch.fx generated runs where it is surely right, the original forward() elsewhere."""

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
    """What was so of one module when the code was generated, and must be so where it runs."""

    path: tuple[str, ...]
    kind: type[torch.nn.Module]
    number: int
    is_plain: bool
    """Whether the code does in its own way what a call of the module does: then it must have no hooks."""
    reads: tuple[tuple[str, Any], ...]
    """Names of attributes, and snapshots of their values."""
    base: tuple[str, ...] = ()
    """The module that was traced, and from which numbers are counted and the path starts."""

    def holds(self, root: torch.nn.Module, seen: Seen) -> bool:
        """Whether it is still so."""
        module = submodule(root, self.base + self.path)
        if module is None or not is_of(self.kind, module) or not seen.is_same(self.number, module):
            return False
        if self.is_plain and not plain(module):
            return False
        for name, expected in self.reads:  # noqa: SIM110, a generator takes longer
            if not expected.holds(find(module, name), seen):
                return False
        return True

    def within(self, path: tuple[str, ...]) -> "Guard":
        """The same guard, for the module that has the present one at a path."""
        return self._replace(base=path + self.base)


class Form(NamedTuple):
    """Generated code and where it may run; equal ones are shared, and pickled with the modules."""

    source: str
    arguments: int
    guards: tuple[Guard, ...]
    outside: tuple[Global | OfClass, ...]
    """Guards for globals and classes."""

    def compile(self) -> Callable[..., Any]:
        """The function that the source defines."""
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
        """Whether torch.compile can follow holds()."""
        snapshots = [snapshot for guard in self.guards for _, snapshot in guard.reads]
        return all(map(is_traceable, [*snapshots, *(guard.expected for guard in self.outside)]))

    def takes(self, module: torch.nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the code is for arguments like these, where this module is called."""
        if len(args) != self.arguments or _has_any_global_hook():
            return False
        for argument in args:
            if isinstance(argument, TracedValue):
                if module not in argument.tracer.inlined:  # type: ignore[attr-defined]
                    return False  # a direct call of .forward(): the original runs, so that its reads are recorded
            elif not isinstance(argument, Tensor):
                return False
        return True

    def holds(self, module: torch.nn.Module) -> bool:
        """Whether it does what the original forward() of a module would do, in words that torch.compile knows."""
        seen: dict[tuple[str, ...], SeenByCompiler] = {(): SeenByCompiler()}
        for guard in self.guards:
            if guard.base not in seen:
                seen[guard.base] = SeenByCompiler()
            if not guard.holds(module, seen[guard.base]):
                return False
        return all([name.holds(seen[()]) for name in self.outside])


class TracedValue(Proxy):
    """A proxy of fuse()'s own trace. Others see the original forward(): they want its nodes and values."""


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.fx need not look into, as for the code that calls it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if isinstance(argument, Proxy):
                return argument.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def guard_part(snapshots: Snapshots, root: torch.nn.Module, path: str, *names: str) -> Guard:
    """A guard for a module about which the code makes assumptions: its class and forward(), and some attributes."""
    module = root.get_submodule(path)
    if not type(module).__module__.startswith("bn_ext."):  # the forward() of this package's classes cannot be another
        names = (*names, "forward")
    reads = [(name, snapshots.of_attribute(module, name)) for name in names if find(module, name) is not ABSENT]
    place, kind = tuple(path.split(".")), original_class(type(module))
    return Guard(place, kind, snapshots.number(module), True, tuple(reads))


def _has_any_global_hook() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())


class Forms(NamedTuple):
    """All that makes a fused class of a class: the same forms, the same class."""

    training: Form | None = None
    evaluation: Form | None = None
    recomputes: bool = False
    """Whether forward() runs within recompute()."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forms":
        parts: Any = copy.deepcopy(tuple(self), memo)
        return Forms(*parts)

    def __reduce__(self) -> Any:
        """Without the forms if these hold something that only this process has, as a decorator's inner function."""
        try:
            return _forms, (pickle.dumps(tuple(self)), self.recomputes)
        except Exception:
            return Forms, (None, None, self.recomputes)


def _forms(pickled: bytes, recomputes: bool) -> Forms:
    """Without the forms if what they refer to has gone from the program, as a function that was renamed."""
    try:
        return Forms(*pickle.loads(pickled))
    except Exception:
        return Forms(None, None, recomputes)


def forms_of(module: torch.nn.Module) -> Forms:
    """Those of a fused module."""
    forms: Forms = getattr(type(module), "_bn_ext_forms", Forms())
    return forms


def fused_class(original: type, forms: Forms) -> type:
    """A subclass of the same name that runs the forms; always the same one."""
    return original if forms == Forms() else _fused_class(original, forms)


@functools.cache
def _fused_class(original: Any, forms: Forms) -> type:
    training, evaluation, recomputes = forms
    run_training, run_evaluation = _runner(training), _runner(evaluation)
    compiling, within = is_compiling, recompute  # no global names, see _in_the_place_of

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
        """By class and forms: the class itself has no place to be imported from."""
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
"""How many earlier values of an attribute of a class are kept."""


@functools.cache
def _metaclass(original: Any) -> Any:
    """Of classes whose attributes are set and deleted in the original class: type(model).name = value changes that."""

    class _Fused(original):
        def __setattr__(self, name: str, value: Any) -> None:
            # forward is that of this class: what was read here, and may be wrapped, is not the original one.
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
                # unittest.mock.patch deletes an attribute that it found in a base class, instead of restoring it.
                setattr(self._bn_ext_original, name, self._bn_ext_replaced[name].pop())
            else:
                delattr(self._bn_ext_original, name)

    return _Fused


def _is_made(kind: type) -> bool:
    """Whether this is a fused class that is ready, and not a subclass of one."""
    return "_bn_ext_fused" in vars(kind)


@functools.cache
def _runner(form: Form | None) -> tuple[Any, bool, Any]:
    """The function of a form, whether torch.compile can follow its guards, and their comparison."""
    if form is None:
        return None, False, None
    return form.compile(), form.is_traceable(), comparison(form.guards, form.outside)


def _in_the_place_of(original: FunctionType, function: Any) -> Any:
    """A function that needs no global names, with those of the original.

    torch.jit.script compiles the source of what is wrapped, the original, and looks its names up here.
    """
    same = FunctionType(function.__code__, original.__globals__, closure=function.__closure__)
    return functools.wraps(original)(same)


def _new(original: type[torch.nn.Module], forms: Forms, *arguments: Any) -> Any:
    """An empty module of a fused class, for pickle."""
    kind = fused_class(original, forms)
    return kind.__new__(kind, *arguments)


def restore_class(module: torch.nn.Module) -> None:
    """Undo the swap of a module's class."""
    if "_bn_ext_original" in vars(type(module)):
        module.__class__ = vars(type(module))["_bn_ext_original"]
