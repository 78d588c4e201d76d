"""Activation and residual inside the normalisation, through everything that torch can do to a function."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from helpers.derivatives import EPS, leaf, loss, normal
from helpers.libraries import both, norm
from torch import Tensor, func, nn
from torch.autograd import functional, grad
from torch.overrides import BaseTorchFunctionMode

import bn_ext
from bn_ext.activations import apply

pytestmark = pytest.mark.usefixtures("device")

# activation, and whether there is a residual; without either, see test_gradients.py
CASES = [
    *((None, True), ("relu", False), ("relu", True), ("silu", True), ("gelu", False)),
    (("leaky_relu", 0.2), True),
]
Function = Callable[..., Any]


def functions(mode: str, activation: Any) -> tuple[Function, Function]:
    """`f(input, weight, bias, residual=None)` of this package and of torch, of two channels."""
    mean, var = normal(2), normal(2).abs() + 0.5

    def arguments(x: Tensor, w: Tensor, b: Tensor) -> tuple[Any, ...]:
        statistics = (None, None) if mode == "untracked" else (mean.clone(), var.clone())
        return x, *statistics, w, b, mode != "eval", 0.1, EPS

    def ours(x: Tensor, w: Tensor, b: Tensor, z: Tensor | None = None) -> Tensor:
        return bn_ext.batch_norm(*arguments(x, w, b), activation=activation, residual=z)

    def theirs(x: Tensor, w: Tensor, b: Tensor, z: Tensor | None = None) -> Tensor:
        y = F.batch_norm(*arguments(x, w, b))
        return apply(y if z is None else y + z, activation)

    return ours, theirs


def value(f: Function) -> Function:
    return lambda *a: loss(f(*a))


def every(arguments: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(arguments)))


def cosines(arguments: Any) -> tuple[Tensor, ...]:
    return tuple(t.cos() for t in arguments)


def twice(tensors: Any, dim: int = 0) -> list[Tensor]:
    """Batches of two."""
    return [torch.stack([t, t.cos()], dim) for t in tensors]


def identity(y: Tensor) -> Tensor:
    """All gradients of y's values, as a batch."""
    return torch.eye(y.numel(), dtype=y.dtype, device=y.device).view(-1, *y.shape)


def batched_gradients(f: Function, *a: Tensor) -> Any:
    a = tuple(leaf(t) for t in a)
    y = f(*a)
    return grad(y, a, identity(y), is_grads_batched=True)


def batched_second(f: Function, *a: Tensor) -> Any:
    a = tuple(leaf(t) for t in a)
    first = grad(loss(f(*a)), a, create_graph=True)
    options = {"is_grads_batched": True, "allow_unused": True, "materialize_grads": True}
    return [grad(g, a, identity(g), retain_graph=True, **options) for g in first[:3]]


def duals(f: Function, *a: Tensor) -> Any:
    """Each subset of the arguments with a tangent."""
    results = []
    for chosen in itertools.product([False, True], repeat=len(a)):
        with forward_ad.dual_level():
            y = f(*(forward_ad.make_dual(t, t.cos()) if is_dual else t for t, is_dual in zip(a, chosen, strict=True)))
            results.append(list(forward_ad.unpack_dual(y)))
    return results


def zero_tangent(f: Function, x: Tensor, *others: Tensor) -> Any:
    """A tangent without memory."""
    with forward_ad.dual_level():
        zero = torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)
        y, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, zero), *others))
        return y, tangent + y


def dual_through_backward(f: Function, *a: Tensor) -> Any:
    a = tuple(leaf(t) for t in a)
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(t, t.detach().cos()) for t in a))
        return [list(forward_ad.unpack_dual(g)) for g in grad(loss(y), a, create_graph=True)]


