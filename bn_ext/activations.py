"""The activations that a batch norm can apply to its result, by name and as torch.nn modules."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Activation: TypeAlias = "str | tuple[str | None, float] | torch.nn.Module | None"
"""A name in `NAMES`, a pair of a name and its parameter, a torch.nn module for one of these, or None."""

PARAMETERS: dict[str, tuple[str, float]] = {"leaky_relu": ("negative_slope", 0.01), "elu": ("alpha", 1.0)}
"""For each activation that has a parameter: torch's name for the parameter, and its default."""

NAMES = (
    *("relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "gelu_tanh"),
    *("hardswish", "sigmoid", "tanh", "mish"),
)
"""The names are those in torch.nn.functional; gelu_tanh is gelu with approximate="tanh"."""

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
    """The activation's name, or None, and its parameter, or 0.

    Raises:
        ValueError: If the activation is not supported, or has a parameter although its kind takes none.
    """
    if activation is None:
        return None, 0.0
    if isinstance(activation, torch.nn.Module):
        found = of_module(activation)
        if found is None:
            raise _unknown(f"{type(activation).__module__}.{type(activation).__qualname__}")
        return found
    name, *given = activation if isinstance(activation, tuple) and activation else (activation,)
    if name is None and given:  # the form that this function returns
        return None, 0.0
    if name not in NAMES or len(given) > 1 or not all(isinstance(value, int | float) for value in given):
        raise _unknown(activation)
    if name in PARAMETERS:
        return name, float(given[0]) if given else PARAMETERS[name][1]
    if given and given[0]:
        raise ValueError(f"activation {name!r} takes no parameter, got {given[0]!r}: pass the name alone")
    return name, 0.0


def apply(u: Tensor, activation: Activation) -> Tensor:
    """Apply the activation with torch's own operator."""
    name, parameter = resolve(activation)
    if name is None:
        return u
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(u, approximate="tanh")
    function: Callable[..., Tensor] = getattr(torch.nn.functional, name)
    return function(u, parameter) if name in PARAMETERS else function(u)


def describe(activation: Activation) -> str:
    """The activation as readable text: `relu`, `leaky_relu(negative_slope=0.2)`."""
    name, value = resolve(activation)
    if name is None:
        return "None"
    return f"{name}({PARAMETERS[name][0]}={value})" if name in PARAMETERS else name


def of_module(module: torch.nn.Module) -> tuple[str, float] | None:
    """Name and parameter, as from `resolve`; None if the module is not a supported activation."""
    name = _OF_MODULES.get(type(module))  # exact type: a subclass may compute something else
    if name is None:
        return None
    if isinstance(module, torch.nn.ReLU6) and (module.min_val != 0 or module.max_val != 6):  # changed bounds
        return None
    if name == "gelu" and module.approximate == "tanh":
        name = "gelu_tanh"
    return name, float(getattr(module, PARAMETERS[name][0])) if name in PARAMETERS else 0.0


def _unknown(activation: Any) -> ValueError:
    modules = ", ".join(sorted(kind.__name__ for kind in _OF_MODULES))
    return ValueError(
        f"activation must be None, one of {', '.join(NAMES)}, or a torch.nn module ({modules}), got {activation!r}"
    )
