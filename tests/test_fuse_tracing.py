"""bn_ext.fuse: forwards that a graph does not tell all about are left alone."""

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import FUSED, RELU, Block, Small, assert_same, fused_and_stock, inputs, seen_of, x_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bn_ext

UNFAITHFUL: dict[str, tuple[Callable[..., Any], str]] = {
    "value": (lambda self, x: self.act(self.bn(x)) if x.sum() > 0 else x, "forward() branches or loops on values"),
    "shape": (lambda self, x: self.act(self.bn(x)) if x.dim() == 4 else x, "forward() branches or loops on values"),
    "loop": (lambda self, x: [self.act(self.bn(t[None])) for t in x][-1], "forward() branches or loops on values"),
    "attribute": (lambda self, x: (setattr(self, "last", x), self.act(self.bn(x)))[1], "forward() sets last"),
    "counter": (
        lambda self, x: (setattr(self, "count", getattr(self, "count", 0) + 1), self.act(self.bn(x)))[1],
        "forward() sets count",
    ),
    "list": (
        lambda self, x: (LIST.append(1), self.kept.append(x), self.act(self.bn(x)))[2],
        "forward() sets LIST, kept",
    ),
    "random": (
        lambda self, x: self.act(self.bn(x)) if random.random() < 2 else x,
        "forward() calls Random.random, which may do more than return a value",
    ),
    "numpy random": (
        lambda self, x: self.act(self.bn(x)) if np.random.rand() < 2 else x,
        "forward() reads np.random.rand, whose state cannot be compared (cython_function_or_method)",
    ),
    "torch seed": (
        lambda self, x: (torch.manual_seed(0), self.act(self.bn(x)))[1],
        "forward() enters a context, or reads or sets a mode (grad mode, autocast, checkpoint, ...)",
    ),
    "torch random": (
        lambda self, x: self.act(self.bn(x)) * (torch.rand(()) < 2),
        "forward() computes with tensors other than its input (aten.rand.default)",
    ),
    "constant": (
        lambda self, x: self.act(self.bn(x)) + torch.ones(()),
        "forward() computes with tensors other than its input (aten.ones.default)",
    ),
    "tensor from elsewhere": (
        lambda self, x: self.act(self.bn(x)) + ELSEWHERE,
        "forward() uses a tensor that is not an attribute of a module",
    ),
    "type": (
        lambda self, x: self.act(self.bn(x)) if isinstance(x.chunk(2), tuple) else x,
        "forward() reads the type of a value",
    ),
}


def catching(self: Small, x: Tensor) -> Tensor:
    try:
        n = 1 if isinstance(x.chunk(2), tuple) else 2
    except Exception:
        n = 100
    return self.act(self.bn(x)) * n


def setting_data(self: Small, x: Tensor) -> Tensor:
    y = self.bn(x)
    y.data = y.data + 1
    return self.act(y)


UNFAITHFUL |= {
    "caught": (catching, "forward() catches exceptions that an operation may raise in a later call"),
    "data": (setting_data, "forward() sets 'data' of a value"),
    "attribute of a value": (
        lambda self, x: self.act(self.bn(x)) if getattr(x, "mask", None) is None else x,
        "forward() reads the attribute 'mask' of a value",
    ),
    "ordered dictionary": (
        lambda self, x: OrderedDict(out=self.act(self.bn(x))),
        "forward() creates or uses a value of type OrderedDict, which the generated code cannot create",
    ),
}
LIST: list[int] = []
ELSEWHERE = torch.ones(())


@torch.no_grad()
def without_gradients(self: Small, x: Tensor) -> Tensor:
    return self.act(self.bn(x))


