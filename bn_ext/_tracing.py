"""Traces forward() with torch.fx, and refuses graphs that would not do everything that forward() does."""

import enum
import inspect
import threading
import warnings
from collections.abc import Callable, Collection, Iterable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from bn_ext._capture import NotFaithfulError
from bn_ext._contents import is_library
from bn_ext._operations import is_known, is_of_torch, runs_other_code
from bn_ext._reads import CONTEXT, NONE, Reads, recorded
from bn_ext._surroundings import generators_restored, in_mode, no_collection, surroundings
from bn_ext._undo import Undo
from bn_ext._values import Value

_LOCK = threading.RLock()  # torch.fx replaces methods of torch.nn.Module while it traces


class Trace(NamedTuple):
    """The graph of a forward(), and the reads of its trace."""

    graph: Graph
    reads: Reads


def trace(
    module: torch.nn.Module,
    *,
    training: bool,
    inlined: Collection[torch.nn.Module],
    functions: bool = True,
) -> Trace:
    """Trace one module's forward() with Tensors as required arguments and the defaults of the others.

    Args:
        module: The module to trace; its state and that of its submodules is restored.
        training: The training flag of all modules during the trace.
        inlined: Modules whose forward() becomes part of the graph; other modules remain calls.
        functions: Whether the functions that they call become part of the graph too, or remain calls.

    Raises:
        NotFaithfulError: forward() cannot be traced, or does more than its graph.
    """
    members = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    traced = [member for member in members if member is module or member in inlined]
    undo, before = Undo(), surroundings()
    reads = Reads(module, traced, undo)
    with _LOCK, in_mode(members, training), generators_restored() as drawn, no_collection():
        _watch(members, undo)
        try:
            for member in traced:
                reads.attribute(member, "forward")
            tracer = _FaithfulTracer(reads, inlined, [] if functions else _functions(traced))
            graph = _trace(module, tracer, reads)
        finally:
            changed = undo.restore()
            if "_tensor_constant" in changed:
                raise NotFaithfulError("forward() uses a tensor that is not an attribute of a module")
            if changed:
                raise NotFaithfulError(f"forward() sets {changed}")
    if drawn:
        raise NotFaithfulError("forward() draws random numbers")
    if surroundings() != before:
        raise NotFaithfulError(CONTEXT)
    for node in graph.nodes:
        node.type = None  # the generated code would have to import the names in annotations
    return Trace(graph, reads)


def _trace(module: torch.nn.Module, tracer: "_FaithfulTracer", reads: Reads) -> Graph:
    try:
        with torch.enable_grad(), _NoArithmetic(reads), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with recorded(reads):
                graph = tracer.trace(module)
    except Exception as error:
        raise NotFaithfulError(reads.refused or _reason(error)) from error
    if reads.refused:
        raise NotFaithfulError(reads.refused)
    if reads.compares_with_none and any(runs_other_code(node, module) for node in graph.nodes):
        raise NotFaithfulError(NONE)
    return graph


def _watch(modules: Iterable[torch.nn.Module], undo: Undo) -> None:
    """Watch all attributes of modules, and the contents of attributes that are containers."""
    for module in modules:
        undo.watch(vars(module), "")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            undo.watch(tensor, name)
        for name, value in vars(module).items():
            undo.watch(value, name)


def _functions(modules: Iterable[torch.nn.Module]) -> list[Callable[..., Any]]:
    """Functions that the modules' forward() can call by a global name, except those of torch and this package."""
    values = [value for m in modules for value in getattr(type(m).forward, "__globals__", {}).values()]
    return [f for f in values if isinstance(f, FunctionType) and not _module_of(f).startswith(("torch.", "bn_ext."))]


def _module_of(function: Callable[..., Any]) -> str:
    return function.__module__ or ""  # generated code may have none


def _reason(error: Exception) -> str:
    if isinstance(error, NotFaithfulError):
        return str(error)
    if isinstance(error, TraceError) and ("control flow" in str(error) or "iterated" in str(error)):
        return BRANCHES
    lines = str(error).strip().splitlines() or [""]
    return f"torch.fx cannot trace it: {type(error).__name__}: {lines[0][:100]}"


