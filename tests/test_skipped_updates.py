"""skip_nonfinite and skip_recomputed: training forward passes that leave running statistics alone, if asked to."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers.derivatives import leaf, loss, normal
from torch import Tensor, func, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import bn_ext

# One rounding to the dtype of the statistics, and float32 sums.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
BAD = [float("inf"), float("-inf"), float("nan")]


def batch(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    return normal(4, 3, 5, 6, dtype=dtype, layout=layout) + 1


def poisoned(x: Tensor, bad: float) -> Tensor:
    """With one bad value in the middle channel."""
    x = x.clone()
    x[2, 1, 3, 4] = bad
    return x


def statistics(module: nn.Module) -> list[Tensor]:
    return [module.running_mean.clone(), module.running_var.clone()]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_channel_with_a_bad_value(
    device: str, dtype: torch.dtype, layout: str, momentum: float | None, bad: float
) -> None:
    """It keeps its statistics; the others, the output and the count are as they would be."""
    ours = bn_ext.BatchNorm2d(3, momentum=momentum, skip_nonfinite=True, device=device, dtype=dtype)
    stock = nn.BatchNorm2d(3, momentum=momentum, device=device, dtype=dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "equal_nan": True}
    first, second = batch(dtype, layout), poisoned(batch(dtype, layout), bad)
    ours(first), stock(first)
    before = statistics(ours)
    torch.testing.assert_close(ours(second), stock(second), **tolerance)
    for kept, new, theirs in zip(before, statistics(ours), statistics(stock), strict=True):
        assert torch.equal(new[1], kept[1])
        assert not theirs[1].isfinite()
        torch.testing.assert_close(new[::2], theirs[::2], **tolerance)
        assert not torch.equal(new[::2], kept[::2])
    assert ours.num_batches_tracked == 2


@pytest.mark.parametrize("bad", BAD)
def test_off_unless_asked_for(device: str, bad: float) -> None:
    ours, stock = (library.BatchNorm2d(3, device=device) for library in (bn_ext, nn))
    for x in (poisoned(batch(), bad), batch()):
        ours(x), stock(x)
        for mine, theirs in zip(statistics(ours), statistics(stock), strict=True):
            assert mine.isfinite().tolist() == theirs.isfinite().tolist() == [True, False, True]
            torch.testing.assert_close(mine[::2], theirs[::2])


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1e3), (torch.bfloat16, 1e20), (torch.float32, 1e20)])
def test_statistics_that_their_dtype_cannot_hold(device: str, dtype: torch.dtype, factor: float) -> None:
    ours = bn_ext.BatchNorm2d(3, momentum=1.0, skip_nonfinite=True, device=device, dtype=dtype)
    x = batch(dtype)
    x[:, 1] *= factor
    before = statistics(ours)
    ours(x)
    for kept, new in zip(before, statistics(ours), strict=True):
        assert torch.equal(new[1], kept[1])
        assert not torch.equal(new[::2], kept[::2])


def in_functional_call(module: nn.Module, x: Tensor) -> Any:
    """Gradients by torch.func, with buffers given: composed from ATen."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    f = func.grad(lambda p, b: (loss(func.functional_call(module, (p, b), (x,))), b), has_aux=True)
    return f(parameters, buffers)


def in_an_ensemble(module: nn.Module, x: Tensor) -> Any:
    parameters, buffers = func.stack_module_state([module, module])
    xs = torch.stack([x, x.nan_to_num(0, 0, 0)])
    y = func.vmap(lambda p, b, x: func.functional_call(module, (p, b), (x,)))(parameters, buffers, xs)
    return y, {name: buffer[0] for name, buffer in buffers.items()}


def compiled(module: nn.Module, x: Tensor) -> Any:
    torch._dynamo.reset()
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(leaf(x))
    loss(y).backward()
    return y.detach(), dict(module.named_buffers())


def exported(module: nn.Module, x: Tensor) -> Any:
    program = torch.export.export(module, (x,)).run_decompositions().module()
    return program(x), dict(program.named_buffers())


@pytest.mark.parametrize("run", [in_functional_call, in_an_ensemble, compiled, exported])
def test_bad_value_under_transforms(device: str, run: Any) -> None:
    ours = bn_ext.BatchNorm2d(3, skip_nonfinite=True, device=device)
    x = poisoned(batch(), float("nan"))
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    expected = copy.deepcopy(ours)
    expected(x)
    after = run(ours, x)[1]
    torch.testing.assert_close({name: after[name] for name in before}, dict(expected.named_buffers()))
    for name in ("running_mean", "running_var"):
        assert torch.equal(after[name][1], before[name][1])


