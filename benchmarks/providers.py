"""How each provider is called: the very same callables are first checked and then timed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import bn_ext

from .inputs import Inputs
from .names import COMPILED, OURS, PROVIDERS, RIVAL, WITHOUT_CUDNN
from .operations import OPERATIONS

Call = Callable[[], object]


def usual(device: torch.device, quick: bool) -> tuple[str, ...]:
    """Name who is measured on a device unless others are asked for; a quick run on a CPU compiles nothing."""
    if device.type == "cuda":
        return PROVIDERS
    return (RIVAL, OURS) if quick else (RIVAL, COMPILED, OURS)


class SeparateModules(nn.Module):
    """torch's own modules one after the other, in place where models do it so."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.norm = norm
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise, add, clip."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y += residual
        return self.relu(y)  # type: ignore[no-any-return]


class Layer:
    """An operation as one provider does it, with parameters and statistics of its own, equal to those of `inputs`."""

    def __init__(self, provider: str, operation: str, inputs: Inputs):
        channels, device = inputs.weight.numel(), inputs.weight.device
        activation = OPERATIONS[operation].activation
        has_planes = inputs.x[0].dim() == 4
        self.norm: nn.BatchNorm1d | nn.BatchNorm2d
        if provider == OURS:
            norm = bn_ext.BatchNorm2d if has_planes else bn_ext.BatchNorm1d
            self.norm = norm(channels, activation=activation, device=device)
        else:
            self.norm = (nn.BatchNorm2d if has_planes else nn.BatchNorm1d)(channels, device=device)
        # What is called: nothing comes between a batch norm alone and its caller.
        module = self.norm if provider == OURS or activation is None else SeparateModules(self.norm)
        self.module: Callable[..., Tensor] = module
        self.train = module.train
        if provider == COMPILED:
            # fullgraph: an error instead of eager calls where the compiler gives up.
            self.module = torch.compile(module, fullgraph=True, dynamic=False)
        elif provider == WITHOUT_CUDNN:
            self.module = partial(without_cudnn, module)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(self.norm, name).copy_(getattr(inputs, name))


def without_cudnn(module: nn.Module, *arguments: Tensor) -> Tensor:
    """Call a module, whose backward pass goes the way of its forward pass."""
    with torch.backends.cudnn.flags(enabled=False):
        y: Tensor = module(*arguments)
    return y


@torch.no_grad()
def evaluate(module: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Call a module as for inference."""
    return module(*arguments)


class Subject:
    """One provider on one case: a list of calls per direction, one for each copy of the inputs.

    forward            the module in training mode, building a graph (x, z, weight, bias want grads)
    backward           torch.autograd.grad through a graph that is kept; .grad stays as it is
    eval               the module in eval mode, without a graph
    forward+backward   both in one call, the graph freed
    """

    def __init__(self, provider: str, operation: str, inputs: Inputs):
        # One layer per direction, so that no call changes what another one relies on.
        training, differentiated, evaluated = (Layer(provider, operation, inputs) for _ in range(3))
        evaluated.train(False)
        self.trained_norm = training.norm

        def leaves(x: Tensor, *z: Tensor) -> tuple[Tensor, ...]:
            return x, differentiated.norm.weight, differentiated.norm.bias, *z

        def forward_backward(dy: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(differentiated.module(*arguments), leaves(*arguments), dy)

        def backward(dy: Tensor, *arguments: Tensor) -> Call:
            y = differentiated.module(*arguments)
            return partial(torch.autograd.grad, y, leaves(*arguments), dy, retain_graph=True)

        arguments = inputs.arguments()
        pairs = list(zip(inputs.dy, arguments, strict=True))
        self.calls: dict[str, list[Call]] = {
            "forward": [partial(training.module, *each) for each in arguments],
            "backward": [backward(dy, *each) for dy, each in pairs],
            "eval": [partial(evaluate, evaluated.module, *each) for each in arguments],
            "forward+backward": [partial(forward_backward, dy, *each) for dy, each in pairs],
        }
