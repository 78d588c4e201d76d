"""For the tests of bn_ext.fuse: small modules, a spy on batch norms, and the comparison of a model with its twin."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from bn_ext import modules

Body = Callable[..., Any]


class Block(nn.Module):
    """Convolutions, batch norms and activations for a body to use; forward is that of a residual block."""

    def __init__(self, body: Body, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.conv, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64) for _ in range(2))
        self.bn, self.bn2 = (nn.BatchNorm2d(3, dtype=torch.float64) for _ in range(2))
        self.act = activation or nn.ReLU()
        for norm in (self.bn, self.bn2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self.body(self, x, z)


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Two leaves for a Block, of the same shape."""
    shape = shape or (4, 3, 5, 6)
    x, z = torch.randn(2, *shape, dtype=torch.float64)
    return x.requires_grad_(), z.requires_grad_()


@contextmanager
def calls() -> Iterator[list[tuple[Any, bool]]]:
    """Lists the calls of batch norms: their activation, and whether they have a residual."""
    seen: list[tuple[Any, bool]] = []
    forward = modules._FusedForward.forward

    def spy(self: Any, input: Tensor, residual: Any = None, *, activation: Any = None, **others: Any) -> Tensor:
        seen.append((activation, residual is not None))
        return forward(self, input, residual, activation=activation, **others)

    with mock.patch.object(modules._FusedForward, "forward", spy):
        yield seen


def step(model: nn.Module, arguments: tuple[Tensor, ...], pick: Callable[[Any], Any]) -> dict[str, Any]:
    """Everything that a user may see of one forward and backward."""
    model.zero_grad()
    leaves = [argument.detach().clone().requires_grad_(argument.requires_grad) for argument in arguments]
    # A clone: a model that writes to its argument in place may not be given a leaf.
    output = pick(model(*[leaf.clone() for leaf in leaves]))
    outputs = output if isinstance(output, tuple | list) else [output]
    loss = sum((o * torch.arange(o.numel(), dtype=o.dtype, device=o.device).view_as(o).cos()).sum() for o in outputs)
    if loss.requires_grad:
        loss.backward()
    return {
        "outputs": [o.detach() for o in outputs],
        "loss": loss.detach(),
        "inputs": [leaf.grad for leaf in leaves],
        "parameters": {name: p.grad for name, p in model.named_parameters()},
        "state": dict(model.state_dict()),
    }


def assert_same(
    fused: nn.Module,
    stock: nn.Module,
    arguments: tuple[Tensor, ...],
    pick: Callable[[Any], Any] = lambda output: output,
    modes: tuple[bool, ...] = (True, True, False),
    tolerance: float = 1e-9,
) -> None:
    """Two models do the same: loss, gradients, statistics, state_dict; in training and in evaluation.

    The tolerance is for float64: a few roundings more or fewer, through the layers of a small model.
    """
    assert list(fused.state_dict()) == list(stock.state_dict())
    for training in modes:
        results = []
        for model in (fused, stock):
            model.train(training)
            torch.manual_seed(1)  # dropout
            results.append(step(model, arguments, pick))
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def fused_and_stock(model: nn.Module) -> tuple[nn.Module, nn.Module, list[str]]:
    """A model after fusing, its twin from before, and what the report says of each batch norm: what, or why not."""
    stock = copy.deepcopy(model)
    names = [(name, id(p)) for name, p in [*model.named_parameters(), *model.named_buffers()]]
    fused, report = bn_ext.fuse(model, report=True)
    assert fused is model
    assert [(name, id(p)) for name, p in [*model.named_parameters(), *model.named_buffers()]] == names
    assert [(n, type(m).__name__) for n, m in model.named_modules()] == [
        (n, type(m).__name__) for n, m in stock.named_modules()
    ]
    norms = [n for n, m in stock.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [row.place for row in report.rows] == norms
    return fused, stock, [row.reason or row.what for row in report.rows]


RELU, ADD, ADD_RELU = "batch_norm + relu", "batch_norm + add", "batch_norm + add + relu"
UNUSED = "no traced forward calls it"
FUSED, SEPARATE = [("relu", False)], [(None, False)]


class Small(nn.Module):
    """The smallest thing to fuse, by what a function does with batch norm, activation and input."""

    def __init__(self, body: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.bn, self.act, self.body = nn.BatchNorm2d(3), nn.ReLU(), body

    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn(x)) if self.body is None else self.body(self, x)


class Scaled(nn.ReLU):
    """A subclass that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * input.relu()


def seen_of(model: nn.Module, *arguments: Any, **keywords: Any) -> list[tuple[Any, bool]]:
    with calls() as seen:
        model(*arguments, **keywords)
    return seen


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (4, 3, 5, 6), dtype=dtype)


class Inner(nn.Module):
    """Ends in a batch norm and an identity: what follows is in the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.end = nn.Identity()
        self.scale, self.dropout = 1.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.bn1(self.conv(x)).relu(), self.dropout, self.training)
        return self.end(self.bn2(self.conv(x) * self.scale))


class Outer(nn.Module):
    """A residual block around Inner."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.power = nn.Sequential(Inner()), nn.LeakyReLU(0.1, inplace=True), 1

    def forward(self, x: Tensor, scale: float = 1.0, *, offset: Any = 0) -> Tensor:
        y = self.inner(x)
        y += x
        return self.act(y) * scale**self.power + offset


BOTH = [("relu", False), (("leaky_relu", 0.1), True)]
INNER_ONLY = [("relu", False), (None, False)]


def outer() -> tuple[nn.Module, nn.Module]:
    fused, stock, told = fused_and_stock(Outer().double())
    assert told == [RELU, "batch_norm + add + leaky_relu(negative_slope=0.1)"]
    assert seen_of(fused, x_of()) == BOTH
    stock.load_state_dict(fused.state_dict())
    return fused, stock


def check(
    body: Callable[..., Any], expected: list[str], activation: nn.Module | None = None, **others: Any
) -> nn.Module:
    """Fuse a Block: the report says what is expected, and it does what it did."""
    fused, stock, told = fused_and_stock(Block(body, activation))
    assert told == expected
    assert_same(fused, stock, inputs(), **others)
    return fused
