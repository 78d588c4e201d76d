"""Guards `eps` of a module that has an activation against readers that would lose the activation."""

import ctypes
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from bn_ext.modules import _FusedForward

_SCRIPTING = "torch.jit._recursive"
"""The module in which torch.jit.script reads all constants of a module, including the activation."""

HIDDEN = torch.__version__ < "2.13"
"""Whether torch.compile cannot read ``vars(module)["eps"]`` if a descriptor has the same name."""


class GuardedEps:
    """A descriptor for the number in ``vars(module)["eps"]``, which the module's own forward() reads directly.

    Every replacement of a batch norm, and every layer that a batch norm is folded into, needs `eps`. State dicts,
    optimizers, initialisers and weight averaging do not. Hence a read from outside is treated as a conversion, which
    would silently lose the activation (pytorch#187298). Code that iterates over all attributes, such as
    torch.jit.trace, is not affected, because the module's `dir()` omits `eps`.
    """

    def __get__(self, module: "_FusedForward | None", kind: type) -> Any:
        """The number; raises an error if the module has its own activation."""
        if module is None:
            return self
        values = vars(module)
        if "eps" not in values:  # torch.nn.Module continues the search and raises the usual error
            raise AttributeError("eps")
        if module.activation is not None and sys._getframe(1).f_globals.get("__name__") != _SCRIPTING:
            raise lost_activation("a conversion that reads `eps`", module)
        return module._hidden_eps if HIDDEN and is_compiling() else values["eps"]

    def __set__(self, module: "_FusedForward", value: Any) -> None:
        vars(module)["eps"] = value

    def __delete__(self, module: "_FusedForward") -> None:
        if vars(module).pop("eps", self) is self:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute 'eps'")


def _number(module: "_FusedForward") -> Any:
    return vars(module)["eps"]


_c_method = ctypes.pythonapi.PyInstanceMethod_New
_c_method.restype, _c_method.argtypes = ctypes.py_object, [ctypes.py_object]
hidden_eps = property(_c_method(_number))
"""The number for torch.compile if it is `HIDDEN`: torch.compile evaluates a property whose getter is written in C."""


def lost_activation(loser: str, module: "_FusedForward") -> RuntimeError:
    """The error for a conversion of a module that has its own activation."""
    return RuntimeError(
        f"{loser} would lose the activation inside {module}: first set its `activation` to None and apply the "
        'activation after it (`vars(module)["eps"]` returns the number without this check)'
    )
