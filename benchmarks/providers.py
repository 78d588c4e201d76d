"""How each provider is called: the very same callables are first checked and then timed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import bn_ext

from .inputs import Inputs

RIVAL = "torch.nn"
OURS = "bn_ext"
PROVIDERS: dict[str, type[nn.BatchNorm2d]] = {RIVAL: nn.BatchNorm2d, OURS: bn_ext.BatchNorm2d}
DIRECTIONS = ("forward", "backward", "eval")
OVERHEAD_DIRECTIONS = ("forward", "forward+backward")

Call = Callable[[], object]


def make_module(module_class: type[nn.BatchNorm2d], inputs: Inputs) -> nn.BatchNorm2d:
    """Make a module with parameters and statistics of its own, equal to those of `inputs`."""
    module = module_class(inputs.weight.numel(), device=inputs.weight.device)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).copy_(getattr(inputs, name))
    return module


@torch.no_grad()
def evaluate(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Call a module as for inference."""
    y: Tensor = module(x)
    return y


class Subject:
    """One provider on one case: a list of calls per direction, one for each copy of the inputs.

    forward            the module in training mode, building a graph (x, weight, bias want grads)
    backward           torch.autograd.grad through a graph that is kept; .grad stays as it is
    eval               the module in eval mode, without a graph
    forward+backward   both in one call, the graph freed
    """

    def __init__(self, module_class: type[nn.BatchNorm2d], inputs: Inputs):
        # One module per direction, so that no call changes what another one relies on.
        self.training = make_module(module_class, inputs)
        differentiated = make_module(module_class, inputs)
        evaluated = make_module(module_class, inputs).eval()

        def leaves(x: Tensor) -> tuple[Tensor, ...]:
            return x, differentiated.weight, differentiated.bias

        def forward_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(differentiated(x), leaves(x), dy)

        pairs = list(zip(inputs.x, inputs.dy, strict=True))
        self.calls: dict[str, list[Call]] = {
            "forward": [partial(self.training, x) for x in inputs.x],
            "backward": [
                partial(torch.autograd.grad, differentiated(x), leaves(x), dy, retain_graph=True) for x, dy in pairs
            ],
            "eval": [partial(evaluate, evaluated, x) for x in inputs.x],
            "forward+backward": [partial(forward_backward, x, dy) for x, dy in pairs],
        }
