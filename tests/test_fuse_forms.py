"""Fused modules: when the generated code runs and when the original forward, copies, files and compilers."""

import contextlib
import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import Block, assert_same, calls, fused_and_stock, inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import bn_ext

RELU, ADD_RELU = "batch_norm + relu", "batch_norm + add + relu"
FUSED, SEPARATE = [("relu", False)], [(None, False)]


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


BOTH = [("relu", False), (("leaky_relu", 0.1), True)]
INNER_ONLY = [("relu", False), (None, False)]


def outer() -> tuple[nn.Module, nn.Module]:
    fused, stock, told = fused_and_stock(Outer().double())
    assert told == [RELU, "batch_norm + add + leaky_relu(negative_slope=0.1)"]
    assert seen_of(fused, x_of()) == BOTH
    stock.load_state_dict(fused.state_dict())
    return fused, stock


def test_across_modules() -> None:
    fused, stock = outer()
    assert_same(fused, stock, (x_of().requires_grad_(),))
    assert seen_of(fused.inner, x_of()) == INNER_ONLY  # by itself it does what it did
    assert_same(fused.inner, stock.inner, (x_of().requires_grad_(),))


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], list[tuple[Any, bool]]]] = {
    "setting of the parent": (lambda m: setattr(m, "power", 2), INNER_ONLY),
    "setting of the child": (lambda m: setattr(m.inner[0], "scale", 2.0), [(None, False)] * 2),
    "setting of the activation": (lambda m: setattr(m.act, "negative_slope", 0.5), INNER_ONLY),
    "another activation": (lambda m: setattr(m, "act", nn.SiLU()), INNER_ONLY),
    "a subclass of the activation": (lambda m: setattr(m.act, "__class__", Scaled), INNER_ONLY),
    "another end": (lambda m: setattr(m.inner[0], "end", nn.Sigmoid()), [(None, False)] * 2),
    "one more child": (lambda m: m.inner.append(nn.Tanh()), INNER_ONLY),
    "a hook on the child": (lambda m: m.inner[0].register_forward_hook(lambda m, i, o: o * 2), INNER_ONLY),
    "a hook on the sequence": (lambda m: m.inner.register_forward_hook(lambda m, i, o: o * 2), INNER_ONLY),
    "a hook on the parent": (lambda m: m.register_forward_hook(lambda m, i, o: o * 2), BOTH),
    "a forward of the child's own": (lambda m: setattr(m.inner[0], "forward", torch.exp), []),
    "another mode of the child": (lambda m: m.inner[0].eval(), INNER_ONLY),
    "an activation of the batch norm": (lambda m: setattr(m.inner[0].bn2, "activation", "silu"), None),
    "a compiled child": (lambda m: m.inner[0].compile(backend="eager"), INNER_ONLY),
    "momentum": (lambda m: setattr(m.inner[0].bn2, "momentum", 0.3), BOTH),
    "stock batch norms": (lambda m: bn_ext.revert(m.inner[0].bn2), SEPARATE),
    "no batch norm": (lambda m: setattr(m.inner[0], "bn2", nn.Identity()), SEPARATE),
    "folding": (
        lambda m: m.eval() and setattr(m.inner[0], "bn1", nn.Identity()),
        [(None, False)],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_fusing_are_heeded(name: str) -> None:
    fused, stock = outer()
    change, expected = CHANGES[name]
    if name == "another mode of the child":  # only matters to forms that differ
        for model in (fused, stock):
            model.inner[0].dropout = 0.5
        bn_ext.fuse(fused)
    for model in (fused, stock):
        change(model)
    x = x_of()
    if name == "an activation of the batch norm":
        bn_ext.convert(stock)
        stock.inner[0].bn2.activation = "silu"
        expected = [("relu", False), (None, False)]
    elif name in ("setting of the child", "another end"):
        expected = INNER_ONLY if name == "another end" else [(None, False)] * 2
    torch.manual_seed(2)
    with calls() as seen:
        actual = fused(x)
    torch.manual_seed(2)
    torch.testing.assert_close(actual, stock(x))
    if name != "another end":
        assert seen == expected


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm])
def test_conversions_by_torch_keep_the_activations(convert: Callable[[nn.Module], nn.Module]) -> None:
    fused, stock = outer()
    fused, stock, x = convert(fused).eval(), convert(stock).eval(), x_of()
    assert type(fused.inner[0].bn1) is nn.SyncBatchNorm
    torch.testing.assert_close(fused(x), stock(x))


def test_arguments_of_other_kinds_run_the_original() -> None:
    fused, stock = outer()
    x = x_of()
    for arguments, keywords in [
        ((x, 2.0), {}),
        ((x, x), {}),
        ((x,), {"offset": 3}),
        ((), {"x": x}),
        ((x,), {"scale": x}),
    ]:
        torch.testing.assert_close(fused(*arguments, **keywords), stock(*arguments, **keywords))
        assert seen_of(fused, *arguments, **keywords) == INNER_ONLY
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fused()


def test_global_hooks_run() -> None:
    fused, _ = outer()
    kinds = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: kinds.append(type(m)))
    try:
        assert seen_of(fused, x_of()) == [(None, False)] * 2
    finally:
        handle.remove()
    assert nn.LeakyReLU in kinds


