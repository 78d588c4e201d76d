"""The same module from torch.nn and from bn_ext: with activation and residual behind it there, inside here."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn

import bn_ext
from bn_ext.activations import apply
from helpers import devices

LIBRARIES = {"torch": nn, "bn_ext": bn_ext}


class Separate(nn.modules.batchnorm._BatchNorm):
    """torch.nn's batch norm, an addition and an activation: the operators of three modules, the parameters of one."""

    def __init__(self, *args: Any, activation: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        return apply(y if residual is None else y + residual, self.activation)


class Separate1d(Separate, nn.BatchNorm1d):
    """(N, C) or (N, C, L)."""


class Separate2d(Separate, nn.BatchNorm2d):
    """(N, C, H, W)."""


class Separate3d(Separate, nn.BatchNorm3d):
    """(N, C, D, H, W)."""


CLASSES = {
    "torch": {1: Separate1d, 2: Separate2d, 3: Separate3d},
    "bn_ext": {1: bn_ext.BatchNorm1d, 2: bn_ext.BatchNorm2d, 3: bn_ext.BatchNorm3d},
}


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with other parameters and statistics than those of a new one, the same for both libraries."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return module


def norm(library: str, channels: int = 3, dims: int = 2, **options: Any) -> Any:
    """A filled batch norm, float64 unless told; `activation` and a second argument of forward mean the same."""
    options = {"dtype": torch.float64, "device": devices.current()} | options
    return filled(CLASSES[library][dims](channels, **options))


def plain(library: str, channels: int = 3, dims: int = 2, **options: Any) -> Any:
    """A filled batch norm of exactly the library's class, float64 unless told."""
    options = {"dtype": torch.float64, "device": devices.current()} | options
    return filled(getattr(LIBRARIES[library], f"BatchNorm{dims}d")(channels, **options))


class Net(nn.Module):
    """Convolutions, a residual, and four batch norms, three of them with an activation."""

    def __init__(self, library: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": devices.current()}
        make = CLASSES[library][2]
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False, **options)
        self.norm1 = make(4, activation="relu", **options)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False, **options)
        self.norm2 = make(4, activation="silu", momentum=None, **options)
        self.norm3 = make(4, activation=("leaky_relu", 0.2), **options)
        self.norm4 = make(4, affine=False, **options)
        self.linear = nn.Linear(4, 5, **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return self.norm4(self.norm3(self.norm2(self.conv2(y), y)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).abs().mean((2, 3)))


def images(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Input for a Net, or for a batch norm of three channels."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 6, 7, generator=generator, dtype=torch.float64).to(devices.current(), dtype)


def norms(model: nn.Module) -> list[Any]:
    """The batch norms of a model."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of its state_dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def both(run: Callable[[str], Any], **tolerance: Any) -> Any:
    """Assert that `run` gives the same tree of tensors for both libraries; returns this package's."""
    expected, actual = run("torch"), run("bn_ext")
    torch.testing.assert_close(actual, expected, **tolerance)
    return actual


def step(module: Any, *inputs: Tensor) -> list[Any]:
    """One forward and backward: output, gradients of the inputs and of parameters, state afterwards."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = module(*leaves)
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    module.zero_grad()
    ((y * slope).sum() + y.square().mean()).backward()
    gradients = [tensor.grad for tensor in (*leaves, *module.parameters())]
    module.zero_grad()
    return [y.detach(), *gradients, state(module)]


def steps(module: Any, *inputs: Tensor) -> list[Any]:
    """A step in training, then one in evaluation."""
    return [step(module.train(mode), *inputs) for mode in (True, False)]


def train_in_child(modules: list[Any], x: Tensor) -> None:
    """Two steps of SGD each, for a process that shares their memory."""
    torch.set_num_threads(1)
    for module in modules:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).pow(3).mean().backward()
            optimizer.step()


def train_in_forked_child(modules: list[Any], x: Tensor) -> None:
    """The same, forked off by a process that has run forward passes only.

    After a backward pass, autograd may have threads for devices, and forbids it: with a GPU, and with a torch for CUDA
    that has made fake tensors.
    """
    for module in copy.deepcopy(modules):
        module(x)
    child = multiprocessing.get_context("fork").Process(target=train_in_child, args=(modules, x))
    child.start()
    child.join()
    sys.exit(child.exitcode)
