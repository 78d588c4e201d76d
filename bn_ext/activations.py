"""The activations that a batch norm can apply to its result: their names, and torch's modules of the same kind."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Activation: TypeAlias = "str | tuple[str | None, float] | torch.nn.Module | None"
"""A name of `NAMES`, a name with its parameter, a module of torch.nn of one of these kinds, or None."""

PARAMETERS: dict[str, tuple[str, float]] = {"leaky_relu": ("negative_slope", 0.01), "elu": ("alpha", 1.0)}
"""What torch calls the parameter of those that have one, and its default."""

NAMES = (
    *("relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "gelu_tanh"),
    *("hardswish", "sigmoid", "tanh", "mish"),
)
"""As in torch.nn.functional; gelu_tanh is gelu with approximate="tanh"."""

_OF_MODULES: dict[type[torch.nn.Module], str] = {
    torch.nn.ReLU: "relu",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.ELU: "elu",
    torch.nn.SiLU: "silu",
    torch.nn.GELU: "gelu",
    torch.nn.Hardswish: "hardswish",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
    torch.nn.Mish: "mish",
}


def resolve(activation: Activation) -> tuple[str | None, float]:
    """The name, None for none, and the parameter, 0 where there is none.

    Raises:
        ValueError: An activation of another kind, or a parameter for one that has none.
    """
    if activation is None:
        return None, 0.0
    if isinstance(activation, torch.nn.Module):
        found = of_module(activation)
        if found is None:
            raise _unknown(f"{type(activation).__module__}.{type(activation).__qualname__}")
        return found
    name, *given = activation if isinstance(activation, tuple) and activation else (activation,)
    if name is None and given:  # as this function returns it
        return None, 0.0
    if name not in NAMES or len(given) > 1 or not all(isinstance(value, int | float) for value in given):
        raise _unknown(activation)
    if name in PARAMETERS:
        return name, float(given[0]) if given else PARAMETERS[name][1]
    if given and given[0]:
        raise ValueError(f"activation {name!r} has no parameter, got {given[0]!r}")
    return name, 0.0


def apply(u: Tensor, activation: Activation) -> Tensor:
    """The activation by torch's own operator."""
    name, parameter = resolve(activation)
    if name is None:
        return u
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(u, approximate="tanh")
    function: Callable[..., Tensor] = getattr(torch.nn.functional, name)
    return function(u, parameter) if name in PARAMETERS else function(u)


def describe(activation: Activation) -> str:
    """Readable: `relu`, `leaky_relu(negative_slope=0.2)`."""
    name, value = resolve(activation)
    if name is None:
        return "None"
    return f"{name}({PARAMETERS[name][0]}={value})" if name in PARAMETERS else name


def of_module(module: torch.nn.Module) -> tuple[str, float] | None:
    """Name and parameter, as from :func:`resolve`; None if the module is no such activation."""
    name = _OF_MODULES.get(type(module))  # a subclass may do something else
    if name is None:
        return None
    if isinstance(module, torch.nn.ReLU6) and (module.min_val != 0 or module.max_val != 6):  # it is a Hardtanh
        return None
    if name == "gelu" and module.approximate == "tanh":
        name = "gelu_tanh"
    return name, float(getattr(module, PARAMETERS[name][0])) if name in PARAMETERS else 0.0


def _unknown(activation: Any) -> ValueError:
    modules = ", ".join(sorted(kind.__name__ for kind in _OF_MODULES))
    return ValueError(
        f"activation must be None, one of {', '.join(NAMES)}, or a torch.nn module ({modules}), got {activation!r}"
    )
