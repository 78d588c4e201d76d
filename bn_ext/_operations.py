"""Classification of torch.fx nodes for fusing: activations, additions, operations in place."""

import functools
import operator
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Node

from bn_ext._contents import is_library
from bn_ext.activations import resolve

_INPLACE = "inplace"  # name of the argument
IN_PLACE = (
    *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub"),
    *("itruediv", "ixor"),
)
"""Names of the augmented assignments, such as +=, in module operator."""


def in_place(name: str, left: Any, right: Any) -> Any:
    """Run an augmented assignment, such as left += right, and return the new value of left.

    It is a function because the statement in generated code would also change other uses of the name.
    """
    return getattr(operator, name)(left, right)


def unpacked(value: Any, number: int) -> tuple[Any, ...]:
    """The parts of a value; raises an error unless there are `number`, like `a, b = value` and unlike value[0]."""
    parts = tuple(value)
    if len(parts) != number:
        amount = "too many" if len(parts) > number else "not enough"
        raise ValueError(f"{amount} values to unpack (expected {number}, got {len(parts)})")
    return parts


ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", (_INPLACE,)),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.leaky_relu: ("leaky_relu", ("negative_slope", _INPLACE)),
    F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.relu6: ("relu6", (_INPLACE,)),
    F.hardtanh: ("hardtanh", ("min_val", "max_val", _INPLACE)),
    F.hardtanh_: ("hardtanh", ("min_val", "max_val")),
    F.elu: ("elu", ("alpha", _INPLACE)),
    F.elu_: ("elu", ("alpha",)),
    F.silu: ("silu", (_INPLACE,)),
    F.gelu: ("gelu", ("approximate",)),
    F.hardswish: ("hardswish", (_INPLACE,)),
    F.mish: ("mish", (_INPLACE,)),
    torch.sigmoid: ("sigmoid", ()),
    torch.sigmoid_: ("sigmoid", ()),
    torch.tanh: ("tanh", ()),
    torch.tanh_: ("tanh", ()),
}
_METHODS = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}

_ADDITIONS = {operator.add, torch.add, "add", "add_", "__add__", "__radd__"}

_VIEWS = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "expand"),
    *("contiguous", "to", "float", "detach", "chunk", "split", "narrow", "select", "unbind", "t", "swapaxes"),
    *("getitem", "getattr", "movedim", "expand_as", "type_as", "half", "double", "tensor_split", "unpacked"),
}


def plain(module: torch.nn.Module | None) -> bool:
    """Whether a call of the module runs its class's forward() and nothing else, such as hooks."""
    return module is not None and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or "_call_impl" in module.__dict__
    )


def does_nothing(module: torch.nn.Module | None, norm: torch.nn.Module | None, training: bool) -> bool:
    """Whether a call of the module in this mode returns its input unchanged, given a result of `norm`.

    A Dropout2d warns if images are not two-dimensional, for example: its dimensions must be those of the norm.
    """
    if not plain(module):
        return False
    if type(module) is torch.nn.Dropout or isinstance(norm, _NORM_OF_DROPOUT.get(type(module), ())):
        return drops_nothing(module.p, training)  # type: ignore[union-attr]
    return type(module) is torch.nn.Identity


_NORM_OF_DROPOUT: dict[type, type] = {
    torch.nn.Dropout1d: torch.nn.BatchNorm1d,
    torch.nn.Dropout2d: torch.nn.BatchNorm2d,
    torch.nn.Dropout3d: torch.nn.BatchNorm3d,
}


def drops_nothing(p: Any, training: Any) -> bool:
    """Whether a dropout with these arguments returns its input unchanged."""
    return isinstance(p, int | float) and 0 <= p <= 1 and (p == 0 or training is False)


