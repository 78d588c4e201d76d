"""Converts timm's BatchNormAct2d, a batch norm with a dropout and an activation, without importing timm."""

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from bn_ext._operations import does_nothing, plain
from bn_ext.activations import Activation, apply, of_module
from bn_ext.modules import BatchNorm2d, _path_in_graph


class BatchNormAct(BatchNorm2d):
    """The base that this package adds to a converted BatchNormAct2d; the other base is timm's class.

    Every call checks the present children `drop` and `act`. The operator applies the activation if it supports it and
    the dropout does nothing; otherwise the children are called after it, as in timm.
    """

    def __init_subclass__(cls) -> None:
        """Keep timm's constructor."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | tuple[str, float] | None = None,
        unlike: str | None = None,
    ) -> Tensor:
        """Equivalent to timm's. A residual or activation that `fuse` passes is applied after `drop` and `act`."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            assert residual is None, "a scripted BatchNormAct2d accepts no residual"
            assert activation is None, "a scripted BatchNormAct2d accepts no activation"
            y: Tensor = self.act(self.drop(self._scripted_forward(input, None, None)))  # type: ignore[operator]
            return y
        return self._forward(input, residual, activation, unlike)

    def _forward(self, input: Tensor, residual: Tensor | None, activation: Activation, unlike: str | None) -> Tensor:
        if isinstance(input, Proxy) and _path_in_graph(self, input):
            return super()._forward(input, residual, activation, unlike)
        own = self.inner_activation()
        if residual is None and activation is None:
            y = super()._forward(input, None, own, None)
            return self.act(self.drop(y)) if own is None else y  # type: ignore[operator]
        if own == NO_ACTIVATION:
            return super()._forward(input, residual, activation, unlike)
        y = self.forward(input)
        return apply(y if residual is None else getattr(y, unlike or "add")(residual), activation)

    def inner_activation(self) -> tuple[str | None, float] | None:
        """The activation that the operator applies (name None: no activation); None if drop and act must be called."""
        drop, act = self._modules.get("drop"), self._modules.get("act")  # faster than self.drop
        if drop is None or act is None or not plain(act) or not does_nothing(drop, self, drop.training):
            return None
        if _has_any_global_hook():
            return None
        return NO_ACTIVATION if type(act) is torch.nn.Identity else of_module(act)

    def _check_input_dim(self, input: Tensor) -> None:
        torch._assert(input.dim() == 4, f"expected 4D input (got {input.dim()}D input)")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse an activation in addition to `act`."""
        if name == "activation" and value is not None:
            raise AttributeError(
                f"a {type(self).__name__} applies its child `act`: replace this child instead of setting activation to "
                f"{value!r}"
            )
        super().__setattr__(name, value)


NO_ACTIVATION = (None, 0.0)
"""The activation of a module that only normalises."""
_CLASSES = {("timm.layers.norm_act", "BatchNormAct2d"), ("timm.models.layers.norm_act", "BatchNormAct2d")}
_FORWARD_NAMES = {
    *("_assert", "ndim", "super", "forward", "drop", "act"),
    *("momentum", "training", "track_running_stats", "num_batches_tracked", "add_", "float"),
    *("F", "batch_norm", "running_mean", "running_var", "weight", "bias", "eps"),
}
"""The names in the forward() of timm 0.6 to 1.0; a forward() with other names is not converted."""


def _is_known(kind: type) -> bool:
    if (kind.__module__, kind.__qualname__) not in _CLASSES or kind.__bases__ != (torch.nn.BatchNorm2d,):
        return False
    code = getattr(vars(kind).get("forward"), "__code__", None)
    return code is not None and {"drop", "act"} <= set(code.co_names) <= _FORWARD_NAMES


def converted_class(kind: Any) -> type | None:
    """A subclass of the same name for the modules of one of timm's classes; None for other classes."""
    return _converted_class(kind) if _is_known(kind) else None


class _Made(type):
    """The metaclass of converted classes; pickle stores timm's class, and loading converts it again."""


def _loaded(kind: type) -> Any:
    return converted_class(kind) or kind


copyreg.pickle(_Made, lambda kind: (_loaded, (vars(kind)["_bn_ext_stock"],)))


@functools.cache
def _converted_class(kind: Any) -> type:
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__", "__init__")}
    return _Made(kind.__name__, (BatchNormAct, kind), {**names, "_bn_ext_stock": kind})


def stock_class(kind: type) -> type | None:
    """The reverse of :func:`converted_class`."""
    return vars(kind).get("_bn_ext_stock")
