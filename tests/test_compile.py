"""torch.compile of modules and models: the same numbers and strides as eager."""

from typing import Any

import pytest
import torch
from helpers.compiling import INPUTS, KINDS, assert_same_steps, fitting, laid_out, models
from helpers.derivatives import compare, leaf, loss, modules, normal
from torch import func, nn
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("device", "fresh_compiler")

OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "not_affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "untracked_cumulative": {"track_running_stats": False, "momentum": None},
}


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


SIZES = {
    "batch": [(4, 3, 5, 6), (6, 3, 5, 6), (9, 3, 5, 6), (4, 3, 5, 6)],
    "image": [(4, 3, 5, 6), (4, 3, 7, 8), (4, 3, 9, 7), (4, 3, 5, 6)],
    "both": [(4, 3, 5, 6), (6, 3, 7, 9), (9, 3, 9, 7), (4, 3, 5, 6)],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("changing", SIZES)
def test_sizes_that_change(changing: str, layout: str, dynamic: bool | None, training: bool) -> None:
    ours, stock = modules()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(ours.train(training), backend=counter, fullgraph=True, dynamic=dynamic)
    for shape in SIZES[changing]:
        assert_same_steps(compiled, stock.train(training), [laid_out(shape, layout)])
        counts.append(counter.frame_count)
    assert counts[-1] - counts[0] == (0 if dynamic else 1)


@pytest.mark.slow
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
