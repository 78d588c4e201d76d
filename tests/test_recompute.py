"""bn_ext.recompute: less is kept for backward, and nothing else changes."""

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.derivatives import leaf, loss, normal
from helpers.recomputing import Repeats, assert_bit_equal, network, nothing, step
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import bn_ext


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1), "silu", "gelu", "gelu_tanh", "mish"])
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


@pytest.mark.slow
def test_another_tensor_at_the_same_place(device: str) -> None:
    """An output that has gone, and whose memory is used again, is not taken for what lies there now."""
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device)
    w = torch.ones((), device=device, requires_grad=True)
    reused = 0
    # Which sizes come back at once is the allocator's business: one of these does.
    for width, _ in itertools.product((5, 16, 50, 160, 500), range(20)):
        x = leaf(normal(2, 4, width, width, dtype=torch.float32))
        with bn_ext.recompute():
            y = norm(x)
            place = y.data_ptr()
            del y
            others = [x.detach() + i for i in range(8)]
            reused += place in [other.data_ptr() for other in others]
            (gradient,) = grad(sum((other * w).sum() for other in others), w)
        torch.testing.assert_close(gradient, sum(other.sum() for other in others))
    if not reused:
        pytest.skip("needs an allocator that uses memory again")


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


def test_repeat_with_saved_that_is_not_contiguous(device: str) -> None:
    """As any tensor given to the operator may be: it is copied, and the copy lives until it was read."""
    x = torch.randn(8, 300, 5, 5, device=device)
    y = bn_ext.batch_norm(x, None, None, training=True)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    rstd = (var + 1e-5).rsqrt()
    saved = torch.stack([mean, rstd, rstd, torch.zeros_like(mean)]).t().contiguous().t()
    assert not saved.is_contiguous()
    for _ in range(5):
        repeated = torch.ops.bn_ext.batch_norm_repeat(x, saved, None, None, 0.0)
        torch.testing.assert_close(repeated, y, rtol=1e-5, atol=1e-5)
