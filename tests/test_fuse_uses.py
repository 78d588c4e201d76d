"""Fused modules in use: residuals of any kind, copies, files and compilers."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import (
    ADD_RELU,
    BOTH,
    Block,
    Outer,
    assert_same,
    calls,
    fused_and_stock,
    inputs,
    outer,
    seen_of,
    x_of,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bn_ext


def residual_body(add: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x, z: F.relu(add(self.bn(x), z))


@pytest.mark.parametrize("add", [torch.add, Tensor.add_], ids=["add", "add_"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 3, 1, 1), torch.float64), ((1,), torch.float64), ((), torch.float64), ((4, 3, 5, 6), torch.float32)],
)
def test_residuals_of_other_shapes_and_dtypes(add: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    method = (lambda y, z: y.add_(z)) if add is Tensor.add_ else add
    fused, stock, told = fused_and_stock(Block(residual_body(method)))
    assert told[0] == ADD_RELU
    x, z = x_of(), x_of(4, 3, 5, 6).sum() if shape == () else torch.randn(shape, dtype=dtype)
    assert_same(fused, stock, (x.requires_grad_(), z.requires_grad_()))


@pytest.mark.parametrize("add", ["add", "add_"])
def test_residual_of_a_wider_dtype(add: str) -> None:
    """Addition promotes, addition in place does not."""
    fused, stock, _ = fused_and_stock(Block(lambda self, x, z: F.relu(getattr(self.bn(x), add)(z))).float())
    x, z = x_of(dtype=torch.float32), x_of()
    actual, expected = fused(x, z), stock(x, z)
    assert actual.dtype == expected.dtype == (torch.float64 if add == "add" else torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # bn's rounding to float32


def test_residual_that_is_a_number() -> None:
    fused, stock, told = fused_and_stock(Block(lambda self, x, z: F.relu(self.bn(x) + z.shape[0])))
    assert told[0] == ADD_RELU
    assert_same(fused, stock, inputs())


def test_autocast() -> None:
    """A convolution's bfloat16 beside a float32 residual."""
    fused, stock, _ = fused_and_stock(Block(lambda self, x, z: F.relu(self.bn(self.conv(x)) + z)).float())
    x, z = (t.detach().float() for t in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(x, z), stock(x, z)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)  # roundings to bfloat16 of values around 1


def test_deepcopy_is_fused_and_separate() -> None:
    fused, stock = outer()
    twin = copy.deepcopy(fused)
    assert type(twin) is type(fused)
    assert seen_of(twin, x_of()) == BOTH
    stock.load_state_dict(twin.state_dict())
    assert_same(twin, stock, (x_of(),))
    assert not torch.equal(twin.inner[0].bn1.running_mean, fused.inner[0].bn1.running_mean)


@pytest.mark.parametrize("how", ["pickle 0", "pickle 2", "pickle 5", "torch.save"])
def test_files(how: str) -> None:
    fused, _ = outer()
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = pickle.loads(pickle.dumps(fused, int(how[-1])))
    assert type(loaded) is type(fused)
    assert_same(loaded, fused, (x_of(),))
    assert seen_of(loaded, x_of()) == BOTH


def test_state_dict_loads_both_ways() -> None:
    fused, stock = outer()
    fused(x_of())
    stock.load_state_dict(fused.state_dict())
    fused.load_state_dict(stock.state_dict())
    assert_same(fused, stock, (x_of(),))


def test_equal_modules_share_a_class() -> None:
    model = nn.Sequential(Outer(), Outer())
    bn_ext.fuse(model)
    assert type(model[0]) is type(model[1])
    assert type(model[0]) is not Outer
    bn_ext.revert(model)
    assert [type(m) for m in model] == [Outer, Outer]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool) -> None:
    fused, stock = outer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    assert_same(compiled._orig_mod, stock, (x_of(),), modes=(training,))
    for model in (fused, stock):
        model.train(training)
    for _ in range(3):
        x = x_of()
        torch.testing.assert_close(compiled(x), stock(x))
    assert counter.frame_count == 1
    for model in (fused, stock):
        model.act = nn.SiLU()
    torch.testing.assert_close(compiled(x), stock(x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
def test_export(training: bool, strict: bool) -> None:
    fused, stock = (model.train(training) for model in outer())
    x = x_of()
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    with contextlib.nullcontext([]) if strict else calls() as seen:
        program = torch.export.export(fused, (x,), strict=strict, dynamic_shapes=sizes)
    assert strict or seen == BOTH
    for n in (4, 7):
        x = x_of(n, 3, 5, 6)
        torch.testing.assert_close(program.module()(x), stock(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_trace_shows_the_original_graph(training: bool) -> None:
    """Nodes of the same names have the same values, as torchvision's feature extraction asks for them by name."""
    fused, stock, _ = fused_and_stock(Block(lambda self, x, z: F.relu(self.bn(self.conv(x)) + z)))
    traced, expected = (torch.fx.symbolic_trace(model.train(training)) for model in (fused, stock))
    assert [(n.op, n.name, n.target) for n in traced.graph.nodes] == [
        (n.op, n.name, n.target) for n in expected.graph.nodes
    ]
    for arguments in (inputs(), (x_of(), x_of(1, 3, 1, 1))):
        values: list[dict[str, Tensor]] = []
        for model in (traced, expected):
            interpreter = torch.fx.Interpreter(model, garbage_collect_values=False)
            interpreter.run(*arguments)
            values.append({node.name: value for node, value in interpreter.env.items()})
        torch.testing.assert_close(*values)
    assert seen_of(fused, *inputs()) == [("relu", True)]


@pytest.mark.parametrize("training", [True, False])
def test_a_trace_of_a_fused_model_is_scripted(training: bool) -> None:
    fused, stock, _ = fused_and_stock(Block(lambda self, x, z: F.relu(self.bn(self.conv(x)) + z)))
    scripted, x = torch.jit.script(torch.fx.symbolic_trace(fused.train(training))), inputs()
    torch.testing.assert_close(scripted(*x), stock.train(training)(*x))
    torch.testing.assert_close(fused.bn.state_dict(), stock.bn.state_dict())
