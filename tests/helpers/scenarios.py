"""What a user may do around one module's forward and backward; each returns a tree of tensors to compare."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from helpers.derivatives import loss


def two_forwards(module: nn.Module, x: Tensor) -> Any:
    """The second forward may not disturb what the first one saved; the change in place of a buffer is counted."""
    versions = [buffer._version for buffer in module.buffers()]
    gradients = grad(loss(module(x)) + 2 * loss(module(x.cos())), (x, *module.parameters()))
    return gradients, [buffer._version - old for buffer, old in zip(module.buffers(), versions, strict=True)]


def backward_twice(module: nn.Module, x: Tensor) -> Any:
    """Gradients accumulate; a third time is refused."""
    value = loss(module(x))
    value.backward(retain_graph=True)
    value.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        value.backward()
    return [x.grad, *(parameter.grad for parameter in module.parameters())]


def hooks(module: nn.Module, x: Tensor) -> Any:
    """Of tensors and of the module: each sees, and may change, what passes."""
    seen: list[Any] = []
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    module.register_forward_hook(lambda _, inputs, y: seen.append(y.detach()))
    module.register_full_backward_pre_hook(lambda _, dy: (dy[0] * 3,))
    module.register_full_backward_hook(lambda _, dx, dy: seen.extend((*dx, *dy)))
    module.weight.register_hook(lambda g: g * 5)
    x.register_hook(lambda g: seen.append(g.clone()))
    y = module(x)
    y.register_hook(lambda g: g * 7)
    return seen, grad(loss(y), (x, *module.parameters()))


def in_place_activation(module: nn.Module, x: Tensor) -> Any:
    """The output is not saved: what follows may overwrite it."""
    return grad(loss(module(x).relu_()), (x, *module.parameters()))


def recomputed(module: nn.Module, x: Tensor) -> Any:
    """Activation checkpointing by saved-tensor hooks."""
    return grad(loss(checkpoint(module, x, use_reentrant=False)), (x, *module.parameters()))


def recomputed_reentrant(module: nn.Module, x: Tensor) -> Any:
    """Activation checkpointing by a backward inside backward."""
    loss(checkpoint(module, x, use_reentrant=True)).backward()
    return [x.grad, *(parameter.grad for parameter in module.parameters())]


def frozen_parameters(module: nn.Module, x: Tensor) -> Any:
    """Only the input is differentiated."""
    return grad(loss(module.requires_grad_(False)(x)), x)


def without_gradients(module: nn.Module, x: Tensor) -> Any:
    """The values alone."""
    results = []
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = module(x)
        results.append((y.clone(), y.requires_grad, y.is_inference()))
    return results


def gradient_stopped(module: nn.Module, x: Tensor) -> Any:
    """What follows gives no gradient: an undefined one arrives."""
    loss(Stop.apply(module(x))).backward()
    return [x.grad, *(parameter.grad for parameter in module.parameters())]


class Stop(torch.autograd.Function):
    """Identity without a gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """Copy."""
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        """Give nothing."""


SCENARIOS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    f.__name__: f
    for f in (
        two_forwards,
        backward_twice,
        hooks,
        in_place_activation,
        recomputed,
        recomputed_reentrant,
        frozen_parameters,
        without_gradients,
        gradient_stopped,
    )
}
