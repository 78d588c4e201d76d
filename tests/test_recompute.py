"""bn_ext.recompute: less is kept for backward, and nothing else changes."""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.derivatives import leaf, loss, normal
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bn_ext


class Repeats(TorchDispatchMode):
    """Counts outputs that are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.bn_ext.batch_norm_repeat.default
        return function(*args, **(kwargs or {}))


class Block(nn.Module):
    """Two convolutions around a residual, as in ResNet."""

    def __init__(self, channels: int, activation: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = bn_ext.BatchNorm2d(channels, activation=activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = bn_ext.BatchNorm2d(channels, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)


def network(activation: Any = "relu", blocks: int = 4, device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *(Block(8, activation) for _ in range(blocks)), nn.Conv2d(8, 2, 3), nn.AdaptiveAvgPool2d(1)
    ).to(device)


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def step(model: nn.Module, x: Tensor, context: Callable[[], Any], **options: Any) -> tuple[list[Tensor], int]:
    """Loss and all gradients of a training step whose forward pass runs in `context`; how many outputs came again."""
    model = copy.deepcopy(model)
    x = leaf(x)
    with context():
        value = loss(model(x).float())
    with Repeats() as repeats:
        gradients = grad(value, (x, *model.parameters()), **options)
    return [value, *gradients, *model.buffers()], repeats.count


def assert_bit_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1), "silu", "gelu"])
def test_bit_equal(
    device: str, activation: Any, dtype: torch.dtype, layout: torch.memory_format, training: bool
) -> None:
    model = network(activation, device=device).to(dtype=dtype, memory_format=layout).train(training)
    x = normal(3, 3, 12, 11, dtype=dtype).contiguous(memory_format=layout)
    expected, none = step(model, x, nothing)
    actual, repeats = step(model, x, bn_ext.recompute)
    assert none == 0
    # The first batch norm of each block; and of the second ones every other one, whose residual is kept: that of the
    # first block is no batch norm's output, and that of the second is the first's, which comes again.
    assert repeats == 4 + 2
    assert_bit_equal(actual, expected)


def kept_bytes(model: nn.Module, x: Tensor, context: Callable[[], Any]) -> int:
    """Bytes of what is kept for backward, each storage once; recipes count with what they hold."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> None:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    with context():
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack, unpack = outer or (lambda t: t, lambda t: t)

        def note(tensor: Tensor) -> Any:
            packed = pack(tensor)
            is_recipe = isinstance(packed, bn_ext._recompute.Recipe)
            for part in packed.tensors() if is_recipe else [getattr(packed, "tensor", packed)]:
                count(part)
            return packed

        with torch.autograd.graph.saved_tensors_hooks(note, unpack):
            y = model(x)
    y.sum().backward()
    return sum(kept.values())


