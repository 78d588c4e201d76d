"""Graphs of forward(), by torch.fx, that are refused where they would not be faithful."""

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
from bn_ext._reads import CONTEXT, Reads, recorded
from bn_ext._snapshots import is_library
from bn_ext._surroundings import RefusedError, generators_kept, in_mode, no_collection, surroundings
from bn_ext._undo import Undo
from bn_ext._values import Value

_LOCK = threading.RLock()  # torch.fx replaces methods of torch.nn.Module while it traces


class Trace(NamedTuple):
    """The graph of a forward(), and what was read to make it."""

    graph: Graph
    reads: Reads


def trace(
    module: torch.nn.Module,
    *,
    training: bool,
    inlined: Collection[torch.nn.Module],
    functions: bool = True,
) -> Trace:
    """Trace one module's forward(), for Tensors as its required arguments and the defaults of the others.

    Args:
        module: The module to trace; it and all in it are left as they were.
        training: The training flag, of all modules, to trace with.
        inlined: Modules whose forward() becomes part of the graph; each other one stays a call.
        functions: Whether functions beside these forwards become part of it too; otherwise they stay calls.

    Raises:
        NotFaithfulError: forward() cannot be traced, or does more than its graph says.
    """
    members = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    traced = [member for member in members if member is module or member in inlined]
    undo, before = Undo(), surroundings()
    reads = Reads(module, traced, undo)
    with _LOCK, in_mode(members, training), generators_kept() as drawn, no_collection():
        _watch(members, undo)
        try:
            for member in traced:
                reads.attribute(member, "forward")
            graph = _trace(module, _FaithfulTracer(inlined, [] if functions else _functions(traced)), reads)
        finally:
            changed = undo.restore()
            if "_tensor_constant" in changed:
                raise NotFaithfulError("its forward uses tensors from elsewhere")
            if changed:
                raise NotFaithfulError(f"its forward sets {changed}")
    if drawn:
        raise NotFaithfulError("its forward draws random numbers")
    if surroundings() != before:
        raise NotFaithfulError(CONTEXT)
    for node in graph.nodes:
        node.type = None  # annotations: names that the code would have to import
    return Trace(graph, reads)


def _trace(module: torch.nn.Module, tracer: "_FaithfulTracer", reads: Reads) -> Graph:
    RefusedError.last = ""
    try:
        with torch.enable_grad(), _NoArithmetic(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with recorded(reads):
                graph = tracer.trace(module)
    except Exception as error:
        raise NotFaithfulError(RefusedError.last or reads.refused or _reason(error)) from error
    if RefusedError.last or reads.refused:
        raise NotFaithfulError(RefusedError.last or reads.refused)
    return graph


def _watch(modules: Iterable[torch.nn.Module], undo: Undo) -> None:
    """All attributes of modules, and the contents of those that are containers."""
    for module in modules:
        undo.watch(vars(module), "")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            undo.watch(tensor, name)
        for name, value in vars(module).items():
            undo.watch(value, name)


def _functions(modules: Iterable[torch.nn.Module]) -> list[Callable[..., Any]]:
    """Those that the forwards of modules can call by a global name, and that are not of a library known here."""
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


BRANCHES = "its forward branches or loops on values"


class _NoArithmetic(TorchDispatchMode):
    """No operation on real tensors: its result, as it is today, would become part of the graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RefusedError(f"its forward computes with other tensors than its input ({func})")


class _FaithfulTracer(Tracer):
    """torch.fx's, with what it may inline said from outside."""

    proxy_buffer_attributes = True

    def __init__(self, inlined: Iterable[torch.nn.Module], calls: Iterable[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(calls))
        self.inlined = set(inlined)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """As the base class, from where grad mode, autocast and so on are as they are now."""
        self._surroundings = surroundings()
        return super().trace(root, concrete_args)

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As the base class, but not for what another __call__ than torch.nn.Module's does around forward()."""
        if any("__call__" in vars(base) for base in type(m).__mro__ if not is_library(base.__module__)):
            raise RefusedError(f"its forward calls a {type(m).__name__}, whose class has a __call__ of its own")
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: Proxy) -> bool:
        """Refuse, also where forward() catches the error."""
        raise RefusedError(BRANCHES)

    def iter(self, obj: Proxy) -> Any:
        """Refuse, except for torch.fx itself, which unpacks tuples of a known length."""
        try:
            return super().iter(obj)
        except TraceError:
            raise RefusedError(BRANCHES) from None

    def keys(self, obj: Proxy) -> Any:
        """Refuse: a Tensor has none."""
        raise RefusedError(BRANCHES)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the required arguments only."""
        names = required_arguments(self.root)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if surroundings() != self._surroundings:
            raise RefusedError(CONTEXT)
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if a is self.root:
            raise RefusedError("its forward gives itself to a function")
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, tuple | list | dict) and type(a) not in (tuple, list, dict) and not hasattr(a, "_fields"):
            raise RefusedError(f"its forward makes a {type(a).__name__}, which torch.fx takes for a plain one")
        return super().create_arg(a)

    def proxy(self, node: Node) -> Proxy:
        return Value(node, self)


def required_arguments(module: torch.nn.Module) -> list[str]:
    """Names of the arguments that forward() has no default for.

    Raises:
        NotFaithfulError: There are none, or not all can be given by position.
    """
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        raise NotFaithfulError("its forward is no plain function")
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters if parameter.default is parameter.empty}
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not names or inspect.Parameter.KEYWORD_ONLY in kinds:
        raise NotFaithfulError("its forward has no required argument" if not names else "its forward requires keywords")
    return names