def called(node: Node, root: torch.nn.Module) -> torch.nn.Module | None:
    """The module that a node calls, or None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def activation(node: Node, root: torch.nn.Module) -> tuple[str | None, float] | None:
    """Name and parameter, as from :func:`bn_ext.activations.resolve`, of a node that is a supported activation."""
    name, arguments = "", {}
    if node.op == "call_module":
        module = called(node, root)
        try:
            return resolve(module) if plain(module) and len(node.args) == 1 and not node.kwargs else None
        except ValueError:
            return None
    if node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
        name = _METHODS.get(str(node.target), "")
    elif node.op == "call_function" and node.args and node.target in ACTIVATIONS:
        name, parameters = ACTIVATIONS[node.target]
        if len(node.args) > 1 + len(parameters) or not set(node.kwargs) <= set(parameters):
            return None
        arguments = dict(zip(parameters, node.args[1:], strict=False)) | node.kwargs
    arguments.pop(_INPLACE, None)
    if not name or any(isinstance(value, Node) for value in arguments.values()):
        return None
    return _with_parameter(name, list(arguments.values()))


def _with_parameter(name: str, values: list[Any]) -> tuple[str | None, float] | None:
    if name == "hardtanh":
        return ("relu6", 0.0) if values == [0, 6] else None
    if name == "gelu":
        name, values = "gelu_tanh" if values == ["tanh"] else name, []
    return resolve((name, *values))


class Addition(NamedTuple):
    """Two nodes that are added; `written` is the one that receives the sum if the addition is in place."""

    operands: tuple[Node, Node]
    written: Node | None


def addition(node: Node) -> Addition | None:
    """The operands of a node that adds two values; None for other nodes."""
    if node.target is in_place:
        name, left, right = node.args
        both = isinstance(left, Node) and isinstance(right, Node)
        return Addition((left, right), left) if name == "iadd" and both else None  # type: ignore[arg-type]
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    others = {name: value for name, value in node.kwargs.items() if name != "other"}
    operands = (*node.args, *([node.kwargs["other"]] if "other" in node.kwargs else []))
    if len(operands) != 2 or not all(isinstance(operand, Node) for operand in operands):
        return None
    if set(others) - {"alpha"} or isinstance(others.get("alpha", 1), Node) or others.get("alpha", 1) != 1:
        return None
    first, second = operands
    return Addition((first, second), first if node.target == "add_" else None)  # type: ignore[arg-type]


def writes(node: Node, root: torch.nn.Module) -> bool:
    """Whether a node certainly changes one of its arguments in place."""
    if node.op == "call_module":
        return bool(getattr(called(node, root), _INPLACE, False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    has_name = name.strip("_") in (*IN_PLACE, "in_place", "setitem") or (name.endswith("_") and not name.endswith("__"))
    has_argument = bool(node.kwargs.get(_INPLACE)) or node.kwargs.get("out") is not None
    return has_name or has_argument


_KNOWN_LIBRARIES = ("torch", "_operator", "operator", "math", "builtins", "bn_ext")


def is_known(function: Any) -> bool:
    """Whether a function belongs to torch, Python or this package."""
    library = getattr(function, "__module__", None) or ("" if isinstance(function, FunctionType) else "torch")
    return library.partition(".")[0] in _KNOWN_LIBRARIES


def is_of_torch(module: torch.nn.Module) -> bool:
    """Whether a call of a module runs only code of torch.nn or this package, and no hooks."""
    return all(
        plain(m)
        and type(m).__module__.startswith(("torch.nn.", "bn_ext."))
        and all(is_library(base.__module__) for base in type(m).__mro__)  # parametrized classes claim to be torch's
        for m in module.modules()
    )


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def runs_other_code(node: Node, root: torch.nn.Module) -> bool:
    """Whether a node may run code outside torch, Python and this package."""
    module = called(node, root)
    if hasattr(type(module), "_bn_ext_stock"):  # a batch norm that applies its children to its result
        return not all(plain(m) for m in module.modules())  # type: ignore[union-attr]
    if module is not None:
        return not is_of_torch(module)
    is_custom = str(getattr(node.target, "__module__", "")).startswith("torch._ops")
    return node.op == "call_function" and (is_custom or not is_known(node.target))


def may_be_none(node: Node, root: torch.nn.Module) -> bool:
    """Whether a value is (part of) a result of code outside torch; torch itself returns Tensors."""
    while node.target in (operator.getitem, unpacked):
        node = node.all_input_nodes[0]
    return runs_other_code(node, root)


def may_write(node: Node, root: torch.nn.Module) -> bool:
    """Whether a node may change one of its arguments in place; True if this cannot be determined."""
    module = called(node, root)
    if module is None or hasattr(type(module), "_bn_ext_stock"):
        return runs_other_code(node, root) or (module is None and writes(node, root))
    return runs_other_code(node, root) or any(getattr(m, _INPLACE, False) for m in module.modules())


def may_read_state(node: Node, root: torch.nn.Module) -> bool:
    """Whether a node may read a non-parameter tensor of the model, which may share memory with statistics."""
    sources = [storage(n, root) for n in node.all_input_nodes]
    targets = [str(n.target).split(".") for n in sources if n.op == "get_attr"]
    values = [functools.reduce(getattr, names, root) for names in targets]
    return runs_other_code(node, root) or not all(isinstance(value, torch.nn.Parameter) for value in values)


def storage(node: Node, root: torch.nn.Module) -> Node:
    """The node whose memory a node's result may share through views and operations in place."""
    while inputs := node.all_input_nodes:
        same = isinstance(called(node, root), torch.nn.Identity | torch.nn.Flatten | torch.nn.Dropout)
        if not (same or writes(node, root) or (node.op != "call_module" and _name(node) in _VIEWS)):
            break
        node = inputs[0]
    return node
