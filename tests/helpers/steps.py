"""A training step of one layer on a GPU, and shapes for which its kernels have teams of all kinds."""

import copy

import torch
from torch import Tensor, nn

import bn_ext

FORMATS = [torch.contiguous_format, torch.channels_last]
# On an H200, contiguous: teams of one block, of a cluster, of a grid; and at the end a part that does not fit. In
# channels_last: of a cluster, of a grid, of a grid of which a part does not fit; and at the end none.
SHAPES = [(32, 512, 7, 7), (32, 64, 56, 56), (64, 64, 112, 112), (64, 8, 512, 512)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """A leaf x and dy."""
    x, dy = (torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    return x.requires_grad_(), dy


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients, and running statistics after it."""
    y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in module.buffers())]


def equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit by bit; waits for the GPU."""
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Step:
    """A training step on tensors of its own, the same each time; kernels and memory for it are there."""

    def __init__(self, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
        torch.manual_seed(0)
        self.x, self.dy = inputs(shape, torch.bfloat16, memory_format)
        self.module = bn_ext.BatchNorm2d(shape[1], device="cuda")
        self._start = copy.deepcopy(self.module.state_dict())
        self.expected = self()
        for _ in range(2):
            self()

    def __call__(self) -> list[Tensor]:
        """Output, gradients, and statistics after it."""
        for name, value in self.module.state_dict().items():
            value.copy_(self._start[name])
        return step(self.module, self.x, self.dy)