def block(library: Any, device: str, **options: Any) -> nn.Module:
    """Two batch norms, one of them used twice by SEVERAL_TIMES below."""
    torch.manual_seed(1)
    convs = [nn.Conv2d(3, 3, 1, device=device) for _ in range(2)]
    norms = [library.BatchNorm2d(3, device=device, **options) for _ in range(2)]
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.ReLU())


CHECKPOINTS: dict[str, Any] = {
    "plain": lambda model, x: model(x),
    "not_reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "nested": lambda model, x: checkpoint(lambda x: checkpoint(model, x, use_reentrant=False), x, use_reentrant=False),
    "compiled_inside": lambda model, x: checkpoint(
        torch.compile(model, backend="aot_eager", fullgraph=True), x, use_reentrant=False
    ),
    "compiled_around": lambda model, x: torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager"
    )(x),
}


def steps(model: nn.Module, run: Any) -> Any:
    """Gradients of two training steps, and the statistics after them."""
    torch._dynamo.reset()
    torch.manual_seed(2)
    gradients = []
    for _ in range(2):
        x = leaf(batch())
        loss(run(model, x)).backward()
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in model.parameters())])
    return gradients, dict(model.named_buffers())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpointed_batches_count_once(device: str, name: str, momentum: float | None) -> None:
    """Pytorch#96136."""
    expected = steps(block(nn, device, momentum=momentum), CHECKPOINTS["plain"])
    actual = steps(block(bn_ext, device, momentum=momentum, skip_recomputed=True), CHECKPOINTS[name])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual[1]["1.num_batches_tracked"] == 2


@pytest.mark.parametrize("name", ["not_reentrant", "reentrant"])
def test_checkpointed_batches_count_twice_as_torch_counts_them(device: str, name: str) -> None:
    expected, actual = (steps(block(library, device), CHECKPOINTS[name]) for library in (nn, bn_ext))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual[1]["1.num_batches_tracked"] == 4


def test_count_changed_in_place_once(device: str) -> None:
    """As its version counter tells."""
    norm = bn_ext.BatchNorm2d(3, skip_recomputed=True, device=device)
    before = norm.num_batches_tracked._version
    checkpoint(norm, leaf(batch()), use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked._version == before + 1


def test_forward_mode_within_backward(device: str) -> None:
    """The composed form skips too."""
    norm = bn_ext.BatchNorm2d(3, skip_recomputed=True, device=device)
    x, tangents = leaf(batch()), []

    def tangent() -> None:
        with forward_ad.dual_level():
            y = norm(forward_ad.make_dual(x.detach(), x.detach().cos()))
            tangents.append(forward_ad.unpack_dual(y).tangent)

    tangent()
    assert norm.num_batches_tracked == 1
    before = statistics(norm)
    y = x * 2
    y.register_hook(lambda _: tangent())
    y.sum().backward()
    torch.testing.assert_close(*tangents)
    assert norm.num_batches_tracked == 1
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(norm), strict=True))


def test_options_of_a_model(device: str) -> None:
    """convert() sets them where they are given, fuse() and copies keep them, revert() removes them."""
    model = bn_ext.convert(block(nn, device), skip_nonfinite=True)
    norm = model[1]
    assert (norm.skip_nonfinite, norm.skip_recomputed) == (True, False)
    bn_ext.convert(model, skip_recomputed=True)
    assert (norm.skip_nonfinite, norm.skip_recomputed) == (True, True)
    assert repr(norm).endswith("track_running_stats=True, skip_nonfinite=True, skip_recomputed=True)")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), bn_ext.fuse(model)):
        steps(twin, CHECKPOINTS["not_reentrant"])
        assert twin[1].num_batches_tracked == 2
        twin(poisoned(batch(), float("inf")))
        assert twin[1].running_var.isfinite().all()
    bn_ext.convert(model, skip_nonfinite=False)
    assert (norm.skip_nonfinite, norm.skip_recomputed) == (False, True)
    assert vars(bn_ext.revert(block(bn_ext, device, skip_nonfinite=True))[1]).keys() == vars(nn.BatchNorm2d(3)).keys()


@pytest.mark.parametrize("name", ["skip_nonfinite", "skip_recomputed"])
def test_option_that_is_no_bool(device: str, name: str) -> None:
    x = torch.randn(2, 3, 4, 4, device=device)
    with pytest.raises(TypeError, match=rf"batch_norm\(\): argument '{name}' must be bool, not int"):
        bn_ext.batch_norm(x, None, None, training=True, **{name: 1})
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
        bn_ext.BatchNorm2d(3, **{name: 1})
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'yes'"):
        bn_ext.convert(nn.BatchNorm2d(3), **{name: "yes"})
