"""One tensor on another device than the others, as on meta: torch.nn's result or one clear error.

The dispatcher runs the kernel of the meta device as soon as one argument lies there, and that one fills nothing in.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

import bn_ext

OPS = torch.ops.bn_ext
X = torch.randn(4, 3, 2, 5)
DY = torch.randn(4, 3, 2, 5)
META = torch.device("meta")


def with_count_on_meta(library: Any, **options: Any) -> nn.Module:
    """A model made on meta and loaded from a checkpoint that has no count."""
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    with META:
        module = library.BatchNorm2d(3, **options)
    module.load_state_dict(state, strict=False, assign=True)
    assert module.num_batches_tracked.is_meta
    return module


def steps(module: nn.Module, call: Any) -> list[torch.Tensor]:
    """Outputs, gradients and statistics of two training steps and one in evaluation."""
    results = []
    for training in (True, True, False):
        module.train(training)
        x = X.clone().requires_grad_()
        y = call(x)
        results += [y, *torch.autograd.grad(y, (x, *module.parameters()), DY)]
    return [*results, module.running_mean, module.running_var]


CALLS = {
    "module": lambda module: module,
    "compiled": lambda module: torch.compile(module, fullgraph=True, backend="aot_eager"),
    "functional_call": lambda module: lambda x: functional_call(module, {}, (x,)),
}


@pytest.mark.parametrize("momentum", [0.1, 0.7])
@pytest.mark.parametrize("way", ["module", "compiled", "functional_call"])
def test_count_on_meta_is_left_alone(way: str, momentum: float) -> None:
    ours, stock = (with_count_on_meta(library, momentum=momentum) for library in (bn_ext, nn))
    actual, expected = (steps(module, CALLS[way](module)) for module in (ours, stock))
    torch.testing.assert_close(actual, expected)
    assert ours.num_batches_tracked.is_meta


def test_count_on_meta_of_a_scripted_module() -> None:
    ours, stock = (with_count_on_meta(library) for library in (bn_ext, nn))
    actual, expected = (steps(module, torch.jit.script(module)) for module in (ours, stock))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [True, False])
def test_count_on_meta_of_the_function(training: bool) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    count = torch.tensor(0, device=META)
    y = bn_ext.batch_norm(X, mean, var, training=training, num_batches_tracked=count)
    expected_mean, expected_var = torch.zeros(3), torch.ones(3)
    expected = F.batch_norm(X, expected_mean, expected_var, training=training)
    torch.testing.assert_close((y, mean, var), (expected, expected_mean, expected_var))


def test_momentum_none_cannot_read_a_count_on_meta() -> None:
    ours, stock = (with_count_on_meta(library, momentum=None) for library in (bn_ext, nn))
    words = []
    for module in (stock, ours):
        with pytest.raises(RuntimeError, match="cannot be called on meta tensors") as info:
            module(X)
        words.append(str(info.value).splitlines()[0])
    assert words[0] == words[1]
    assert torch.equal(ours.running_mean, torch.zeros(3))
    assert torch.equal(ours.running_var, torch.ones(3))
    torch.testing.assert_close(ours.eval()(X), stock.eval()(X))


def test_skipped_pass_leaves_count_and_statistics_alone() -> None:
    module = with_count_on_meta(bn_ext, skip_recomputed=True)
    y = torch.utils.checkpoint.checkpoint(module, X.clone().requires_grad_(), use_reentrant=False)
    once = module.running_mean.clone()
    y.sum().backward()
    assert once.abs().min() > 0
    assert torch.equal(module.running_mean, once)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_real_count_of_a_model_on_meta_is_raised(momentum: float | None) -> None:
    for library in (nn, bn_ext):
        module = library.BatchNorm2d(3, momentum=momentum, device=META)
        module.num_batches_tracked = torch.tensor(4)
        y = module(X.to(META))
        assert y.is_meta
        assert y.shape == X.shape
        assert module.num_batches_tracked == 5


ARGUMENTS = {
    "input": X,
    "weight": torch.rand(3),
    "bias": torch.rand(3),
    "running_mean": torch.rand(3),
    "running_var": torch.rand(3),
    "num_batches_tracked": torch.tensor(3),
    "residual": DY,
}
ONE_AWAY = [name for name in ARGUMENTS if name != "num_batches_tracked"]


def arguments(away: str) -> dict[str, Any]:
    return {name: value.to(META if name == away else "cpu", copy=True) for name, value in ARGUMENTS.items()}


def unchanged(given: dict[str, Any]) -> None:
    """Nothing of it was written."""
    for name, value in given.items():
        assert value.is_meta or torch.equal(value, ARGUMENTS[name]), name


REFUSED = "Expected all tensors to be on the same device, but input is on (cpu|meta) and .* is on (cpu|meta)"


@pytest.mark.parametrize("away", ONE_AWAY)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [bn_ext.batch_norm, OPS.batch_norm], ids=["function", "operator"])
def test_one_argument_elsewhere_is_refused(call: Any, training: bool, momentum: float | None, away: str) -> None:
    given = arguments(away)
    options = {"activation": "relu", "training": training, "momentum": momentum}
    with pytest.raises(RuntimeError, match=REFUSED):
        call(**given, **options)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.compile(call, backend="eager")(**given, **options)
    unchanged(given)


@pytest.mark.parametrize("away", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_one_tensor_of_a_module_elsewhere_is_refused(training: bool, momentum: float | None, away: str) -> None:
    for library in (nn, bn_ext):
        module = library.BatchNorm2d(3, momentum=momentum).train(training)
        tensors = module._parameters if away in module._parameters else module._buffers
        tensors[away] = tensors[away].to(META)
        with pytest.raises(RuntimeError, match=REFUSED if library is bn_ext else None):
            module(X)
        if library is bn_ext:
            assert module.num_batches_tracked == 0
            assert away == "running_mean" or torch.equal(module.running_mean, torch.zeros(3))


def inner_call(name: str, given: dict[str, Any]) -> Any:
    """An inner operator with these tensors."""
    options: dict[str, Any] = {"activation": "relu", "activation_parameter": 0.0}
    if name in ("batch_norm_forward", "batch_norm_inference"):
        options |= {"eps": 1e-5, "mask_format": torch.contiguous_format}
    if name == "batch_norm_forward":
        options["momentum"] = 0.1
    if name == "batch_norm_backward":
        given = given | {"dy": given["grad_output"], "residual": None}
        del given["grad_output"]
        options |= {"mask_format": torch.contiguous_format, "training": True, "output_mask": [True] * 4}
    return getattr(OPS, name)(**given, **options)


def inner_arguments(name: str) -> dict[str, torch.Tensor]:
    """All tensors that an inner operator takes."""
    given = {key: value.clone() for key, value in ARGUMENTS.items()}
    count = given.pop("num_batches_tracked")
    if name == "batch_norm_inference":
        return given
    given["num_batches_tracked"] = count
    if name == "batch_norm_forward":
        return given
    _, saved, mask = inner_call("batch_norm_forward", given)
    if name == "batch_norm_repeat":
        return {"input": X, "saved": saved, "residual": DY.clone()}
    return {"grad_output": DY, "input": X, "weight": given["weight"], "saved": saved, "mask": mask}


INNER = {
    "batch_norm_forward": list(ARGUMENTS),
    "batch_norm_inference": ONE_AWAY,
    "batch_norm_repeat": ["input", "saved", "residual"],
    "batch_norm_backward": ["grad_output", "input", "weight", "saved", "mask"],
}


@pytest.mark.parametrize(("name", "away"), [(name, away) for name, tensors in INNER.items() for away in tensors])
@pytest.mark.parametrize("fake", [False, True])
def test_inner_operators_refuse_one_argument_elsewhere(name: str, away: str, fake: bool) -> None:
    given = inner_arguments(name)
    inner_call(name, given)  # is fine
    given = inner_arguments(name)
    given[away] = given[away].to(META)
    before = {key: value.clone() for key, value in given.items()}
    words = "Expected all tensors to be on the same device, but input is on (cpu|meta) and .* is on (cpu|meta)"
    mode = FakeTensorMode() if fake else None
    called = {key: mode.from_tensor(value) for key, value in given.items()} if mode else given
    with mode or nullcontext(), pytest.raises(RuntimeError, match=words):
        inner_call(name, called)
    for key, value in given.items():
        assert value.is_meta or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", INNER)
def test_inner_operators_take_meta_tensors_only(name: str) -> None:
    given = {key: value.to(META) for key, value in inner_arguments(name).items()}
    results = inner_call(name, given)
    expected = inner_call(name, inner_arguments(name))
    for actual, real in zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, expected)), strict=True):
        assert actual.is_meta
        assert (actual.shape, actual.stride(), actual.dtype) == (real.shape, real.stride(), real.dtype)
