"""For the tests of bn_ext.recompute: a residual network, a training step, and how many outputs came again."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import bn_ext
from helpers.derivatives import leaf, loss


class Repeats(TorchDispatchMode):
    """Counts outputs that are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.bn_ext.batch_norm_repeat.default
        return function(*args, **(kwargs or {}))


class Block(nn.Module):
    """Two convolutions around a residual, as in ResNet."""

    def __init__(self, channels: int, activation: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = bn_ext.BatchNorm2d(channels, activation=activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = bn_ext.BatchNorm2d(channels, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)


def network(activation: Any = "relu", blocks: int = 4, device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *(Block(8, activation) for _ in range(blocks)), nn.Conv2d(8, 2, 3), nn.AdaptiveAvgPool2d(1)
    ).to(device)


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def step(model: nn.Module, x: Tensor, context: Callable[[], Any], **options: Any) -> tuple[list[Tensor], int]:
    """Loss and all gradients of a training step whose forward pass runs in `context`; how many outputs came again."""
    model = copy.deepcopy(model)
    x = leaf(x)
    with context():
        value = loss(model(x).float())
    with Repeats() as repeats:
        gradients = grad(value, (x, *model.parameters()), **options)
    return [value, *gradients, *model.buffers()], repeats.count


def assert_bit_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
