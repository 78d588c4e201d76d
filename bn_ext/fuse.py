"""Whole models: fuse batch norms with the activations and additions that follow them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, overload

import torch
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from bn_ext._capture import NotFaithfulError, Snapshots
from bn_ext._fused_class import Form, Forms, Guard, forms_of, fused_class, guard_part, restore_class
from bn_ext._operations import called, plain
from bn_ext._patterns import Found, Match, find, rewrite
from bn_ext._snapshots import Constant, original_class, submodule
from bn_ext._timm import BatchNormAct
from bn_ext._tracing import Trace, required_arguments, trace
from bn_ext.activations import describe
from bn_ext.convert import convert

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass
class FuseRow:
    """The outcome for one batch norm: the operations of its call, or the reason for fusing none."""

    place: str
    """Its name in the model."""
    what: str = "batch_norm"
    """All operations that its call computes now."""
    where: str = ""
    """The module whose forward() makes that call, or to which `reason` refers."""
    reason: str = ""
    """Why it only normalises; empty if something was fused."""


@dataclass
class FuseReport:
    """The outcome of `fuse`: one row per batch norm; `print` shows it as a table.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.BatchNorm1d(4))
        >>> model, report = bn_ext.fuse(model, report=True)
        >>> print(report)
        batch norm  computes           in       reason
        0           batch_norm + relu  (model)
        2           batch_norm         (model)  nothing to fuse: its result is returned
        1 of 2 batch norms fused
    """

    rows: list[FuseRow]
    """One row per batch norm, in the order of `model.named_modules()`."""

    @property
    def fused(self) -> list[FuseRow]:
        """The rows of the batch norms that compute more than the normalisation."""
        return [row for row in self.rows if not row.reason]

    def __str__(self) -> str:
        table = [("batch norm", "computes", "in", "reason")]
        table += [(r.place or "(model)", r.what, r.where or "(model)", r.reason) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        lines.append(f"{len(self.fused)} of {len(self.rows)} batch norms fused")
        return "\n".join(line.rstrip() for line in lines)


@overload
def fuse(model: Model, *, recompute: bool = False, report: Literal[False] = False) -> Model: ...
@overload
def fuse(model: Model, *, recompute: bool = False, report: Literal[True]) -> tuple[Model, FuseReport]: ...
def fuse(model: Model, *, recompute: bool = False, report: bool = False) -> Model | tuple[Model, FuseReport]:
    """Fuse each batch norm with the addition and activation after it: act(bn(x)), bn(x) + y, act(bn(x) + y); in place.

    Equivalent to `convert(model)`, with `bn(x, y, activation="relu")` in place of `torch.relu(bn(x) + y)` in the
    forward methods. `fuse` traces the forward() of each module that contains batch norms with torch.fx, in training
    and in evaluation. If something can be fused, the module's class becomes a subclass of the same name whose forward()
    is generated. Modules, parameters, buffers and their names do not change; fused activation modules are not called.
    `revert` undoes it, another call fuses again, and deepcopy, pickle and torch.compile work.

    The generated code is valid for the state that forward() read while it was traced: attributes of modules, contents
    of containers and objects, globals, closures. Each call compares that state with the present one; after a change,
    the original forward() runs until the model is fused again. The code accepts only positional Tensors; if torch.fx
    traces the model from outside, it sees the original forward().

    The report states the reason if a batch norm is not fused: its result is used elsewhere too, it is called twice or
    has hooks, or its input or residual may be changed in place in between; or if a forward() is not: it cannot be
    traced (it branches on values), has effects beyond its result (attributes, contexts, output, random numbers), or
    reads state that cannot be compared later. docs/fusing.md states the exact guarantee.

    Args:
        model: Any module.
        recompute: Whether the model's forward() runs inside `bn_ext.recompute`, which keeps less for backward.
        report: Whether to also return a report.

    Returns:
        `model`; with `report`, the pair of `model` and a `FuseReport`.

    Raises:
        TypeError: If model is not a torch.nn.Module, or recompute is True and its class cannot have subclasses.

    Numerics: see `bn_ext.batch_norm`; float16 and bfloat16 results round once instead of after every operation.

    Examples:
        >>> model = bn_ext.fuse(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU()))
        >>> bool((model(torch.randn(8, 4)) >= 0).all())
        True
    """
    convert(model)
    fusing = _Fusing(model)
    for name, module in reversed(list(model.named_modules())):
        if module in fusing.containers:
            fusing.fuse(name, module)
    if recompute and fusing.containers:
        try:
            model.__class__ = fused_class(original_class(type(model)), forms_of(model)._replace(recomputes=True))
        except Exception as error:
            raise TypeError(
                f"recompute=True requires a subclass of {type(model).__name__}, which cannot be created ({error}): use "
                "`with bn_ext.recompute():` around the forward pass instead"
            ) from error
    return (model, FuseReport(list(fusing.rows.values()))) if report else model


class _Traced(NamedTuple):
    """One mode of one module: the matches, and the generated code if there are any."""

    found: Found
    form: Form | None


class _Fusing:
    """One call of fuse: the state of each module of the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        names = dict(model.named_modules())
        for module in names.values():
            restore_class(module)
        self.rows = {m: FuseRow(name) for name, m in names.items() if _is_norm(m)}
        for norm, row in self.rows.items():
            row.reason = "no traced forward calls it"
            inner = norm.inner_activation() if isinstance(norm, BatchNormAct) else None
            if inner is not None and inner[0] is not None:
                row.what, row.where, row.reason = f"batch_norm + {describe(inner)}", row.place, ""
        self.open = {norm for norm, row in self.rows.items() if row.reason}
        """Batch norms that no traced forward() has called, or whose result it returns: a container may fuse them."""
        self.containers = {m for m in names.values() if m not in self.rows and self.rows.keys() & set(m.modules())}
        self.opaque: set[torch.nn.Module] = set()
        """Containers whose own forward() cannot be traced."""

    def fuse(self, name: str, module: torch.nn.Module) -> None:
        """Swap the class of one module if its forward() can be fused; its submodules come before it."""
        if type(module).forward is torch.nn.Module.forward:  # ModuleList and similar containers
            return
        try:
            modes = [self._trace(module, training) for training in (True, False)]
            forms = [mode.form for mode in modes]
            if any(forms):
                _swap_class(module, *forms)
        except NotFaithfulError as error:
            self._report_failure(name, module, str(error))
            return
        self._report(name, module, *(mode.found for mode in modes))

    def _trace(self, module: torch.nn.Module, training: bool) -> _Traced:
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule) or "forward" in vars(module):
            raise NotFaithfulError(f"it is a {type(module).__name__}, whose forward is not that of its class")
        traced, inlined, functions = self._trace_widely(module, training)
        found = find(traced.graph, module, training)
        needed = inlined & set(_stack(found, module))
        if not found.matches:
            return _Traced(found, None)
        if needed != inlined:  # the remaining modules keep their own forward()
            traced = trace(module, training=training, inlined=needed, functions=functions)
            small = find(traced.graph, module, training)
            found = Found(small.matches, {**found.obstacles, **small.obstacles})
        return _Traced(found, _form(traced, found, module, needed, training))

    def _trace_widely(self, module: torch.nn.Module, training: bool) -> tuple[Trace, set[torch.nn.Module], bool]:
        """Trace with as many inlined containers as possible; return also these, and whether functions are inlined."""
        inner = {m for m in module.modules() if m in self.containers and m is not module and plain(m)}
        error = NotFaithfulError()
        for inlined in (inner, inner - self.opaque, set[torch.nn.Module]()):
            for functions in (True, False):
                try:
                    return trace(module, training=training, inlined=inlined, functions=functions), inlined, functions
                except NotFaithfulError as reason:
                    error = reason
        raise error

    def _report_failure(self, name: str, module: torch.nn.Module, reason: str) -> None:
        self.opaque.add(module)
        for norm in self.open & set(module.modules()):
            self.rows[norm].where, self.rows[norm].reason = name, reason
            self.open.discard(norm)

    def _report(self, name: str, module: torch.nn.Module, training: Found, evaluation: Found) -> None:
        for target in {**training.matches, **evaluation.matches}:
            norm = module.get_submodule(target)
            modes = [str(found.matches.get(target, "batch_norm")) for found in (training, evaluation)]
            what = modes[0] if modes[0] == modes[1] else f"{modes[0]} in training, {modes[1]} in evaluation"
            self.rows[norm] = FuseRow(self.rows[norm].place, what, name)
            self.open.discard(norm)
        for target, reason in {**evaluation.obstacles, **training.obstacles}.items():
            norm = module.get_submodule(target)
            if self.rows[norm].reason:
                self.rows[norm].where, self.rows[norm].reason = name, reason
                (self.open.add if reason.endswith("is returned") else self.open.discard)(norm)


