"""Finds the batch norms in a torch.fx graph that can take over later nodes, and why others cannot."""

import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from bn_ext import _timm
from bn_ext._operations import (
    Addition,
    activation,
    addition,
    called,
    does_nothing,
    drops_nothing,
    may_read_state,
    may_write,
    plain,
    storage,
    writes,
)
from bn_ext.activations import PARAMETERS, describe
from bn_ext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

KINDS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_FRESH_RESULTS = (
    *(torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear),
    *(F.conv1d, F.conv2d, F.conv3d, F.linear),
    *(torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
)


class ObstacleError(Exception):
    """A batch norm cannot be fused; the message is the reason."""


@dataclass
class Match:
    """A batch norm and the later nodes that become one call with it; the call replaces the last node."""

    norm: Node
    nodes: list[Node]
    activation: tuple[str | None, float] | None = None
    sum: Node | None = None
    second: bool = False
    """Whether the batch norm's result is the second operand of the addition."""
    relied: list[Node] = field(default_factory=list)
    """Other nodes whose behaviour determines whether the match is safe."""

    @property
    def last(self) -> Node:
        """The node that the call replaces."""
        return self.nodes[-1]

    def residual(self) -> Node | None:
        """The other operand of the addition in the present graph."""
        found = None if self.sum is None else addition(self.sum)
        return None if found is None else found.operands[not self.second]

    def __str__(self) -> str:
        steps = [] if self.sum is None else ["add"]
        steps += [] if self.activation is None else [describe(self.activation)]
        return " + ".join(["batch_norm", *steps])


@dataclass
class Found:
    """The matches and obstacles of a graph, by target of the batch norm."""

    matches: dict[str, Match] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)


def find(graph: Graph, root: torch.nn.Module, training: bool) -> Found:
    """All batch norms that can be fused in a graph of `root`, traced in this mode, and why others cannot."""
    calls = Counter(inner for node in graph.nodes for inner in _reached(node, root))
    found = Found()
    for node in graph.nodes:
        module, target = called(node, root), str(node.target)
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or fused(node):
            continue
        try:
            if calls[module] > 1:
                raise ObstacleError("it is called more than once")
            found.matches[target] = _match(node, root, training)
        except ObstacleError as obstacle:
            found.obstacles[target] = str(obstacle)
    unmatched = [node for node in graph.nodes if str(node.target) in found.obstacles]
    _decide_between_operands(found, {_through_identity(n, root, training)[0]: str(n.target) for n in unmatched})
    return found