TRANSFORMS: dict[str, Function] = {
    "grad": lambda f, *a: func.grad(value(f), every(a))(*a),
    "grad of grad": lambda f, x, *a: func.grad(lambda *b: loss(func.grad(value(f))(*b)), (0, 1))(x, *a),
    "vjp": lambda f, *a: func.vjp(f, *a)[1](a[0].cos()),
    "jvp": lambda f, *a: func.jvp(f, a, cosines(a)),
    "jvp of jvp": lambda f, *a: func.jvp(lambda *b: func.jvp(f, b, cosines(b))[1], a, cosines(a)),
    "linearize": lambda f, *a: func.linearize(f, *a)[1](*cosines(a)),
    "jacrev": lambda f, *a: func.jacrev(f, every(a))(*a),
    "jacrev in chunks": lambda f, *a: func.jacrev(f, every(a), chunk_size=5)(*a),
    "jacfwd": lambda f, *a: func.jacfwd(f, every(a))(*a),
    "hessian": lambda f, *a: func.hessian(value(f), every(a))(*a),
    "forward over forward": lambda f, *a: func.jacfwd(func.jacfwd(value(f), every(a)))(*a),
    "reverse over reverse": lambda f, *a: func.jacrev(func.jacrev(value(f), every(a)))(*a),
    "reverse over forward": lambda f, *a: func.jacrev(func.jacfwd(value(f), every(a)))(*a),
    "functionalize": lambda f, *a: func.functionalize(f)(*a),
    "functionalize grad": lambda f, *a: func.functionalize(func.grad(value(f), every(a)))(*a),
    "vmap": lambda f, *a: func.vmap(f)(*twice(a)),
    "vmap of input": lambda f, x, *a: func.vmap(f, (0, *[None] * len(a)))(*twice([x]), *a),
    "vmap of the last": lambda f, *a: func.vmap(f, (*[None] * (len(a) - 1), 0))(*a[:-1], *twice(a[-1:])),
    "vmap at the end": lambda f, *a: func.vmap(f, -1, 2)(*twice(a, -1)),
    "vmap of vmap": lambda f, *a: func.vmap(func.vmap(f))(*twice(twice(a))),
    "vmap of grad": lambda f, *a: func.vmap(func.grad(value(f), every(a)))(*twice(a)),
    "vmap of hessian": lambda f, *a: func.vmap(func.hessian(value(f)))(*twice(a)),
    "vmap of jvp": lambda f, *a: func.vmap(lambda *b: func.jvp(f, b, cosines(b)))(*twice(a)),
    "grad of vmap": lambda f, *a: func.grad(lambda *b: loss(func.vmap(f)(*b)), every(a))(*twice(a)),
    "functional.jacobian": lambda f, *a: functional.jacobian(f, a),
    "functional.jacobian forward": lambda f, *a: functional.jacobian(f, a, vectorize=True, strategy="forward-mode"),
    "functional.hessian": lambda f, *a: functional.hessian(value(f), a),
    "functional.hessian forward": lambda f, *a: functional.hessian(
        value(f), a, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.vjp": lambda f, *a: functional.vjp(f, a, a[0].cos()),
    "functional.jvp": lambda f, *a: functional.jvp(f, a, cosines(a)),
    "functional.hvp": lambda f, *a: functional.hvp(value(f), a, cosines(a)),
    "functional.vhp": lambda f, *a: functional.vhp(value(f), a, cosines(a)),
    **{f.__name__: f for f in (batched_gradients, batched_second, duals, zero_tangent, dual_through_backward)},
}
# A batch of inputs would update the statistics of all: torch refuses.
REFUSED_IN_TRAINING = {name for name in TRANSFORMS if "vmap" in name and name != "vmap of the last"}


@pytest.mark.parametrize("mode", ["eval", "train", "untracked"])
@pytest.mark.parametrize(("activation", "residual"), CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functions(transform: str, activation: Any, residual: bool, mode: str) -> None:
    values = [normal(*shape) for shape in ((3, 2, 2), (2,), (2,), (3, 2, 2))][: 4 if residual else 3]
    ours, theirs = functions(mode, activation)
    if mode == "train" and transform in REFUSED_IN_TRAINING:
        for f in (ours, theirs):
            with pytest.raises(RuntimeError, match="Batch norm got a batched tensor as input"):
                TRANSFORMS[transform](f, *values)
    else:
        actual, expected = (TRANSFORMS[transform](f, *values) for f in (ours, theirs))
        torch.testing.assert_close(actual, expected)


class ResidualBlock(nn.Module):
    """A small network with a batch norm that has an activation and a residual."""

    def __init__(self, library: str, activation: Any, **options: Any) -> None:
        super().__init__()
        self.norm1 = norm(library, activation=activation, **options)
        self.norm2 = norm(library, activation=activation, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.norm1(x), x)


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters, {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_per_sample_gradients(activation: Any) -> None:
    """Of a model in eval, and of one that has no running statistics, whose samples are batches."""
    x = normal(5, 2, 3, 2, 2)

    def run(library: str) -> Any:
        results = []
        for options in ({}, {"track_running_stats": False}):
            model = ResidualBlock(library, activation, **options).train(bool(options))
            f = func.grad(lambda p, x, model=model: loss(func.functional_call(model, p, (x,))))
            results.append(func.vmap(f, (None, 0))(state_of(model)[0], x))
        return results

    both(run)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_ensembles(training: bool, momentum: float | None) -> None:
    """Models stacked, each with buffers of its own; momentum=None looks at a value, which vmap has none of."""
    x = normal(2, 4, 3, 2, 2)

    def run(library: str) -> Any:
        members = [ResidualBlock(library, "relu", momentum=momentum).train(training) for _ in range(2)]
        parameters, buffers = func.stack_module_state(members)
        f = func.vmap(lambda p, b, x: func.functional_call(members[0], (p, b), (x,)))
        if training and momentum is None:
            with pytest.raises(RuntimeError, match=r"It looks like you're calling \.item\(\) on a Tensor"):
                f(parameters, buffers, x)
            return []
        y = f(parameters, buffers, x)
        return y, buffers, grad(loss(y), list(parameters.values()))

    both(run)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_functional_call_with_other_buffers(training: bool, activation: Any) -> None:
    """Those of the call are updated, and the module's are not."""
    x = normal(4, 3, 2, 2)

    def run(library: str) -> Any:
        model = ResidualBlock(library, activation, momentum=None).train(training)
        parameters, buffers = state_of(model)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        f = func.grad_and_value(lambda p, b: loss(func.functional_call(model, (p, b), (x,))))
        result = f(parameters, buffers)
        torch.testing.assert_close(dict(model.named_buffers()), before)
        return result, buffers

    both(run)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness: str) -> None:
    x = normal(5, 4, 3, 2, 2)

    def run(library: str) -> Any:
        torch.manual_seed(1)
        model = ResidualBlock(library, "relu", track_running_stats=False)
        return func.vmap(lambda x: F.dropout(model(x)), randomness=randomness)(x)

    both(run)


@pytest.mark.parametrize(("activation", "residual"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_penalty(training: bool, activation: Any, residual: bool) -> None:
    """What the gradient of the input does not depend on gets zeros, as behind torch's relu, and not an error."""
    values = normal(4, 3, 2, 2)

    def run(library: str) -> Any:
        block = ResidualBlock(library, activation).train(training)
        module = block if residual else block.norm2
        x = leaf(values)
        (dx,) = grad(module(x).sum(), x, create_graph=True)
        return grad(dx.square().sum(), list(module.parameters()) if activation else [module.norm2.weight])

    both(run)


@pytest.mark.parametrize("mode", ["eval", "train", "untracked"])
def test_functionalize_of_the_dispatched_operator(mode: str) -> None:
    """As where a mode or a subclass of Tensor sees functions."""
    x, w, b = normal(3, 2, 2), normal(2), normal(2)
    results = []
    for f in functions(mode, "relu"):
        with BaseTorchFunctionMode():
            results.append([func.functionalize(f)(x, w, b), func.functionalize(func.grad(value(f)))(x, w, b)])
    torch.testing.assert_close(*results)


def test_second_derivative_of_a_number_as_weight() -> None:
    """A weight without dimensions, as this package takes one for a single channel."""
    x, w = leaf(normal(4, 1, 2, 2)), leaf(normal().abs() + 0.5)

    def penalty(weight: Tensor) -> Tensor:
        (dx,) = grad(
            bn_ext.batch_norm(x, None, None, weight, None, True, activation="relu").sum(), x, create_graph=True
        )
        return grad(dx.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(w), penalty(leaf(w.reshape(1))).reshape(()))
