"""Classes of fused modules: what torch.fx generated runs where it is surely right, the original forward() elsewhere."""

import copyreg
import functools
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy

from bn_ext._operations import plain
from bn_ext._recompute import recompute

_SIMPLE = (bool, int, float, str, type(None))
_SETTINGS = (*_SIMPLE, FunctionType, BuiltinFunctionType, type, torch.dtype, torch.memory_format)


def _is_setting(value: object) -> bool:
    """Whether a value that forward() may look at is compared before the code runs."""
    if isinstance(value, tuple):
        return all(_is_setting(part) for part in value)
    return isinstance(value, _SETTINGS)


class Guard(NamedTuple):
    """What was so of one module when the code was generated, and must be so where it runs."""

    path: tuple[str, ...]
    kind: type[torch.nn.Module]
    children: tuple[type, ...] = ()
    """Classes of all direct children, for a module whose forward() the code goes past."""
    settings: tuple[tuple[str, object], ...] = ()
    """Attributes and their values."""

    def holds(self, root: torch.nn.Module) -> bool:
        """Whether it is still so."""
        module: Any = root
        for name in self.path:
            module = module._modules.get(name)
            if module is None:
                return False
        if original_class(type(module)) is not self.kind or (self.path and not plain(module)):
            return False
        for name, value in self.settings:
            now = getattr(module, name, Guard)
            if now is not value and (not _is_setting(now) or now != value):
                return False
        return not self.children or _kinds_of_children(module) == self.children


class Form(NamedTuple):
    """Generated code and where it may run; equal ones are shared, and pickled with the modules."""

    source: str
    arguments: int
    guards: tuple[Guard, ...]
    one_mode: bool
    """Whether it is for training only, or for evaluation only."""

    def compile(self) -> Callable[..., Any]:
        """The function that the source defines."""
        names: dict[str, Any] = {}
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

    def holds(self, module: torch.nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether it does for these arguments what the original forward() of a module would do."""
        if len(args) != self.arguments or _has_any_global_hook():
            return False
        for argument in args:
            if not isinstance(argument, Proxy | Tensor):
                return False
        for guard in self.guards:
            if not guard.holds(module):
                return False
        return not self.one_mode or self._same_mode(module)

    def _same_mode(self, module: torch.nn.Module) -> bool:
        """Whether all modules that the code goes past are in the mode of the whole."""
        for guard in self.guards:
            if guard.children and module.get_submodule(".".join(guard.path)).training != module.training:
                return False
        return True


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.fx need not look into, as for the code that calls it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if isinstance(argument, Proxy):
                return argument.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


_STANDARD = frozenset(vars(torch.nn.Module()))


def guard_container(path: str, module: torch.nn.Module) -> Guard:
    """A guard for a module whose forward() is replaced: its children, and the settings that Python code reads."""
    settings = {name: value for name, value in vars(module).items() if _is_setting(value) and name not in _STANDARD}
    return Guard(_split(path), original_class(type(module)), _kinds_of_children(module), tuple(settings.items()))


def guard_part(path: str, module: torch.nn.Module, *settings: str) -> Guard:
    """A guard for a module that the code calls in another way than forward() did, or no more."""
    values = tuple((name, getattr(module, name)) for name in settings)
    return Guard(_split(path), original_class(type(module)), (), values)


def _split(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _kinds_of_children(module: torch.nn.Module) -> tuple[type, ...]:
    return tuple([original_class(type(child)) for child in module._modules.values()])


def _has_any_global_hook() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())


def original_class(kind: type) -> type:
    """The class that a fused module had."""
    original: type = getattr(kind, "_bn_ext_original", kind)
    return original


def forms_of(module: torch.nn.Module) -> tuple[Form | None, Form | None]:
    """Those of a fused module, for training and for evaluation."""
    forms: tuple[Form | None, Form | None] = getattr(type(module), "_bn_ext_forms", (None, None))
    return forms


def fused_class(original: Any, training: Form | None, evaluation: Form | None, recomputes: bool = False) -> type:
    """A subclass of the same name that runs the two forms, perhaps within recompute(); always the same one."""
    return _fused_class(original, training, evaluation, recomputes)


@functools.cache
def _fused_class(original: Any, training: Form | None, evaluation: Form | None, recomputes: bool) -> type:
    run_training = training.compile() if training is not None else None
    run_evaluation = run_training if training == evaluation else evaluation and evaluation.compile()

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        form, run = (training, run_training) if self.training else (evaluation, run_evaluation)
        if form is None or run is None or kwargs or not form.holds(self, args):
            return original.forward(self, *args, **kwargs)
        return run(self, *args)

    within = recompute

    def recomputing_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with within():
            return forward(self, *args, **kwargs)

    def reduce(self: torch.nn.Module, protocol: Any) -> Any:
        """By class and forms: the class itself has no place to be imported from."""
        reduced: Any = original.__reduce_ex__(self, max(protocol, 2))
        made, arguments, *state = reduced
        if made is not copyreg.__newobj__ or arguments[0] is not kind:  # type: ignore[attr-defined]
            return reduced
        return _new, (original, training, evaluation, recomputes, *arguments[1:]), *state

    kind = type(
        original.__name__,
        (original,),
        {
            **{name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")},
            "_bn_ext_original": original,
            "_bn_ext_forms": (training, evaluation),
            "forward": _in_the_place_of(original.forward, recomputing_forward if recomputes else forward),
            "__reduce_ex__": reduce,
        },
    )
    return kind


def _in_the_place_of(original: FunctionType, function: Any) -> Any:
    """A function that needs no global names, with those of the original.

    torch.jit.script compiles the source of what is wrapped, the original, and looks its names up here.
    """
    same = FunctionType(function.__code__, original.__globals__, closure=function.__closure__)
    return functools.wraps(original)(same)


def _new(
    original: type[torch.nn.Module],
    training: Form | None,
    evaluation: Form | None,
    recomputes: bool,
    *arguments: Any,
) -> Any:
    """An empty module of a fused class, for pickle."""
    kind = fused_class(original, training, evaluation, recomputes)
    return kind.__new__(kind, *arguments)


def restore_class(module: torch.nn.Module) -> None:
    """Undo the swap of a module's class."""
    if "_bn_ext_original" in vars(type(module)):
        module.__class__ = original_class(type(module))
