"""torch.compile, export, make_fx, jit.trace, fake and meta tensors, autocast: the same numbers and strides as eager."""

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.compiling import INPUTS, KINDS, LAYOUTS, assert_same_steps, fitting, laid_out, models, step
from helpers.derivatives import compare, leaf, loss, modules, normal, uniform
from torch import Tensor, func, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bn_ext

pytestmark = pytest.mark.usefixtures("device")

OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "not_affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "untracked_cumulative": {"track_running_stats": False, "momentum": None},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_of_a_compiled_module(options: str, training: bool) -> None:
    ours, stock = modules(**OPTIONS[options])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.train(training), backend=counter, fullgraph=True)
    assert_same_steps(compiled, stock.train(training), [normal(4, 3, 5, 6) for _ in range(4)])
    assert counter.frame_count == 1


def test_switching_between_training_and_eval() -> None:
    ours, stock = modules(momentum=None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for training in (True, False, True, False):
        ours.train(training)
        assert_same_steps(compiled, stock.train(training), [normal(4, 3, 5, 6)])
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "layout"), fitting("contiguous", "channels_last"))
def test_kinds_and_memory_formats(name: str, layout: str, training: bool) -> None:
    shape = INPUTS[name]
    ours, stock = modules(KINDS[len(shape)], shape[1])
    compiled = torch.compile(ours.train(training), backend="aot_eager", fullgraph=True)
    assert_same_steps(compiled, stock.train(training), [laid_out(shape, layout)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_size_that_changes(layout: str, dynamic: bool | None, training: bool) -> None:
    ours, stock = modules()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(ours.train(training), backend=counter, fullgraph=True, dynamic=dynamic)
    for n in (4, 6, 9, 4):
        assert_same_steps(compiled, stock.train(training), [laid_out((n, 3, 5, 6), layout)])
        counts.append(counter.frame_count)
    assert counts[-1] - counts[0] == (0 if dynamic else 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_model_that_uses_one_module_twice(backend: str, layout: str, training: bool) -> None:
    dtype = torch.float32 if backend == "inductor" else torch.float64
    ours, stock = (model.train(training) for model in models(dtype))
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    inputs = [laid_out((4, 3, 5, 6), layout, dtype) for _ in range(2)]
    assert_same_steps(compiled, stock, inputs, fusing=backend == "inductor")
    assert ours.norm.num_batches_tracked.item() == 4 * training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_compiled_without_gradients(context: Any, training: bool) -> None:
    ours, stock = modules()
    compiled = torch.compile(ours.train(training), backend="aot_eager", fullgraph=True)
    with context():
        compare(lambda module: module(normal(1, 3, 1, 2).fill_(3)), compiled, stock.train(training))
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_under_compile(training: bool) -> None:
    (ours, stock), x = modules(), normal(4, 3, 5, 6)

    def run(module: nn.Module, wrap: Any) -> Any:
        buffers = {name: buffer.clone() for name, buffer in module.train(training).named_buffers()}
        parameters = {name: leaf(parameter) for name, parameter in module.named_parameters()}
        y = wrap(lambda p, b, x: func.functional_call(module, (p, b), (x,)))(parameters, buffers, x)
        return y.detach(), torch.autograd.grad(loss(y), list(parameters.values())), buffers

    actual = run(ours, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(actual, run(stock, lambda f: f))


@pytest.mark.parametrize("options", ["default", "untracked"])
def test_transforms_under_compile(options: str) -> None:
    (ours, stock), x = modules(**OPTIONS[options]), normal(2, 4, 3, 5, 6)
    f, g = (func.vmap(func.grad(lambda x, module=module: loss(module(x)))) for module in (ours.eval(), stock.eval()))
    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(x), g(x))


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
    for activation, save_mask in ((None, False), ("relu", False), ("leaky_relu", True), ("silu", False)):
        named = (activation, 0.2)
        forward = inner_arguments(values, training) | dict(
            residual=residual, activation=activation, activation_parameter=0.2, save_mask=save_mask
        )
        torch.library.opcheck(inner, (), forward)
        _, saved, mask = inner(**forward)
        torch.library.opcheck(ops.batch_norm_repeat.default, (x, saved, residual, *named))
        for wanted in ([True, w is not None, True, True], [True, False, False, False], [False, False, True, False]):
            backward = (dy, x, w, saved, residual, mask if save_mask else None, training, *named, wanted)
            torch.library.opcheck(ops.batch_norm_backward.default, backward)


def test_opcheck_without_statistics() -> None:
    values = arguments(True, running_mean=None, running_var=None, num_batches_tracked=None)
    torch.library.opcheck(torch.ops.bn_ext.batch_norm.default, (), values)
    torch.library.opcheck(torch.ops.bn_ext.batch_norm_forward.default, (), inner_arguments(values, True))


def called_operators(program: torch.export.ExportedProgram) -> list[str]:
    """Names of what the graph calls."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
def test_export(training: bool, strict: bool) -> None:
    ours, stock = (model.train(training) for model in models())
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = torch.export.export(ours, (normal(4, 3, 5, 6),), strict=strict, dynamic_shapes=sizes)
    assert called_operators(program).count("bn_ext.batch_norm.default") == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded, again = (torch.export.load(io.BytesIO(file.getvalue())) for _ in range(2))
    for exported in (program, loaded, again.run_decompositions()):
        expected, module = copy.deepcopy(stock), exported.module()
        for x in (normal(4, 3, 5, 6), normal(7, 3, 5, 6)):
            torch.testing.assert_close(module(x), expected(x))
        state = module.state_dict()
        torch.testing.assert_close(dict(state), {name: expected.state_dict()[name] for name in state})


@pytest.mark.parametrize("training", [True, False])
def test_decomposed_graph(training: bool) -> None:
    called = called_operators(
        torch.export.export(modules()[0].train(training), (normal(4, 3, 5, 6),)).run_decompositions()
    )
    assert any("auto_functionalized" in name for name in called) == training
    assert ("bn_ext.batch_norm_inference.default" in called) != training


@pytest.mark.parametrize("form", ["training", "eval", "decomposed_eval"])
def test_exported_program_is_differentiable(form: str) -> None:
    (ours, stock), x = (model.train(form == "training") for model in models()), normal(4, 3, 5, 6)
    program = torch.export.export(ours, (x,))
    exported = (program.run_decompositions() if form == "decomposed_eval" else program).module()

    def run(module: nn.Module) -> dict[str, Tensor]:
        loss(module(x)).backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    compare(run, exported, stock)


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(training: bool) -> None:
    ours, stock = (model.train(training) for model in models())
    traced = torch.fx.symbolic_trace(ours)
    for x in (normal(4, 3, 5, 6), normal(7, 3, 5, 6)):
        compare(lambda model, x=x: step(model, x)[:2], traced, stock)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())


def test_traced_model_is_saved_and_loaded() -> None:
    ours, stock = (model.eval() for model in models())
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(ours, (normal(4, 3, 5, 6),)), file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert str(loaded.inlined_graph).count("bn_ext::batch_norm(") == 2
    for x in (leaf(normal(4, 3, 5, 6)), leaf(normal(7, 3, 4, 4))):
        compare(lambda model, x=x: (model(x), torch.autograd.grad(loss(model(x)), x)), loaded, stock)


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(device: str, training: bool, compiled: bool) -> None:
    ours, stock = (model.train(training) for model in models(torch.float32))
    run = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    x = normal(4, 3, 5, 6, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        actual, expected = run(x), stock(x)
        assert [ours.norm(t).dtype for t in (x, x.bfloat16())] == [torch.float32, torch.bfloat16]
        stock.norm(x), stock.norm(x.bfloat16())
    # A few roundings to bfloat16 of values around 1.
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    gradients, wanted = (
        torch.autograd.grad(loss(y), list(m.parameters())) for y, m in ((actual, ours), (expected, stock))
    )
    torch.testing.assert_close(gradients, wanted, rtol=0.1, atol=0.1)
    torch.testing.assert_close(ours.norm.state_dict(), stock.norm.state_dict(), rtol=0.02, atol=0.02)
