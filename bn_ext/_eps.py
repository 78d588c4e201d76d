"""`eps` of a module with an activation inside: refused to readers that would lose the activation."""

import ctypes
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from bn_ext.modules import _FusedForward

_SCRIPTING = "torch.jit._recursive"
"""Where torch.jit.script reads all constants of a module, the activation too."""

HIDDEN = torch.__version__ < "2.13"
"""Whether torch.compile cannot read ``vars(module)["eps"]`` past a descriptor of this name."""


class GuardedEps:
    """A descriptor for the number in ``vars(module)["eps"]``, where the module's own forward() reads it.

    A module that stands in for a batch norm, and a layer that a batch norm is folded into, needs `eps`, whoever makes
    it; state dicts, optimizers, initialisers and statistics of weights do not. So a read from outside is taken for a
    conversion, which would lose the activation without a word (pytorch#187298). What goes through all attributes, as
    torch.jit.trace, does not meet it: the module's `dir()` leaves it out.
    """

    def __get__(self, module: "_FusedForward | None", kind: type) -> Any:
        """The number; an error if the module has an activation of its own."""
        if module is None:
            return self
        values = vars(module)
        if "eps" not in values:  # torch.nn.Module goes on to search, and knows the words of the error
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


_as_of_c = ctypes.pythonapi.PyInstanceMethod_New
_as_of_c.restype, _as_of_c.argtypes = ctypes.py_object, [ctypes.py_object]
hidden_eps = property(_as_of_c(_number))
"""The number for torch.compile where it is `HIDDEN`: it asks a property that is made in C for its value."""


def lost_activation(loser: str, module: "_FusedForward") -> RuntimeError:
    """The error for a conversion of a module with an activation of its own."""
    return RuntimeError(
        f"{loser} would lose the activation inside {module}: set its `activation` to None and apply the activation "
        'behind it first (`vars(module)["eps"]` is the number alone)'
    )