def _is_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def _stack(found: Found, root: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules whose forward() contains the matches or is relied on: as opaque calls, they could do anything."""
    for match in found.matches.values():
        for node in (match.norm, *match.nodes, *match.relied):
            for path, _ in node.meta.get("nn_module_stack", {}).values():
                yield root.get_submodule(path)


def _form(
    traced: Trace,
    found: Found,
    root: torch.nn.Module,
    inlined: set[torch.nn.Module],
    training: bool,
) -> Form:
    graph, reads = traced
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            reads.path(str(node.target))
    guards: list[Guard] = []
    outside = reads.outside_of_modules()
    for place, of_module in reads.of_modules.items():
        module = submodule(root, place)
        is_plain = module in inlined
        kind, number = original_class(type(module)), reads.snapshots.number(module)
        guards.append(Guard(place, kind, number, is_plain, tuple(of_module.items())))
        forms = forms_of(module)
        inner = (forms.training if training else forms.evaluation) if is_plain else None
        if inner is not None:
            guards += [guard.within(place) for guard in inner.guards]
            outside += inner.outside
    for match in found.matches.values():
        guards += _guards_of_parts(match, root, reads.snapshots)
    rewrite(graph, found)
    graph.lint()
    code = graph.python_code("self")
    try:
        imports = _format_import_block(code.globals, sys_importer)
    except Exception as error:
        raise NotFaithfulError(f"its code refers to an object that cannot be imported: {error}") from error
    return Form(
        f"{imports}\n{code.src}",
        len(required_arguments(root)),
        tuple(dict.fromkeys(guards)),
        tuple(dict.fromkeys(outside)),
    )


def _guards_of_parts(match: Match, root: torch.nn.Module, snapshots: Snapshots) -> Iterator[Guard]:
    for node in (match.norm, *match.nodes):
        module = called(node, root)
        if module is not None:
            guard = guard_part(snapshots, root, str(node.target), *_ASSUMED)
            if getattr(module, "p", 0):  # a dropout that drops nothing because it is in evaluation
                guard = guard._replace(reads=(*guard.reads, ("training", Constant(bool, False))))
            yield guard
    for node in match.relied:
        if node.op == "call_module":
            path = str(node.target)
            for inner, _ in root.get_submodule(path).named_modules(prefix=path):
                yield guard_part(snapshots, root, inner, "inplace", "_modules")


_ASSUMED = ("activation", "negative_slope", "alpha", "approximate", "min_val", "max_val", "p")


def _swap_class(module: torch.nn.Module, training: Form | None, evaluation: Form | None) -> None:
    try:
        module.__class__ = fused_class(type(module), Forms(training, evaluation))
    except Exception as error:
        raise NotFaithfulError(f"its class cannot be extended: {error}") from error