BRANCHES = "forward() branches or loops on values"


class _NoArithmetic(TorchDispatchMode):
    """Refuses operations on real tensors, because their present results would become constants of the graph."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._reads.refuse(f"forward() computes with tensors other than its input ({func})")


class _FaithfulTracer(Tracer):
    """torch.fx's tracer, which inlines only the given modules and refuses unfaithful graphs."""

    proxy_buffer_attributes = True

    def __init__(self, reads: Reads, inlined: Iterable[torch.nn.Module], calls: Iterable[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(calls))
        self.refuse = reads.refuse
        """Ends the trace, even if forward() catches the error."""
        self._is_state, self.inlined = reads.is_state, set(inlined)
        self._returned: set[int] | None = set()
        """Ids of the containers that forward() returns; None while arguments of an operation are created."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """Trace as the base class does, after storing the present grad mode, autocast and other settings."""
        self._surroundings = surroundings()
        return super().trace(root, concrete_args)

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record a call as the base class does, but refuse classes that define their own __call__."""
        if any("__call__" in vars(base) for base in type(m).__mro__ if not is_library(base.__module__)):
            self.refuse(f"forward() calls a {type(m).__name__}, whose class defines its own __call__")
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: Proxy) -> bool:
        """Refuse."""
        self.refuse(BRANCHES)

    def iter(self, obj: Proxy) -> Any:
        """Refuse, unless torch.fx itself unpacks a tuple of known length."""
        try:
            return super().iter(obj)
        except TraceError:
            self.refuse(BRANCHES)

    def keys(self, obj: Proxy) -> Any:
        """Refuse, because a Tensor has no keys."""
        self.refuse(BRANCHES)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Create placeholders for the required arguments only."""
        names = required_arguments(self.root)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if surroundings() != self._surroundings:
            self.refuse(CONTEXT)
        return super().create_node(*args, **kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **named: Any) -> Proxy:
        """Create it as the base class does, but refuse calls that may keep or change a container of forward()."""
        keeps = kind == "call_module" and not is_of_torch(self.root.get_submodule(target))
        keeps = keeps or (kind == "call_function" and not is_known(target))
        if keeps and any(map(_has_container, (*args, *kwargs.values()))):
            self.refuse("forward() passes a list or a dict to a module or function that is not torch's")
        returned, self._returned = self._returned, None
        try:
            return super().create_proxy(kind, target, args, kwargs, *others, **named)
        finally:
            self._returned = returned

    def create_arg(self, a: Any) -> Any:
        """Create it as the base class does, but refuse values that the generated code cannot recreate exactly."""
        if isinstance(a, Proxy):
            return a.node
        kind = type(a)
        if a is self.root:
            self.refuse("forward() passes its own module to a function")
        if kind in (list, dict) and self._returned is not None:
            if self._is_state(a) or id(a) in self._returned:
                self.refuse("forward() returns a list or a dict that is also stored elsewhere")
            self._returned.add(id(a))
        is_member = isinstance(a, enum.Enum) and kind.__members__.get(a.name) is a
        is_node = isinstance(a, Node | torch.Tensor | torch.nn.Module)
        if not (kind in _LITERALS or is_node or is_member):
            self.refuse(
                f"forward() creates or uses a value of type {kind.__name__}, which the generated code cannot create"
            )
        return super().create_arg(a)

    def proxy(self, node: Node) -> Proxy:
        return Value(node, self)


_LITERALS = (
    *(bool, int, float, complex, str, bytes, range, slice, tuple, list, dict, type(None), type(...)),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _has_container(value: object) -> bool:
    if type(value) is tuple:
        return any(map(_has_container, value))
    return type(value) in (list, dict)


def required_arguments(module: torch.nn.Module) -> list[str]:
    """Names of the arguments of forward() that have no default.

    Raises:
        NotFaithfulError: There are none, or not all can be passed by position.
    """
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        raise NotFaithfulError("forward() is not a plain function")
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters if parameter.default is parameter.empty}
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not names or inspect.Parameter.KEYWORD_ONLY in kinds:
        raise NotFaithfulError(
            "forward() has no required argument" if not names else "forward() requires keyword arguments"
        )
    return names