def under_autocast(self: Small, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.act(self.bn(x))


def partly_without_gradients(self: Small, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.bn(x)
    return self.act(y)


def under_saved_tensor_hooks(self: Small, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return self.act(self.bn(x))


def asking_for_the_grad_mode(self: Small, x: Tensor) -> Tensor:
    return self.act(self.bn(x)) if torch.is_grad_enabled() else self.bn(x)


CONTEXT = "forward() enters a context, or reads or sets a mode (grad mode, autocast, checkpoint, ...)"
for _body in (
    without_gradients,
    under_autocast,
    partly_without_gradients,
    under_saved_tensor_hooks,
    asking_for_the_grad_mode,
):
    UNFAITHFUL[_body.__name__] = (_body, CONTEXT)


@pytest.mark.parametrize("name", UNFAITHFUL)
def test_a_forward_that_does_more_than_its_graph_is_left_alone(name: str) -> None:
    body, reason = UNFAITHFUL[name]
    model = Small(body)
    model.kept = []
    LIST.clear()
    states = torch.get_rng_state(), random.getstate()
    attributes = {name: value for name, value in vars(model).items() if name != "training"}
    _, report = bn_ext.fuse(model.eval(), report=True)
    assert [row.reason for row in report.rows] == [reason]
    assert type(model) is Small
    assert not model.training
    assert {name: value for name, value in vars(model).items() if name != "training"} == attributes
    assert model.kept == []
    assert LIST == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert seen_of(model, x_of(dtype=torch.float32))[0] == (None, False)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_are_left_alone(use_reentrant: bool) -> None:
    def body(self: Small, x: Tensor) -> Any:
        return checkpoint(lambda x: self.act(self.bn(x)), x, use_reentrant=use_reentrant)

    fused, stock, [reason] = fused_and_stock(Small(body).double())
    assert reason.startswith(("forward()", "torch.fx cannot trace it"))
    assert_same(fused, stock, (x_of().requires_grad_(),))


def test_children_of_what_cannot_be_traced_are_fused() -> None:
    def body(self: Small, x: Tensor) -> Any:
        return self.inner(x) if x.shape[0] > 1 else x

    model = Small(body)
    model.inner = Small()
    fused, _, told = fused_and_stock(model)
    assert told == ["forward() branches or loops on values", RELU]
    assert seen_of(fused, x_of(dtype=torch.float32)) == FUSED


class Takes(nn.Module):
    """A list or a tensor, as the layers of some DenseNets; and an operation in C++ that looks at its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        features = [x] if isinstance(x, Tensor) else x
        return self.bn(torch.cat(features, 1)).relu() if x is not None else None


class Square(torch.autograd.Function):
    """Python's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def test_questions_about_types() -> None:
    fused, stock, [reason] = fused_and_stock(Takes().double())
    assert reason == "forward() reads the type of a value"
    assert_same(fused, stock, (x_of(),))
    model = Small(lambda self, x: self.inner([x]))
    model.bn, model.inner = None, Takes()
    fused, stock, told = fused_and_stock(model.double())
    assert told == [RELU]  # where the answer is known
    assert_same(fused, stock, (x_of(),))
    assert seen_of(fused, x_of()) == FUSED


def test_autograd_functions_are_left_alone() -> None:
    fused, stock, [reason] = fused_and_stock(Small(lambda self, x: Square.apply(self.act(self.bn(x)))).double())
    assert reason == "forward() reads the type of a value"
    assert_same(fused, stock, (x_of().requires_grad_(),))


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Looks at sizes."""
    return F.pad(x, (1, 0, 0, 0)) if x.shape[-1] % 2 else x


def norm_and_relu(x: Tensor, norm: nn.Module) -> Tensor:
    """What a graph does not show where this stays a call."""
    return norm(x).relu() if x.shape[-1] > 1 else x


class Padding(Block):
    """A forward of this file, so that it knows the file's functions."""

    def forward(self, x: Tensor, z: Tensor) -> Any:
        if self.body.__name__ == "padded":
            return self.bn(padded(self.conv(x), self.conv)).relu()
        return self.bn(norm_and_relu(x, self.bn)).relu()


def test_functions_that_cannot_be_traced_stay_calls() -> None:
    fused, stock, told = fused_and_stock(Padding(padded))
    assert told[0] == RELU
    for shape in ((4, 3, 5, 5), (4, 3, 6, 6)):
        stock.load_state_dict(fused.state_dict())
        assert_same(fused, stock, (x_of(*shape), x_of()))
    for model in (fused, stock):  # a trace from outside sees the original forward
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(model)
    fused, stock, told = fused_and_stock(Padding(norm_and_relu))
    assert told[0] == "it is called more than once"
    assert_same(fused, stock, inputs())
