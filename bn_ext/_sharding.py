"""Sharding rules for torch.distributed.tensor: the inner operators always receive whole tensors."""

import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

_registered = False


def register() -> None:
    """Register the operators once, only if torch.distributed.tensor is imported, because importing takes a second."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    with unset_fake_temporarily():
        from torch.distributed.tensor.experimental import register_sharding

        operators = torch.ops.bn_ext
        for operator in (
            operators.batch_norm_forward.default,
            operators.batch_norm_inference.default,
            operators.batch_norm_repeat.default,
            operators.batch_norm_backward.default,
        ):
            register_sharding(operator)(_Replicated(len(operator._schema.returns)))
    _registered = True


class _Replicated:
    """The only sharding rule: every process holds all tensors and computes everything.

    Statistics cover the whole batch. torch.nn's operator does the same, except for sharded channels.
    """

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch.distributed.tensor import Replicate

        def placement(argument: object) -> Any:
            return Replicate() if hasattr(argument, "tensor_meta") else None

        inputs = [placement(argument) for argument in (*args, *kwargs.values())]
        return [([Replicate()] * self._outputs, inputs)]
