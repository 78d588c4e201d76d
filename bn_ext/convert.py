"""Whole models: torch.nn's batch norms become this package's, and back."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from bn_ext import _frozen, _timm
from bn_ext._fused_class import restore_class
from bn_ext.modules import (
    OPTIONS,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)

Model = TypeVar("Model", bound=torch.nn.Module)

_FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.LazyBatchNorm1d: LazyBatchNorm1d,
    torch.nn.LazyBatchNorm2d: LazyBatchNorm2d,
    torch.nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}


def convert(model: Model, *, skip_nonfinite: bool | None = None, skip_recomputed: bool | None = None) -> Model:
    """Make every torch.nn.BatchNorm1d, 2d and 3d in a model this package's, in place; lazy ones too.

    So are timm's BatchNormAct2d and FrozenBatchNormAct2d, which keep their children `drop` and `act`, and torchvision's
    FrozenBatchNorm2d (docs/fusing.md).

    The modules stay the same objects, of another class: parameters, buffers, hooks, training flag, device,
    requires_grad and references from elsewhere stay as they are. Converting twice does nothing more.

    A subclass of torch's batch norms may do more than they do: it is left alone, with one warning that names three of
    them and counts the others. Modules that are no subclass of them are not looked at.

    Args:
        model: Any module, or a batch norm itself.
        skip_nonfinite: Set this attribute of all this package's batch norms in the model: whether a channel keeps its
            running statistics where a batch would make them inf or NaN. None: leave it as it is, False at first.
        skip_recomputed: The same; whether a forward pass that torch.utils.checkpoint runs again is not counted again.

    Returns:
        `model`.
    """
    _require_module(model)
    options = {"skip_nonfinite": skip_nonfinite, "skip_recomputed": skip_recomputed}
    given = {name: value for name, value in options.items() if value is not None}
    left_alone = []
    for name, module in model.named_modules():
        kind = _FUSED.get(type(module)) or _timm.converted_class(type(module)) or _frozen.converted_class(type(module))
        if kind is not None:
            module.__class__ = kind
        elif isinstance(module, tuple(_FUSED)) and not isinstance(module, tuple(_STOCK)):
            left_alone.append(f"{name or 'the model'} ({type(module).__module__}.{type(module).__qualname__})")
        if isinstance(module, tuple(_STOCK)):
            for option, value in given.items():
                setattr(module, option, value)
    if left_alone:
        warnings.warn(
            "bn_ext.convert left these alone, subclasses of torch.nn's batch norms that may behave differently: "
            + ", ".join(left_alone[:3])
            + (f" and {len(left_alone) - 3} more" if len(left_alone) > 3 else ""),
            stacklevel=2,
        )
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert` and :func:`fuse`: make every batch norm of this package torch.nn's again, in place.

    `skip_nonfinite` and `skip_recomputed` go with it: torch.nn's have no such thing.

    Args:
        model: Any module, or a batch norm itself.

    Returns:
        `model`.

    Raises:
        ValueError: A batch norm has an activation, which torch.nn's have not.
    """
    _require_module(model)
    stock = {name: _STOCK.get(type(m)) or _timm.stock_class(type(m)) for name, m in model.named_modules()}
    ours = {name: module for name, module in model.named_modules() if stock[name]}
    active = [name or "the model" for name, module in ours.items() if getattr(module, "activation", None) is not None]
    if active:
        raise ValueError(
            "bn_ext.revert would lose the activation inside "
            + ", ".join(active)
            + ": set their `activation` to None and "
            "apply the activation behind them first; nothing was changed"
        )
    for module in model.modules():
        restore_class(module)
    for name, module in ours.items():
        module.__class__ = stock[name]
        for option in OPTIONS:
            vars(module).pop(option, None)
    return model


@contextlib.contextmanager
def reverted(model: Model) -> Iterator[Model]:
    """Make a model's batch norms torch.nn's for a while: for tools that ask for exact classes, or trace functions.

    Equivalent to::

        revert(model)
        ...  # the tool
        convert(model)  # or fuse, with what they had set

    The modules stay the same objects. At the end, also after an error, each gets its class and options back; a module
    that the tool made, or whose class it changed, stays as the tool left it. Copies that the tool makes are torch.nn's.

    Args:
        model: Any module, or a batch norm itself. No other thread may use it meanwhile.

    Returns:
        A context manager; `as` gives `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: A batch norm has an activation, which torch.nn's have not; nothing was changed.
    """
    _require_module(model)
    before: list[tuple[torch.nn.Module, type, dict[str, Any]]] = [
        (m, type(m), {name: vars(m)[name] for name in OPTIONS if name in vars(m)}) for m in model.modules()
    ]
    revert(model)
    changed = [(m, kind, type(m), options) for m, kind, options in before if type(m) is not kind]
    try:
        yield model
    finally:
        for module, kind, stock, options in changed:
            if type(module) is not stock:  # a lazy one, after its first forward pass; or the tool's own
                kind = _FUSED.get(type(module), type(module))
            if type(module) is not kind:
                module.__class__ = kind
                vars(module).update(options)


def _require_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
