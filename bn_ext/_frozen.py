"""Converts frozen batch norms of torchvision and timm (modules with buffers only) without importing either package.

Their forward() computes x * scale + shift in five or more operations of torch; here one operator does.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bn_ext._fused_class import _in_the_place_of
from bn_ext._timm import BatchNormAct
from bn_ext.functional import batch_norm

_CLASSES = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
    ("timm.models.layers.norm_act", "FrozenBatchNormAct2d"),
}
_BUFFERS = ("running_mean", "running_var", "weight", "bias")
_FORWARD_NAMES = {*_BUFFERS, "eps", "rsqrt"}
"""The names in their forward(), besides reshape, drop and act; a forward() with other names is not converted."""


def _fits(module: Any, x: Any) -> bool:
    """Whether the operator returns the result of their formula: no promotion of dtypes, no broadcasting of shapes."""
    buffers = [module._buffers.get(name) for name in _BUFFERS]
    if not isinstance(x, Tensor) or x.dim() != 4 or not isinstance(module.eps, float) or module.eps <= 0:
        return False
    like = (x.dtype, x.device, (x.shape[1],))
    return x.is_floating_point() and all(b is not None and (b.dtype, b.device, b.shape) == like for b in buffers)


def _run(module: Any, x: Tensor, has_act: bool) -> Tensor:
    """Equivalent to forward(); if it calls `drop` and `act`, every call checks them, as in BatchNormAct."""
    inner = BatchNormAct.inner_activation(module) if has_act else None
    mean, var, weight, bias = (module._buffers[name] for name in _BUFFERS)
    y = batch_norm(x, mean, var, weight, bias, False, 0.0, module.eps, activation=inner)
    return module.act(module.drop(y)) if has_act and inner is None else y


def _names(kind: type) -> set[str]:
    """The names in the forward() of a class."""
    return set(getattr(getattr(vars(kind).get("forward"), "__code__", None), "co_names", ()))


def converted_class(kind: Any) -> type | None:
    """A subclass of the same name for the modules of one of these classes; None for other classes."""
    if (kind.__module__, kind.__qualname__) not in _CLASSES or kind.__bases__ != (torch.nn.Module,):
        return None
    names = _names(kind)
    children = names & {"drop", "act"}
    known = names - children - {"reshape"} == _FORWARD_NAMES and len(children) in (0, 2)
    return _converted_class(kind, bool(children)) if known else None


@functools.cache
def _converted_class(kind: Any, has_act: bool) -> type:
    original: Callable[..., Any] = kind.forward
    fits, run = _fits, _run

    def forward(self: Any, x: Any) -> Any:
        return run(self, x, has_act) if fits(self, x) else original(self, x)

    def reduce(self: Any, protocol: Any) -> Any:
        """Pickle the class of the other package, because the converted class cannot be imported."""
        made, (_, *arguments), *state = kind.__reduce_ex__(self, max(protocol, 2))
        assert made is copyreg.__newobj__  # type: ignore[attr-defined]
        return _new, (kind, *arguments), *state

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {"forward": _in_the_place_of(kind.forward, forward), "__reduce_ex__": reduce, "_bn_ext_stock": kind}
    return type(kind.__name__, (kind,), {**names, **members})


def _new(kind: Any, *arguments: Any) -> Any:
    """Create an empty module for pickle."""
    kind = converted_class(kind) or kind
    return kind.__new__(kind, *arguments)
