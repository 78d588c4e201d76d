"""For torch.distributed.tensor: the inner operators see whole tensors, also where they were given in shards."""

import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

_registered = False


def register() -> None:
    """Tell torch about the operators, once, where torch.distributed.tensor is in use: to import it takes a second."""
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
            register_sharding(operator)(_Whole(len(operator._schema.returns)))
    _registered = True


class _Whole:
    """The one way to share an operator's work: every process has all tensors, and does all of it.

    Statistics are over the whole batch. torch.nn's operator does the same, but for channels in shards.
    """

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch.distributed.tensor import Replicate

        def placement(argument: object) -> Any:
            return Replicate() if hasattr(argument, "tensor_meta") else None

        given = [placement(argument) for argument in (*args, *kwargs.values())]
        return [([Replicate()] * self._outputs, given)]
