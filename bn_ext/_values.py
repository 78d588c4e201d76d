"""Traced values: they record operations, and refuse reads whose result would become a constant of the graph."""

import dis
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.fx import Proxy
from torch.fx.proxy import Attribute

from bn_ext._fused_class import TracedValue
from bn_ext._operations import IN_PLACE, in_place, unpacked

_TORCH_CALLERS = ("torch.fx", "torch.overrides", "torch.utils._pytree", "torch.nn.modules.module")
_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "is_leaf", "data"),
    *("T", "mT", "H", "mH", "real", "imag", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "is_sparse"),
    *("is_quantized", "is_nested"),
)
"""Properties of Tensors that a graph can read anew in each call, because they are never None."""


def _is_read_by_torch() -> bool:
    """Whether torch itself reads, which can handle a proxy."""
    frame = sys._getframe(2)
    if frame.f_globals.get("__name__") == "torch.nn.parameter":  # isinstance(value, torch.nn.Parameter)
        frame = frame.f_back or frame
    return str(frame.f_globals.get("__name__")).startswith(_TORCH_CALLERS)


class _Unreadable:
    """Refuses reads of its type and conversions to a key, a number or a string, except by torch.

    It must not claim to be a Tensor: C++ code such as that of torch.autograd.Function would rely on that and crash.
    """

    tracer: Any
    _is_param = False  # isinstance(value, torch.nn.Parameter) reads it

    def _refuse(self, reason: str) -> NoReturn:
        """End the trace, even if forward() catches the error."""
        raise self.tracer.refuse(reason)

    @property
    def __class__(self) -> Any:
        if _is_read_by_torch():
            return type(self)
        self._refuse("forward() reads the type of a value")

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of a traced value cannot be set")

    def __getattr__(self, name: str) -> Any:
        """Record the read of an attribute that Tensors have; a plain proxy accepts any name."""
        is_known = name in _PROPERTIES or callable(getattr(torch.Tensor, name, None))
        if not is_known and not name.startswith("__torch"):
            self._refuse(f"forward() reads the attribute {name!r} of a value")
        return _ValueAttribute(self, name)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        """Unpack into the expected number of parts; the generated code checks that number."""
        frame = sys._getframe(1)
        [instruction] = [i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti]
        if instruction.opname != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)
        parts = self.tracer.create_proxy("call_function", unpacked, (self, instruction.argval), {})
        return iter([parts[position] for position in range(instruction.argval)])

    def __hash__(self) -> int:
        if _is_read_by_torch():
            return id(self)
        self._refuse("forward() uses a value as a key")

    def __repr__(self) -> str:
        if _is_read_by_torch():
            return object.__repr__(self)
        self._refuse("forward() converts a value to a string")

    __str__ = __repr__

    def __format__(self, specification: str) -> str:
        self._refuse("forward() converts a value to a string")

    def _refuse_number(self) -> Any:
        self._refuse("forward() converts a value to a number or reads its length")

    __int__ = __float__ = __complex__ = __index__ = __len__ = _refuse_number


class Value(_Unreadable, TracedValue):
    """The traced result of an operation."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse, because a graph cannot represent it."""
        if name not in ("tracer", "node"):
            self._refuse(f"forward() sets {name!r} of a value")
        super().__setattr__(name, value)


class _ValueAttribute(_Unreadable, Attribute, TracedValue):
    """An attribute of a value, or a method that is about to be called."""


def _in_place_operator(name: str) -> Callable[[Proxy, Any], Proxy]:
    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", in_place, (name, self, other), {})

    return record


for _name in IN_PLACE:  # torch.fx records x += y without its effect on x
    setattr(Value, f"__{_name}__", _in_place_operator(_name))
