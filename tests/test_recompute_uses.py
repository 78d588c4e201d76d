"""bn_ext.recompute together with checkpoints, autocast, compilers, tracing, DDP and itself."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.derivatives import leaf, loss, normal
from helpers.recomputing import Repeats, assert_bit_equal, network, nothing, step
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import bn_ext


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


def test_trace(device: str) -> None:
    """torch.jit.trace within it records the operator."""
    norm = bn_ext.BatchNorm2d(4, activation="relu", device=device).eval()
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    with bn_ext.recompute():
        traced = torch.jit.trace(norm, x, check_trace=False)
    assert "bn_ext::batch_norm" in str(traced.graph)
    torch.testing.assert_close(traced(x + 1), norm(x + 1))


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
