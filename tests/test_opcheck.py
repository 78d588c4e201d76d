"""The operators as torch's tools see them: opcheck, make_fx, fake and meta tensors, and what ONNX gets."""

import copy
from typing import Any

import pytest
import torch
from helpers.compiling import INPUTS, KINDS, LAYOUTS, fitting, laid_out
from helpers.derivatives import compare, leaf, loss, normal, uniform
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import bn_ext
from bn_ext import _fake, _onnx

pytestmark = pytest.mark.usefixtures("device")


def arguments(training: bool, **changed: Any) -> dict[str, Any]:
    """Of bn_ext::batch_norm."""
    values = {name: normal(3) for name in ("running_mean", "weight", "bias")}
    values |= {"input": normal(4, 3, 2, 2), "running_var": normal(3).abs() + 0.5, "eps": 1e-3}
    return values | {"training": training, "num_batches_tracked": normal().fill_(2).long()} | changed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("traced", ["real", "fake", "symbolic"])
def test_make_fx(traced: str, training: bool) -> None:
    def f(*tensors: Tensor) -> Any:
        inputs = [t.detach().requires_grad_() for t in tensors[:3]]
        y = bn_ext.batch_norm(inputs[0], *tensors[3:5], *inputs[1:], training, num_batches_tracked=tensors[5])
        return y, torch.autograd.grad(loss(y), inputs)

    names = ("input", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    values = [arguments(training)[name] for name in names]
    graph = make_fx(f, tracing_mode=traced)(*(v.clone() for v in values))
    called = {node.target for node in graph.graph.nodes}
    inner = torch.ops.bn_ext.batch_norm_forward if training else torch.ops.bn_ext.batch_norm_inference
    assert {inner.default, torch.ops.bn_ext.batch_norm_backward.default} <= called

    def run(f: Any) -> Any:
        tensors = [v.clone() for v in values]
        return f(*tensors), tensors

    compare(run, graph, f)


SAMPLES: dict[str, Any] = {
    "default": dict,
    "channels_last": lambda: {"input": laid_out((4, 3, 2, 2), "channels_last")},
    "sliced": lambda: {"input": laid_out((4, 3, 2, 2), "sliced")},
    "nc": lambda: {"input": normal(4, 3)},
    "bare": lambda: {"weight": None, "bias": None},
    "cumulative": lambda: {"momentum": None},
    "needs_gradient": lambda: {name: leaf(arguments(True)[name]) for name in ("input", "weight", "bias")},
    "bfloat16": lambda: (
        {name: uniform(3) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
        | {"input": normal(4, 3, 2, 2, dtype=torch.bfloat16)}
    ),
}


def inner_arguments(values: dict[str, Any], training: bool) -> dict[str, Any]:
    """Of bn_ext::batch_norm_forward or batch_norm_inference: those of the outer operator that they have."""
    values = {"momentum": 0.1, "residual": None} | values
    unwanted = ("training",) if training else ("training", "momentum", "num_batches_tracked")
    return {name: value for name, value in values.items() if name not in unwanted}


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str, training: bool) -> None:
    values = arguments(training, **SAMPLES[sample]())
    ops = torch.ops.bn_ext
    torch.library.opcheck(ops.batch_norm.default, (), values)
    torch.library.opcheck(
        ops.batch_norm.default, (), values | {"activation": "relu", "residual": values["input"].detach().cos()}
    )
    values = {name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()}
    inner = ops.batch_norm_forward.default if training else ops.batch_norm_inference.default
    torch.library.opcheck(inner, (), inner_arguments(values, training))
    x, w = values["input"], values["weight"]
    residual, dy = torch.rand_like(x), torch.rand_like(x)
    for activation, has_mask in ((None, False), ("relu", False), ("leaky_relu", True), ("silu", False)):
        mask_format = _fake._memory_format(x) if has_mask else None
        named = (activation, 0.2)
        forward = inner_arguments(values, training) | dict(
            residual=residual, activation=activation, activation_parameter=0.2, mask_format=mask_format
        )
        torch.library.opcheck(inner, (), forward)
        _, saved, mask = inner(**forward)
        torch.library.opcheck(ops.batch_norm_repeat.default, (x, saved, residual, *named))
        for wanted in ([True, w is not None, True, True], [True, False, False, False], [False, False, True, False]):
            backward = (dy, x, w, saved, residual, mask if has_mask else None, mask_format, training, *named, wanted)
            torch.library.opcheck(ops.batch_norm_backward.default, backward)


def test_opcheck_without_statistics() -> None:
    values = arguments(True, running_mean=None, running_var=None, num_batches_tracked=None)
    torch.library.opcheck(torch.ops.bn_ext.batch_norm.default, (), values)
    torch.library.opcheck(torch.ops.bn_ext.batch_norm_forward.default, (), inner_arguments(values, True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "layout"), fitting(*LAYOUTS))
def test_fake_and_meta_tensors(name: str, layout: str, dtype: torch.dtype, training: bool) -> None:
    x = laid_out(INPUTS[name], layout, dtype)
    params = torch.float64 if dtype == torch.float64 else torch.float32
    module = getattr(bn_ext, KINDS[x.dim()])(x.shape[1], dtype=params, device=x.device).train(training)

    def describe(module: nn.Module, x: Tensor) -> Any:
        y = module(x.requires_grad_())
        gradients = torch.autograd.grad(y.sum(), (x, *module.parameters()))
        return [(t.shape, t.dtype, t.stride() if t.dim() > 1 else ()) for t in (y, *gradients)]

    expected = describe(copy.deepcopy(module), x.detach())
    assert describe(copy.deepcopy(module).to("meta"), x.detach().to("meta")) == expected
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert describe(module, mode.from_tensor(x.detach())) == expected


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
def test_composed(training: bool, momentum: float | None) -> None:
    """What ONNX gets: the same output and statistics."""
    values = arguments(training, residual=normal(4, 3, 2, 2), activation="elu", activation_parameter=0.7)

    def run(f: Any) -> Any:
        mine = copy.deepcopy(values) | {"momentum": momentum}
        return f(**mine), [mine[name] for name in mine if isinstance(mine[name], Tensor)]

    compare(run, _onnx.in_torchs_operators, torch.ops.bn_ext.batch_norm)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_symbolic_sizes(layout: str) -> None:
    """Fake tensors with symbolic sizes have the kernels' strides."""
    x = laid_out((4, 3, 5, 6), layout)
    mean, var = normal(3), normal(3).abs()

    def y(x: Tensor) -> Tensor:
        return torch.ops.bn_ext.batch_norm_inference(x, None, None, mean, var, None, 1e-3)[0]

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert isinstance(fake.shape[0], torch.SymInt)
        assert tuple(int(s) for s in y(fake).stride()) == y(x).stride()