def test_less_is_kept(device: str) -> None:
    model = network(device=device)
    x = normal(2, 3, 18, 18, dtype=torch.float32)
    size = 2 * 8 * 16 * 16 * 4
    parameters = sum(p.nbytes for p in model.parameters())
    saved = 8 * 4 * 8 * 4  # mean, rstd, scale and offset of each batch norm
    masks = 4 * (size // 32 + 4)
    stock = kept_bytes(model, x, nothing)
    # conv1's input, bn1's, conv2's and bn2's of each block, the last convolution's input.
    assert 0 <= stock - (4 * 4 + 1) * size - masks - saved < x.nbytes + 2 * parameters
    assert stock - kept_bytes(model, x, bn_ext.recompute) == (4 + 2) * size


def test_once_however_many_ask(device: str) -> None:
    """Two layers that save the same output share what is computed again; a second backward computes once more."""
    norm = bn_ext.BatchNorm2d(4, activation="silu", device=device)
    convs = nn.ModuleList(nn.Conv2d(4, 4, 1, device=device) for _ in range(3))
    x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
    with bn_ext.recompute():
        y = norm(x * 2)
        value = sum(loss(conv(y)) for conv in convs)
    del y
    with Repeats() as repeats:
        first = grad(value, (x, *convs.parameters()), retain_graph=True)
        assert repeats.count == 1
        second = grad(value, (x, *convs.parameters()))
        assert repeats.count == 2
    assert_bit_equal(list(first), list(second))


def in_place(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    return conv(norm(x * 2).mul_(2))


def view(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    return conv(norm(x * 2)[:, :, 1:])


def of_a_leaf_that_is_not_kept(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    """Where the batch norm is not differentiated, it keeps nothing."""
    with torch.no_grad():
        y = norm(x * 2)
    return conv(y)


def residual_not_kept(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    return conv(norm(x * 2, residual=x + 1))


def inside_checkpoint(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: conv(norm(x * 2)), x, use_reentrant=False)


def other_hooks(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return conv(norm(x * 2))


LEFT_ALONE = [in_place, view, of_a_leaf_that_is_not_kept, residual_not_kept, inside_checkpoint, other_hooks]


@pytest.mark.parametrize("use", LEFT_ALONE)
def test_kept_as_ever(device: str, use: Callable[..., Tensor]) -> None:
    results = []
    for context in (nothing, bn_ext.recompute):
        torch.manual_seed(0)
        norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
        conv = nn.Conv2d(4, 4, 1, device=device)
        x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
        with context():
            value = loss(use(norm, conv, x))
        with Repeats() as repeats:
            results.append(grad(value, (x, *conv.parameters()), allow_unused=True))
        assert repeats.count == 0
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_changed_in_place_after_it_was_saved(device: str) -> None:
    """What was saved is what comes back: torch would refuse."""
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    conv = nn.Conv2d(4, 4, 1, device=device)
    x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
    expected = grad(loss(conv(norm(x * 2))), (x, *conv.parameters()))
    with bn_ext.recompute():
        y = norm(x * 2)
        value = loss(conv(y))
        with torch.no_grad():
            y.zero_()
    assert_bit_equal(list(grad(value, (x, *conv.parameters()))), list(expected))


@pytest.mark.parametrize("changed", ["input", "residual"])
def test_sources_may_not_change(device: str, changed: str) -> None:
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    convs = [nn.Conv2d(4, 4, 1, device=device) for _ in range(2)]
    x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
    with bn_ext.recompute():
        z = x * 3
        kept = convs[0](z)
        a = x * 2
        value = loss(convs[1](norm(a, z))) + kept.sum() * 0
    with torch.no_grad():
        (a if changed == "input" else z).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(value, [*convs[1].parameters()])


def test_another_tensor_at_the_same_place(device: str) -> None:
    """An output that has gone, and whose memory is used again, is not taken for what lies there now."""
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
    reused = 0
    w = torch.ones((), device=device, requires_grad=True)
    with bn_ext.recompute():
        for _ in range(50):
            y = norm(x)
            place = y.data_ptr()
            del y
            others = [x.detach() + i for i in range(8)]
            reused += place in [other.data_ptr() for other in others]
            (gradient,) = grad(sum((other * w).sum() for other in others), w)
            torch.testing.assert_close(gradient, sum(other.sum() for other in others))
    assert reused > 0


@pytest.mark.parametrize("create_graph", [True, False])
def test_double_backward(device: str, create_graph: bool) -> None:
    results = []
    for context in (nothing, bn_ext.recompute):
        torch.manual_seed(1)
        model = network("silu", blocks=1, device=device).double()
        x = leaf(normal(2, 3, 8, 8))
        with context():
            value = loss(model(x))
        gradients = grad(value, (x, *model.parameters()), create_graph=create_graph)
        if create_graph:
            gradients = grad(sum(g.square().sum() for g in gradients), (x, *model.parameters()))
        results.append(list(gradients))
    assert_bit_equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    model = network("relu", device=device)
    x = normal(2, 3, 12, 12, dtype=torch.float32)

    @contextlib.contextmanager
    def autocast(context: Callable[[], Any]) -> Iterator[None]:
        with torch.autocast(device, dtype), context():
            yield

    expected, _ = step(model, x, lambda: autocast(nothing))
    actual, repeats = step(model, x, lambda: autocast(bn_ext.recompute))
    assert repeats == 6
    assert_bit_equal(actual, expected)


def test_nested_and_again(device: str) -> None:
    model, x = network(device=device), normal(2, 3, 12, 12, dtype=torch.float32)
    context = bn_ext.recompute()

    @contextlib.contextmanager
    def nested() -> Iterator[None]:
        with context, context:
            yield

    expected, _ = step(model, x, nothing)
    for _ in range(2):
        actual, repeats = step(model, x, nested)
        assert repeats == 6
        assert_bit_equal(actual, expected)
    assert step(model, x, nothing)[1] == 0


def test_left_by_an_error(device: str) -> None:
    with pytest.raises(ZeroDivisionError), bn_ext.recompute():
        raise ZeroDivisionError
    model, x = network(device=device), normal(2, 3, 12, 12, dtype=torch.float32)
    assert step(model, x, nothing)[1] == 0


def test_checkpoint_around(device: str) -> None:
    """A recomputed part may itself recompute."""
    model, x = network(device=device), normal(2, 3, 12, 12, dtype=torch.float32)

    def inside(x: Tensor) -> Tensor:
        with bn_ext.recompute():
            return model(x)

    x = leaf(x)
    expected = grad(loss(model(x)), (x, *model.parameters()))
    actual = grad(loss(checkpoint(inside, x, use_reentrant=False)), (x, *model.parameters()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compiled_code_is_left_alone(device: str, where: str) -> None:
    torch._dynamo.reset()
    model, x = network(blocks=1, device=device), leaf(normal(2, 3, 12, 12, dtype=torch.float32))

    def inside(x: Tensor) -> Tensor:
        with bn_ext.recompute():
            return model(x)

    expected = grad(loss(model(x)), (x, *model.parameters()))
    if where == "inside":
        value = loss(torch.compile(inside, backend="aot_eager")(x))
    else:
        with bn_ext.recompute():
            value = loss(torch.compile(model, backend="aot_eager")(x))
    with Repeats() as repeats:
        torch.testing.assert_close(grad(value, (x, *model.parameters())), expected)
    assert repeats.count == 0


def test_memory_is_given_back(device: str) -> None:
    """After backward nothing of the size of an output is alive but what it returned."""
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    conv = nn.Conv2d(4, 4, 1, device=device)
    x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
    with bn_ext.recompute():
        y = norm(x * 2)
        value = loss(conv(y))
    reference = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
    del y
    assert reference.expired()
    value.backward()
    assert x.grad is not None


def test_trace(device: str) -> None:
    """torch.jit.trace within it records the operator."""
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device).eval()
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    with bn_ext.recompute():
        traced = torch.jit.trace(norm, x, check_trace=False)
    assert "bn_ext::batch_norm" in str(traced.graph)
    torch.testing.assert_close(traced(x + 1), norm(x + 1))


def test_hooks_may_change_the_layout(device: str) -> None:
    """As torch's own save_on_cpu(pin_memory=True): the bits of a mask lie in the order that the input had."""
    for layout in (torch.channels_last, torch.contiguous_format):
        x, z, dy = (normal(2, 6, 5, 7, dtype=torch.float32).contiguous(memory_format=layout) for _ in range(3))
        for activation in ("relu", ("leaky_relu", 0.2), "silu"):
            results = []
            for pack in (lambda t: t, lambda t: t.contiguous()):
                leaves = leaf(x), leaf(z)
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    y = bn_ext.batch_norm(
                        leaves[0], None, None, training=True, activation=activation, residual=leaves[1]
                    )
                results.append(grad(y, leaves, dy))
            torch.testing.assert_close(*results)


@pytest.mark.parametrize("keeps_its_output", [torch.relu, torch.sigmoid, lambda x: x.log_softmax(1)])
def test_graphs_without_backward_are_freed(device: str, keeps_its_output: Callable[[Tensor], Tensor]) -> None:
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
    with bn_ext.recompute():
        y = keeps_its_output(norm(x * 2))
    reference = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
    del y
    assert reference.expired()


def test_changes_in_place_are_noticed_as_ever(device: str) -> None:
    """Also those of tensors that are no batch norm's."""
    w = torch.ones(3, device=device, requires_grad=True)
    with bn_ext.recompute():
        y = w.exp()
        value = (y * 3).sum()
        y.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* is at version 1; expected version 0"):
        value.backward()


def test_inside_a_checkpoint_that_is_in_charge(device: str) -> None:
    """Hooks within a checkpoint's would switch it off: then nothing would be freed."""
    model, x = network(device=device), leaf(normal(2, 3, 12, 12, dtype=torch.float32))

    def inside(x: Tensor) -> Tensor:
        with bn_ext.recompute():
            return model(x)

    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    loss(checkpoint(inside, x, use_reentrant=False)).backward()
    assert len(calls) == 2


def test_where_hooks_are_disabled(device: str) -> None:
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), bn_ext.recompute():
        norm(torch.randn(2, 4, 5, 5, device=device))
    assert bn_ext._recompute.current() is None
    torch.func.grad(lambda x: inside_recompute(norm, x).sum())(torch.randn(2, 4, 5, 5, device=device))
    assert bn_ext._recompute.current() is None


def inside_recompute(norm: nn.Module, x: Tensor) -> Tensor:
    with bn_ext.recompute():
        return norm.eval()(x)


def test_partial_backward_holds_nothing(device: str) -> None:
    """An output that only some ask for is not held until the graph is freed."""
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    convs = [nn.Conv2d(4, 4, 1, device=device) for _ in range(2)]
    x = leaf(normal(2, 4, 5, 5, dtype=torch.float32))
    with bn_ext.recompute():
        y = norm(x * 2)
        values = [loss(conv(y)) for conv in convs]
    del y
    recipes = [r for r in gc.get_objects() if type(r) is bn_ext._recompute.Recipe and r.savers == 2]
    (gradient,) = grad(values[0], convs[0].weight, retain_graph=True)
    assert len(recipes) == 1
    assert recipes[0]._output is None
    assert torch.equal(grad(values[0], convs[0].weight)[0], gradient)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """With one process: its hooks and buckets are those of many."""
    model, x = network(), normal(2, 3, 12, 12, dtype=torch.float32)
    expected = grad(loss(model(x)), [*model.parameters()])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(bn_ext.fuse(copy.deepcopy(model), recompute=True))
        with Repeats() as repeats:
            loss(parallel(x)).backward()
        assert repeats.count == 6
        assert_bit_equal([p.grad for p in parallel.parameters()], list(expected))
    finally:
        torch.distributed.destroy_process_group()
