"""Derivatives of any order against stock torch and float64: autograd, forward mode, torch.func, hooks, layouts."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from helpers.derivatives import (
    EPS,
    GRADIENT_LAYOUTS,
    TRANSFORMS,
    BackwardMasks,
    compare,
    formula,
    functions,
    leaf,
    loss,
    modules,
    normal,
    uniform,
)
from helpers.scenarios import SCENARIOS
from torch import Tensor, func, nn
from torch.autograd import grad, gradcheck, gradgradcheck

import bn_ext

pytestmark = pytest.mark.usefixtures("device")

INPUTS = {
    "nc": ((5, 2), "contiguous"),
    "ncl": ((3, 2, 2), "contiguous"),
    "nchw": ((2, 2, 2, 2), "contiguous"),
    "channels_last": ((2, 2, 2, 2), "channels_last"),
    "ncdhw": ((2, 2, 2, 1, 2), "contiguous"),
    "channels_last_3d": ((2, 2, 2, 1, 2), "channels_last_3d"),
}
MODES = ["train", "untracked", "eval"]
SUBSETS = list(itertools.product((True, False), repeat=3))[:-1]
LAYOUTS = ["contiguous", "channels_last"]
# The one rounding to the input's dtype, and float32 arithmetic on the way to it.
HALF = {torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5}, torch.float16: {"rtol": 2**-11, "atol": 1e-5}}
# Float32 sums of a few hundred values, which partly cancel.
FLOAT32_SUM = {"rtol": 1e-5, "atol": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize(("has_weight", "has_bias"), list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", INPUTS)
def test_finite_differences(name: str, mode: str, has_weight: bool, has_bias: bool) -> None:
    shape, layout = INPUTS[name]
    x = leaf(normal(*shape, layout=layout))
    w, b = (leaf(normal(shape[1])) if wanted else None for wanted in (has_weight, has_bias))
    ours, _ = functions(shape[1], mode, momentum=None if has_bias else 0.3)
    every_way = has_weight and has_bias and name == "channels_last"
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True} if every_way else {}
    assert gradcheck(ours, (x, w, b), check_batched_grad=every_way, **forward)
    forward = {"check_fwd_over_rev": True, "check_rev_over_rev": True} if every_way else {}
    assert gradgradcheck(ours, (x, w, b), check_batched_grad=every_way, **forward)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_third_derivative(mode: str) -> None:
    # Against the formula: that of torch's own batch norm is wrong in training.
    x, w, b = leaf(normal(3, 2, 2)), leaf(normal(2)), leaf(normal(2))
    mean, var = normal(2), normal(2).abs() + 0.5

    def third(batch_norm: Callable[..., Tensor]) -> Any:
        y = batch_norm(x, mean.clone(), var.clone(), w, b, mode == "train", 0.1, EPS)
        first = grad(loss(y), (x, w, b), create_graph=True)
        second = grad(sum(g.pow(2).sum() for g in first), (x, w, b), create_graph=True)
        return first, second, grad(sum(g.pow(2).sum() for g in second), (x, w, b))

    compare(third, bn_ext.batch_norm, formula)


@pytest.mark.parametrize("operator", [bn_ext.batch_norm, torch.ops.bn_ext.batch_norm], ids=["direct", "dispatched"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions(transform: str, mode: str, operator: Callable[..., Tensor]) -> None:
    x, w, b = normal(3, 2, 3), normal(2), normal(2)
    ours, stock = functions(2, mode, operator=operator)
    if mode == "train" and transform in ("vmap_input", "vmap_last", "vmap_grad"):
        for f in (ours, stock):
            with pytest.raises(RuntimeError, match="Batch norm got a batched tensor as input"):
                TRANSFORMS[transform](f, x, w, b)
    else:
        compare(lambda f: TRANSFORMS[transform](f, x, w, b), ours, stock)


@pytest.mark.parametrize("is_dual", SUBSETS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_mode(mode: str, is_dual: tuple[bool, ...]) -> None:
    values = (normal(2, 3, 2, 2), normal(3), normal(3))

    def tangent(f: Callable[..., Tensor]) -> Any:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t.cos()) if d else t for t, d in zip(values, is_dual, strict=True)]
            return tuple(forward_ad.unpack_dual(f(*duals)))

    compare(tangent, *functions(3, mode))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_mode_through_backward(mode: str, create_graph: bool) -> None:
    x, dy, tangent, w = leaf(normal(4, 3, 2)), normal(4, 3, 2), normal(4, 3, 2), leaf(normal(3))

    def run(f: Callable[..., Tensor]) -> Any:
        y = f(x, w, None)
        with forward_ad.dual_level():
            gradients = grad(y, (x, w), forward_ad.make_dual(dy, tangent), create_graph=create_graph)
            return [tuple(forward_ad.unpack_dual(g)) for g in gradients]

    compare(run, *functions(3, mode))


def test_func_grad_refuses_captured_statistics_and_leaves_them_alone() -> None:
    def run(module: nn.Module) -> Any:
        with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
            func.grad(lambda x: loss(module(x)))(normal(4, 3, 2, 2))
        return module.state_dict()

    compare(run, *modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_functional_call(momentum: float | None, training: bool) -> None:
    x = normal(4, 3, 2, 2)

    def run(module: nn.Module) -> Any:
        module.train(training)
        f = func.grad(lambda p, b: (loss(func.functional_call(module, (p, b), (x,))), b), has_aux=True)
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return f(parameters, {name: buffer.clone() for name, buffer in module.named_buffers()})

    compare(run, *modules(momentum=momentum))


@pytest.mark.parametrize("training", [True, False])
def test_ensemble(training: bool) -> None:
    x, (first, second) = normal(2, 4, 3, 2, 2), (modules(), modules())

    def run(members: list[nn.Module]) -> Any:
        parameters, buffers = func.stack_module_state([member.train(training) for member in members])
        y = func.vmap(lambda p, b, x: func.functional_call(members[0], (p, b), (x,)))(parameters, buffers, x)
        return y, buffers

    compare(run, *zip(first, second, strict=True))


def test_per_sample_gradients_of_an_eval_model() -> None:
    x = normal(4, 3, 2, 2)

    def run(module: nn.Module) -> Any:
        model = nn.Sequential(module.eval(), nn.Sigmoid())
        f = func.grad(lambda p, x: loss(func.functional_call(model, p, (x[None],))))
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return func.vmap(f, (None, 0))(parameters, x)

    compare(run, *modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios(scenario: str, training: bool) -> None:
    x = normal(4, 3, 2, 2)
    ours, stock = modules()
    compare(lambda module: SCENARIOS[scenario](module.train(training), leaf(x)), ours, stock)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("needed", SUBSETS)
def test_only_needed_gradients_are_computed(needed: tuple[bool, ...], mode: str, create_graph: bool) -> None:
    values = (normal(4, 3, 2, 2), normal(3), normal(3))

    def frozen(f: Callable[..., Tensor]) -> Any:
        tensors = [value.clone().requires_grad_(need) for value, need in zip(values, needed, strict=True)]
        loss(f(*tensors)).backward(create_graph=create_graph)
        return [tensor.grad for tensor in tensors]

    def unasked(f: Callable[..., Tensor]) -> Any:
        tensors = [leaf(value) for value in values]
        asked = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        return grad(loss(f(*tensors)), asked, create_graph=create_graph)

    for run in (frozen, unasked):
        with BackwardMasks() as spy:
            gradients = compare(run, *functions(3, mode))
        assert run is unasked or [g is not None for g in gradients] == list(needed)
        assert spy.masks == ([] if create_graph else [[*needed, False]])


@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_input_weight_and_four_vectors(dtype: torch.dtype, mode: str, layout: str) -> None:
    x = normal(4, 6, 5, 7, dtype=dtype, layout=layout)
    x = (x[:, ::2] if layout == "sliced" else x).requires_grad_()
    w, b, mean, var = (uniform(x.shape[1]).requires_grad_(i < 2) for i in range(4))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        statistics = (None, None) if mode == "untracked" else (mean, var)
        y = bn_ext.batch_norm(x, *statistics, w, b, mode != "eval")
    assert [t.data_ptr() for t in saved[:2]] == [x.data_ptr(), w.data_ptr()]
    assert sum(t.nbytes for t in saved) == x.nbytes + 5 * 4 * x.shape[1]
    expected = F.batch_norm(x.double(), mean.double(), var.double(), w.double(), b.double(), mode != "eval")
    torch.testing.assert_close(y.double(), expected, **HALF[torch.bfloat16])


@pytest.mark.parametrize("which", ["input", "weight"])
def test_saved_tensor_changed_in_place(which: str) -> None:
    for f in functions(3, "train"):
        x, w, b = leaf(normal(4, 3, 2, 2)) * 1, leaf(normal(3)) * 1, leaf(normal(3)) * 1
        y = f(x, w, b)
        (x if which == "input" else w).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_bias_and_statistics_changed_in_place(training: bool) -> None:
    (ours, stock), x, gradients = modules(), leaf(normal(4, 3, 2, 2)), []
    for module in (ours, stock):
        value = loss(module.train(training)(x))
        if module is ours:
            with torch.no_grad():
                torch._foreach_mul_([module.bias, module.running_mean, module.running_var], 3)
        gradients.append(grad(value, (x, *module.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gradient_layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layouts_of_gradients(mode: str, layout: str, gradient_layout: str) -> None:
    shape = (4, 5, 6, 7)
    x = leaf(normal(*shape, dtype=torch.float32, layout=layout))
    w, b, mean, var = (uniform(5).add(0.5).requires_grad_(i < 2) for i in range(4))
    dy = GRADIENT_LAYOUTS[gradient_layout](*shape)
    gradients = grad(bn_ext.batch_norm(x, mean.clone(), var.clone(), w, b, mode == "train"), (x, w, b), dy)
    y = F.batch_norm(x.double(), mean.double(), var.double(), w.double(), b.double(), mode == "train")
    expected = grad(y, (x, w, b), dy.double())
    torch.testing.assert_close(gradients, expected, **FLOAT32_SUM)
    assert gradients[0].stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALF)
def test_half_input_with_float32_parameters(dtype: torch.dtype, mode: str, layout: str) -> None:
    # Stock torch gave wrong gradients for bfloat16 input in training: pytorch#156513.
    x, dy, v = (normal(8, 6, 9, 11, dtype=dtype, layout=layout) for _ in range(3))
    w, b, mean, var = (uniform(6) + 0.5 for _ in range(4))

    def derivatives(batch_norm: Callable[..., Tensor], dtype: torch.dtype, params: torch.dtype) -> Any:
        tensors = [leaf(x.to(dtype)), leaf(w.to(params)), leaf(b.to(params)), leaf(dy.to(dtype))]
        statistics = (None, None) if mode == "untracked" else (mean.to(params), var.to(params))
        y = batch_norm(tensors[0], *statistics, *tensors[1:3], mode != "eval")
        first = grad(y, tensors[:3], tensors[3], retain_graph=True)
        assert [g.dtype for g in first] == [dtype, params, params]
        twice = grad(y, tensors[0], tensors[3], create_graph=True)
        return first, grad(twice, [tensors[i] for i in (1, 3)] + [tensors[0]] * (mode != "eval"), v.to(dtype))

    (ours, ours_twice), (stock, stock_twice) = (
        derivatives(bn_ext.batch_norm, dtype, torch.float32),
        derivatives(F.batch_norm, torch.float64, torch.float64),
    )
    for actual, expected in zip((*ours, *ours_twice), (*stock, *stock_twice), strict=True):
        torch.testing.assert_close(actual.double(), expected, **(HALF | {torch.float32: FLOAT32_SUM})[actual.dtype])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_weight_and_bias_of_another_shape(shape: tuple[int, int], mode: str) -> None:
    x, values = leaf(normal(4, 3, 2, 2)), (normal(3), normal(3))
    ours, stock = functions(3, mode)
    actual, expected = [leaf(v.view(shape)) for v in values], [leaf(v) for v in values]
    for create_graph in (False, True):
        gradients = grad(loss(ours(x, *actual)), actual, create_graph=create_graph)
        for value, model in zip(gradients, grad(loss(stock(x, *expected)), expected), strict=True):
            torch.testing.assert_close(value, model.view(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistic_that_requires_a_gradient_is_refused(name: str, training: bool) -> None:
    words = f"is not differentiable with respect to argument '{name}'. This input cannot have requires_grad True."
    for module in modules():
        getattr(module.train(training), name).requires_grad_()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(RuntimeError, match=words):
            module(normal(4, 3, 2, 2))
        if type(module) is bn_ext.BatchNorm2d:
            torch.testing.assert_close(dict(module.state_dict()), before)
