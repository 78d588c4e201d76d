"""Whole models: turn torch.nn's batch norms into this package's, and back."""

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
    """Turn every torch.nn.BatchNorm1d, BatchNorm2d and BatchNorm3d of a model into this package's, in place.

    Their lazy versions are converted too, as are timm's BatchNormAct2d and FrozenBatchNormAct2d, which keep their
    children `drop` and `act`, and torchvision's FrozenBatchNorm2d (docs/fusing.md).

    Equivalent to `module.__class__ = bn_ext.BatchNorm2d` for each such module: it remains the same object, with its
    parameters, buffers, hooks, training flag and device. Converting a model again changes nothing.

    Other subclasses of torch's batch norms may compute something else, so they are not converted: one warning names up
    to three of them and counts the others. Unrelated modules are ignored.

    Args:
        model: Any module; may be a batch norm itself.
        skip_nonfinite: Value of this attribute for all of this package's batch norms in the model, or None to leave it
            unchanged (initially False): whether a channel keeps its running statistics if a batch would make one of
            them inf or NaN.
        skip_recomputed: The same for this attribute: whether a forward pass inside a backward pass, as
            torch.utils.checkpoint runs it, updates and counts nothing.

    Returns:
        `model`.

    Raises:
        TypeError: If model is not a torch.nn.Module, or an option is neither a bool nor None.

    Numerics: see `bn_ext.batch_norm`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8))
        >>> bn_ext.convert(model) is model, type(model[1]) is bn_ext.BatchNorm2d
        (True, True)
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
            "bn_ext.convert did not convert these subclasses of torch.nn's batch norms, because they may compute "
            "something else: "
            + ", ".join(left_alone[:3])
            + (f" and {len(left_alone) - 3} more" if len(left_alone) > 3 else ""),
            stacklevel=2,
        )
    return model


def revert(model: Model) -> Model:
    """Undo `convert` and `fuse`: turn every batch norm of this package into torch.nn's again, in place.

    The options `skip_nonfinite` and `skip_recomputed` are dropped, because torch.nn does not have them.

    Args:
        model: Any module; may be a batch norm itself.

    Returns:
        `model`.

    Raises:
        TypeError: If model is not a torch.nn.Module.
        ValueError: If a batch norm has its own activation, which would be lost; nothing is changed then.

    Examples:
        >>> model = bn_ext.fuse(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU()))
        >>> type(bn_ext.revert(model)[0]) is torch.nn.BatchNorm1d
        True
    """
    _require_module(model)
    stock = {name: _STOCK.get(type(m)) or _timm.stock_class(type(m)) for name, m in model.named_modules()}
    ours = {name: module for name, module in model.named_modules() if stock[name]}
    active = [name or "the model" for name, module in ours.items() if getattr(module, "activation", None) is not None]
    if active:
        raise ValueError(
            "bn_ext.revert would lose the activation inside "
            + ", ".join(active)
            + ": first set their `activation` to None and "
            "apply the activation after them; nothing was changed"
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
    """Context manager that reverts a model inside its block, for tools that look for torch.nn's exact classes.

    Equivalent to:

        revert(model)
        ...  # the tool
        convert(model)  # or fuse, with the same options

    The modules remain the same objects. At the end, and also after an error, each gets its class and options back. A
    module that the tool creates, or whose class it changes, is not touched. Copies that the tool makes are torch.nn's.

    Args:
        model: Any module; may be a batch norm itself. No other thread may use it inside the block.

    Returns:
        A context manager that returns `model` to `as`.

    Raises:
        TypeError: If model is not a torch.nn.Module.
        ValueError: If a batch norm has its own activation, which would be lost; nothing is changed then.

    Examples:
        >>> model = bn_ext.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(4)))
        >>> with bn_ext.reverted(model):
        ...     type(model[0]) is torch.nn.BatchNorm1d
        True
        >>> type(model[0]) is bn_ext.BatchNorm1d
        True
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
            if type(module) is not stock:  # a lazy module after its first forward pass, or changed by the tool
                kind = _FUSED.get(type(module), type(module))
            if type(module) is not kind:
                module.__class__ = kind
                vars(module).update(options)


def _require_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
