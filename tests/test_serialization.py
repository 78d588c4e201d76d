"""Modules and state_dicts into files and back, in every way that torch has."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.libraries import (
    Net,
    both,
    images,
    norm,
    plain,
    state,
    step,
    steps,
    train_in_child,
    train_in_forked_child,
)
from torch import multiprocessing, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

import bn_ext

pytestmark = pytest.mark.usefixtures("device")


def trained(library: str, **options: Any) -> nn.Module:
    module = plain(library, **options)
    module(images())
    return module


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.2)])
@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_modules(how: str, activation: Any, tmp_path: Path) -> None:
    def again(module: nn.Module) -> nn.Module:
        if how == "torch.save":
            torch.save(module, tmp_path / "module.pt")
            return torch.load(tmp_path / "module.pt", weights_only=False)
        ways: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "copy": copy.copy}
        return ways.get(how, lambda m: pickle.loads(pickle.dumps(m)))(module)

    def run(library: str) -> Any:
        module = norm(library, activation=activation)
        twin = again(nn.Sequential(module))[0]
        assert type(twin) is type(module)
        assert twin.activation == module.activation
        return steps(twin, images())

    both(run)


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.2)])
def test_modules_of_allowed_classes_only(activation: Any, tmp_path: Path) -> None:
    """weights_only: nothing but the class needs to be allowed, also with an activation."""
    file = tmp_path / "module.pt"
    module = trained("bn_ext")
    module.activation = activation
    torch.save(module, file)
    with pytest.raises(pickle.UnpicklingError, match=r"bn_ext\.modules\.BatchNorm2d"):
        torch.load(file, weights_only=True)
    assert get_unsafe_globals_in_checkpoint(file) == ["bn_ext.modules.BatchNorm2d"]
    with safe_globals([bn_ext.BatchNorm2d, set]):
        loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(steps(loaded, images()), steps(module, images()))


LOADING: dict[str, dict[str, Any]] = {
    "plain": {},
    "mmap": {"mmap": True},
    "map_location": {"map_location": "cpu"},
    "unsafe": {"weights_only": False},
}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("saved_by", ["torch", "bn_ext"])
@pytest.mark.parametrize("how", LOADING)
def test_state_dicts(how: str, saved_by: str, assign: bool, tmp_path: Path) -> None:
    torch.save(Net(saved_by).state_dict(), tmp_path / "state.pt")

    def run(library: str) -> Any:
        model = Net(library)
        nn.init.zeros_(model.norm1.weight)
        values = torch.load(tmp_path / "state.pt", **LOADING[how])
        assert not model.load_state_dict(values, assign=assign).missing_keys
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.to(images().device)
        return steps(model, images())

    both(run)


def test_the_file_is_mapped(tmp_path: Path) -> None:
    """Training from mapped memory leaves the file as it was."""
    file = tmp_path / "state.pt"
    torch.save(Net("torch").state_dict(), file)
    before = file.read_bytes()
    model = Net("bn_ext").cpu()
    model.load_state_dict(torch.load(file, mmap=True), assign=True)
    step(model, images().cpu())
    assert model.norm1.num_batches_tracked == 1
    assert file.read_bytes() == before
    assert os.path.getsize(file) == len(before)


def without(module: nn.Module, name: str, version: int | None = None) -> Any:
    """Its state_dict without a name; with the version of the format, or as a plain dict that has none."""
    values = module.state_dict()
    del values[name]
    if version is None:
        return dict(values)
    values._metadata[""]["version"] = version
    return values


def loaded(module: nn.Module, values: Any, strict: bool) -> Any:
    """What load_state_dict says or raises, and the module afterwards."""
    try:
        keys = module.load_state_dict(values, strict=strict)
        told: Any = (list(keys.missing_keys), list(keys.unexpected_keys))
    except RuntimeError as error:
        told = str(error)
    return told, steps(module, images())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("missing", ["num_batches_tracked", "running_var", "weight"])
def test_missing_keys(missing: str, version: int | None, strict: bool) -> None:
    """Files from before num_batches_tracked are version 1 or have none."""
    results = []
    for library in ("torch", "bn_ext"):
        source, target = trained(library), plain(library)
        results.append(loaded(target, without(source, missing, version), strict))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


def test_wrong_shape_and_unexpected_key() -> None:
    told = []
    for library in ("torch", "bn_ext"):
        values = dict(plain(library, 4).state_dict(), more=torch.ones(1))
        told.append(loaded(plain(library), values, strict=True)[0])
    assert told[0] == told[1]
    assert "size mismatch for running_mean" in told[1]


def test_hooks_of_state_dicts() -> None:
    def run(library: str) -> Any:
        module, seen = trained(library), []
        module.register_state_dict_pre_hook(lambda m, *_: m.bias.data.add_(1))
        module.register_state_dict_post_hook(lambda m, values, prefix, _: values.update({prefix + "more": m.bias * 2}))
        module.register_load_state_dict_pre_hook(lambda m, values, prefix, *_: seen.append(values.pop(prefix + "more")))
        module.register_load_state_dict_post_hook(lambda m, keys: seen.append(m.weight.detach() * 3))
        values = dict(module.state_dict())
        module.load_state_dict(values)
        return seen, steps(module, images())

    both(run)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_lazy_modules(dims: int) -> None:
    """A checkpoint may come before the first forward pass, from a lazy module or another; pickle and copy may too."""
    x = torch.randn(4, 3, *[5] * dims, generator=torch.Generator().manual_seed(0)).to(images().device)

    def run(library: str) -> Any:
        lazy = getattr(nn if library == "torch" else bn_ext, f"LazyBatchNorm{dims}d")
        usual = getattr(nn if library == "torch" else bn_ext, f"BatchNorm{dims}d")
        source = usual(3)
        source(x.cpu())
        made = [lazy(device=x.device) for _ in range(4)]
        made[0].load_state_dict(source.state_dict())
        made[1].load_state_dict(lazy().state_dict())
        made[2] = pickle.loads(pickle.dumps(made[2])) if x.device.type == "cpu" else made[2]
        made[3](x)
        made[3] = copy.deepcopy(made[3])
        made.append(lazy(momentum=None, affine=False, device=x.device))
        made.append(lazy(track_running_stats=False, dtype=torch.float64, device=x.device))
        assert made[0].has_uninitialized_params() is False
        results = [steps(module, x.to(module.weight.dtype if module.affine else x.dtype)) for module in made[:5]]
        made[5](x.double())
        results.append(steps(made[5], x.double()))
        assert {type(module) for module in made} == {usual}
        return results

    both(run, rtol=1e-4, atol=1e-4)  # float32


def test_lazy_model_with_a_dry_run() -> None:
    """The activation and hooks stay when the module becomes another."""

    def run(library: str) -> Any:
        layers = [nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(momentum=None), nn.ReLU()]
        if library == "bn_ext":
            layers[1:] = [bn_ext.LazyBatchNorm2d(momentum=None, activation="relu")]
        model = nn.Sequential(*layers).to(images().device)
        seen: list[int] = []
        model[1].register_forward_hook(lambda *_: seen.append(1))
        torch.manual_seed(0)
        with torch.no_grad():
            model(images(2, torch.float32))
        nn.init.normal_(model[0].weight)
        nn.init.normal_(model[0].bias)
        twin = copy.deepcopy(model)
        results = steps(twin, images(4, torch.float32))
        assert type(twin[1]) is (nn if library == "torch" else bn_ext).BatchNorm2d
        return len(seen), results

    both(run, rtol=1e-4, atol=1e-3)  # float32; the convolution's bias gets differences of what cancels


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_in_child, train_in_forked_child])
def test_memory_shared_with_another_process(train: Callable[..., None]) -> None:
    """As in Hogwild training: what a child changes of parameters and statistics is the parent's."""
    options = {"activation": "silu", "momentum": None, "device": "cpu"}
    trained = {library: norm(library, **options).share_memory() for library in ("torch", "bn_ext")}
    arguments = (list(trained.values()), images().cpu())
    child = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert trained["bn_ext"].num_batches_tracked == 2
    assert all(tensor.is_shared() for tensor in trained["bn_ext"].state_dict().values())
    both(lambda library: state(trained[library]))