def _reached(node: Node, root: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that a node calls or passes to a function that may call them."""
    value: Any = called(node, root)
    if node.op == "get_attr":
        value = functools.reduce(getattr, str(node.target).split("."), root)
    return value.modules() if isinstance(value, torch.nn.Module) else iter(())


def _decide_between_operands(found: Found, unmatched: dict[Node, str]) -> None:
    """If both operands of an addition are batch norms, fuse only the one written to, otherwise the first."""
    first = {match.sum: target for target, match in found.matches.items() if match.sum and not match.second}
    for target, match in list(found.matches.items()):
        if match.second and match.sum in first:
            del found.matches[target]
            found.obstacles[target] = f"its result is the residual of {first[match.sum]}"
    for result, unmatched_target in unmatched.items():
        takers = [target for target, match in found.matches.items() if match.sum in result.users]
        if takers and len(result.users) == 1:
            found.obstacles[unmatched_target] = f"its result is the residual of {takers[0]}"


def fused(node: Node) -> bool:
    """Whether a call of a batch norm already computes an addition or activation."""
    return node.op == "call_module" and ("activation" in node.kwargs or len(node.args) > 1)


def rewrite(graph: Graph, found: Found) -> None:
    """Replace each match by one call of its batch norm."""
    for match in found.matches.values():
        arguments = [match.norm.args[0]]
        keywords: dict[str, Any] = {"activation": None}
        if match.activation is not None:
            keywords["activation"] = match.activation if match.activation[0] in PARAMETERS else match.activation[0]
        residual = match.residual()
        if residual is not None:
            assert match.sum is not None
            written = addition(match.sum).written  # type: ignore[union-attr]
            arguments.append(residual)
            keywords["unlike"] = "add" if written is None else "add_"
        with graph.inserting_before(match.last):
            call = graph.create_node("call_module", match.norm.target, tuple(arguments), keywords)
            call.meta = dict(match.last.meta)
        match.last.replace_all_uses_with(call)
        for node in [*reversed(match.nodes), match.norm]:
            graph.erase_node(node)


def _match(norm: Node, root: torch.nn.Module, training: bool) -> Match:
    _require_standard_call(norm, root)
    result, passed = _through_identity(norm, root, training)
    user = _only_user(result)
    if fused(user):
        raise ObstacleError(f"its result is the residual of {user.target}")
    match = Match(norm, [*passed, user], activation(user, root))
    sum = addition(user)
    if sum is not None:
        match.sum, match.second = user, _is_second(sum, result)
        total, passed = _through_identity(user, root, training)
        after = next(iter(total.users))
        between = _between(user, after, {*passed})
        if len(total.users) == 1 and activation(after, root) and not any(may_write(n, root) for n in between):
            match.nodes += [*passed, after]
            match.activation = activation(after, root)
            match.relied += between
    if match.activation is None and sum is None:
        raise ObstacleError(f"nothing to fuse: it is followed by {_description(user, root)}")
    _require_safe(match, root, training)
    return match


def _require_standard_call(norm: Node, root: torch.nn.Module) -> None:
    module = called(norm, root)
    assert module is not None
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        raise ObstacleError("it is lazy: run the model once, then call fuse")
    if isinstance(module, _timm.BatchNormAct) and module.inner_activation() != _timm.NO_ACTIVATION:
        raise ObstacleError(f"its activation is its child act, a {type(module.act).__name__}")
    if type(module) not in KINDS and _timm.stock_class(type(module)) is None:
        raise ObstacleError(f"it is a {type(module).__name__}, which may compute something else")
    if not plain(module):
        raise ObstacleError("it has hooks or its own forward method")
    if module.activation is not None:
        raise ObstacleError("it has its own activation")
    if len(norm.args) != 1 or norm.kwargs:
        raise ObstacleError("it is not called with exactly one positional argument")
    if any(n.op == "get_attr" and str(n.target).startswith(f"{norm.target}.") for n in norm.graph.nodes):
        raise ObstacleError("its parameters or statistics are also used elsewhere")


def _through_identity(node: Node, root: torch.nn.Module, training: bool) -> tuple[Node, list[Node]]:
    """The last of the nodes after `node` that return their input unchanged, and a list of all of them."""
    passed: list[Node] = []
    norm = called(node, root)
    while len(node.users) == 1:
        user = next(iter(node.users))
        module = called(user, root)
        if not (_is_inactive_dropout(user) or (len(user.args) == 1 and does_nothing(module, norm, training))):
            break
        passed.append(node := user)
    return node, passed


def _is_inactive_dropout(node: Node) -> bool:
    if node.op != "call_function" or node.target is not F.dropout:
        return False
    given = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    return drops_nothing(given.arguments["p"], given.arguments["training"])


def _only_user(result: Node) -> Node:
    if len(result.users) != 1:
        raise ObstacleError(
            f"its result is used {len(result.users)} times" if result.users else "its result is not used"
        )
    user = next(iter(result.users))
    if user.op == "output":
        raise ObstacleError("nothing to fuse: its result is returned")
    return user


def _is_second(sum: Addition, result: Node) -> bool:
    first, second = sum.operands
    if first is second:
        raise ObstacleError("its result is added to itself")
    if sum.written not in (None, result):
        raise ObstacleError("the addition writes to its other operand")
    return second is result


def _between(start: Node, end: Node, excluded: set[Node]) -> list[Node]:
    """The nodes between two nodes, without those in `excluded`."""
    nodes, node = [], start.next
    while node is not end:
        if node not in excluded:
            nodes.append(node)
        node = node.next
    return nodes


def _require_safe(match: Match, root: torch.nn.Module, training: bool) -> None:
    """Fusing delays the batch norm: until then its inputs must not change, and its residual not before backward."""
    source, between = match.norm.args[0], _between(match.norm, match.last, set(match.nodes))
    if _is_fresh(source, root):
        match.relied += [source] if between else []  # type: ignore[list-item]
        match.relied += between if training else []
    elif any(may_write(node, root) for node in between):
        raise ObstacleError("its input may be changed in place before the activation or addition")
    else:
        match.relied += between
    adding = [] if match.sum is None else [match.sum]
    if training and any(may_read_state(node, root) for node in (*between, *adding)):
        raise ObstacleError("its statistics may be read before the activation or addition")
    residual, node = match.residual(), match.last.next
    if residual is None:
        return
    memory = storage(residual, root)
    while node.op != "root":
        if writes(node, root) and any(storage(n, root) is memory for n in node.all_input_nodes):
            raise ObstacleError("its residual is changed in place later")
        node = node.next


def _is_fresh(source: object, root: torch.nn.Module) -> bool:
    """Whether no other code can access the memory of a batch norm's input."""
    if not isinstance(source, Node) or len(source.users) != 1:
        return False
    module = called(source, root)
    return source.target in _FRESH_RESULTS if module is None else type(module) in _FRESH_RESULTS and plain(module)


def _description(node: Node, root: torch.nn.Module) -> str:
    module = called(node, root)
    if module is not None:
        return type(module).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