def test_two_forms() -> None:
    """Dropout between, in training only; the modules that the code goes past must be in the mode of the whole."""

    def body(self: Small, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.act(F.dropout(y, 0.5) if self.training else y)

    fused, stock, told = fused_and_stock(Small(body).double())
    assert told == ["batch_norm in training, batch_norm + relu in evaluation"]
    assert seen_of(fused.train(), x_of()) == SEPARATE
    assert seen_of(fused.eval(), x_of()) == FUSED
    stock.load_state_dict(fused.state_dict())
    assert_same(fused, stock, (x_of(),), modes=(True, False))


UNFAITHFUL: dict[str, tuple[Callable[..., Any], str]] = {
    "value": (lambda self, x: self.act(self.bn(x)) if x.sum() > 0 else x, "its forward branches or loops on values"),
    "shape": (lambda self, x: self.act(self.bn(x)) if x.dim() == 4 else x, "its forward branches or loops on values"),
    "loop": (lambda self, x: [self.act(self.bn(t[None])) for t in x][-1], "its forward branches or loops on values"),
    "attribute": (lambda self, x: (setattr(self, "last", x), self.act(self.bn(x)))[1], "its forward sets last"),
    "counter": (
        lambda self, x: (setattr(self, "count", getattr(self, "count", 0) + 1), self.act(self.bn(x)))[1],
        "its forward sets count",
    ),
    "list": (lambda self, x: (LIST.append(1), self.kept.append(x), self.act(self.bn(x)))[2], "its forward sets kept"),
    "random": (
        lambda self, x: self.act(self.bn(x)) if random.random() < 2 else x,
        "its forward draws random numbers",
    ),
    "numpy random": (
        lambda self, x: self.act(self.bn(x)) if np.random.rand() < 2 else x,
        "its forward draws random numbers",
    ),
    "torch random": (
        lambda self, x: self.act(self.bn(x)) * (torch.rand(()) < 2),
        "its forward computes with other tensors than its input (aten.rand.default)",
    ),
    "constant": (
        lambda self, x: self.act(self.bn(x)) + torch.ones(()),
        "its forward computes with other tensors than its input (aten.ones.default)",
    ),
    "tensor from elsewhere": (
        lambda self, x: self.act(self.bn(x)) + ELSEWHERE,
        "its forward uses tensors from elsewhere",
    ),
    "type": (
        lambda self, x: self.act(self.bn(x)) if isinstance(x.chunk(2), tuple) else x,
        "its forward asks for the type of a value",
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


CONTEXT = "its forward sets or asks for a context (grad mode, autocast, checkpoint, ...)"
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
    states = torch.get_rng_state(), random.getstate()
    attributes = {name: value for name, value in vars(model).items() if name != "training"}
    _, report = bn_ext.fuse(model.eval(), report=True)
    assert [row.reason for row in report.rows] == [reason]
    assert type(model) is Small
    assert not model.training
    assert {name: value for name, value in vars(model).items() if name != "training"} == attributes
    assert model.kept == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert seen_of(model, x_of(dtype=torch.float32))[0] == (None, False)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_are_left_alone(use_reentrant: bool) -> None:
    def body(self: Small, x: Tensor) -> Any:
        return checkpoint(lambda x: self.act(self.bn(x)), x, use_reentrant=use_reentrant)

    fused, stock, [reason] = fused_and_stock(Small(body).double())
    assert reason.startswith(("its forward", "torch.fx cannot trace it"))
    assert_same(fused, stock, (x_of().requires_grad_(),))


def test_children_of_what_cannot_be_traced_are_fused() -> None:
    def body(self: Small, x: Tensor) -> Any:
        return self.inner(x) if x.shape[0] > 1 else x

    model = Small(body)
    model.inner = Small()
    fused, _, told = fused_and_stock(model)
    assert told == ["its forward branches or loops on values", RELU]
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
    assert reason == "its forward asks for the type of a value"
    assert_same(fused, stock, (x_of(),))
    model = Small(lambda self, x: self.inner([x]))
    model.bn, model.inner = None, Takes()
    fused, stock, told = fused_and_stock(model.double())
    assert told == [RELU]  # where the answer is known
    assert_same(fused, stock, (x_of(),))
    assert seen_of(fused, x_of()) == FUSED


def test_autograd_functions_are_left_alone() -> None:
    fused, stock, [reason] = fused_and_stock(Small(lambda self, x: Square.apply(self.act(self.bn(x)))).double())
    assert reason == "its forward asks for the type of a value"
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
    traced = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(traced(x_of(4, 3, 5, 5), x_of()).shape, torch.Size([4, 3, 5, 6]))
    fused, stock, told = fused_and_stock(Padding(norm_and_relu))
    assert told[0] == "it is called more than once"
    assert_same(fused, stock, inputs())


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
    torch.testing.assert_close(actual, expected)


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
def test_symbolic_trace(training: bool) -> None:
    fused, stock, _ = fused_and_stock(Block(lambda self, x, z: F.relu(self.bn(self.conv(x)) + z)))
    traced = torch.fx.symbolic_trace(fused.train(training))
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x", "z"]
    stock.train(training)
    for arguments in (inputs(), (x_of(), x_of(1, 3, 1, 1))):
        torch.testing.assert_close(traced(*arguments), stock(*arguments))
