"""Whole models: convert and revert change what runs and nothing else."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import bn_ext


class Net(nn.Module):
    """Batch norms of three kinds, one of them used twice, one referred to from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.again = self.norm
        self.layers = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm3d(2, affine=False)])
        self.favourite = [self.layers[0]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.norm(self.conv(x)))
        y = self.layers[1](x.reshape(x.shape[0], 2, 2, x.shape[2], x.shape[3]))
        return self.favourite[0](x.mean((2, 3))) + y.mean()


class Renamed(nn.BatchNorm2d):
    """A subclass whose behaviour nobody knows."""


def test_the_same_objects_do_the_same_and_are_ours(device: str) -> None:
    model = Net().to(device)
    twin = copy.deepcopy(model)
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    assert bn_ext.convert(model) is model
    assert type(model.norm) is bn_ext.BatchNorm2d
    assert type(model.layers[0]) is bn_ext.BatchNorm1d
    assert type(model.layers[1]) is bn_ext.BatchNorm3d
    assert dict(model.named_modules()) == modules
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is state[name]
    for _ in range(3):
        x = torch.randn(5, 3, 8, 8, device=device)
        y, expected = model(x), twin(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward(), expected.sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert bn_ext.revert(model) is model
    assert type(model.norm) is nn.BatchNorm2d
    assert {type(m) for m in model.modules()} == {type(m) for m in twin.modules()}
    torch.testing.assert_close(model(x), twin(x))


def test_flags_and_hooks_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()
    model[0].weight.requires_grad_(False)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    bn_ext.convert(model)
    assert not model[0].training
    assert not model[0].weight.requires_grad
    model(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_optimizer_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bn_ext.convert(model)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, torch.ones(3))


def test_a_batch_norm_itself_and_twice() -> None:
    norm = nn.BatchNorm2d(3)
    assert bn_ext.convert(bn_ext.convert(norm)) is norm
    assert type(norm) is bn_ext.BatchNorm2d


def test_unknown_subclasses_are_left_alone_and_named() -> None:
    model = nn.Sequential(Renamed(3), nn.BatchNorm2d(3), nn.Sequential(Renamed(3)))
    with pytest.warns(UserWarning, match=r"did not convert these .*: 0 \(.*Renamed\), 2\.0 \(.*Renamed\)$") as record:
        bn_ext.convert(model)
    assert len(record) == 1
    assert [type(m) for m in model] == [Renamed, bn_ext.BatchNorm2d, nn.Sequential]
    bn_ext.revert(model)
    assert [type(m) for m in model] == [Renamed, nn.BatchNorm2d, nn.Sequential]


@pytest.mark.parametrize(("count", "end"), [(3, r"2 \(.*Renamed\)$"), (40, r", 2 \(.*Renamed\) and 37 more$")])
def test_the_warning_names_three_modules(count: int, end: str) -> None:
    model = nn.Sequential(*(Renamed(3) for _ in range(count)))
    with pytest.warns(UserWarning, match=end) as record:
        bn_ext.convert(model)
    assert str(record[0].message).count("Renamed") == 3


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_lazy_modules_become_ours(dims: int) -> None:
    """At the first forward pass, which is ours too."""
    stock, ours = (getattr(library, f"LazyBatchNorm{dims}d") for library in (nn, bn_ext))
    becomes = getattr(bn_ext, f"BatchNorm{dims}d")
    model = bn_ext.convert(nn.Sequential(stock(momentum=None)))
    assert type(model[0]) is ours
    assert type(bn_ext.revert(model)[0]) is stock
    bn_ext.convert(model)
    twin = nn.Sequential(stock(momentum=None))
    x = torch.randn(4, 3, *[5] * dims)
    y = model(x)
    assert "BatchNormFunction" in y.grad_fn.name()
    torch.testing.assert_close(y, twin(x))
    assert type(model[0]) is becomes
    assert type(model[0]) is type(bn_ext.convert(twin)[0])
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    with pytest.raises(ValueError, match="expected"):
        ours()(torch.randn(2, 3, 4, 4, 4, 4))


def test_other_modules_are_not_warned_about() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn_ext.convert(model)
    assert [type(m) for m in model] == [nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm]


def test_not_a_module() -> None:
    for function in (bn_ext.convert, bn_ext.revert):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            function([nn.BatchNorm2d(3)])


@pytest.mark.parametrize("convert", ["convert_sync_batchnorm", "fuse_conv_bn_eval", "fuse_linear_bn_eval", "revert"])
def test_activation_is_not_lost_without_a_word(convert: str) -> None:
    """What makes a batch norm of torch's, or part of a layer, of a subclass of its batch norms (pytorch#187298)."""
    kind = bn_ext.BatchNorm1d if convert == "fuse_linear_bn_eval" else bn_ext.BatchNorm2d
    layer = nn.Linear(3, 4) if convert == "fuse_linear_bn_eval" else nn.Conv2d(3, 4, 1)

    def run(norm: nn.Module) -> Any:
        model = nn.Sequential(layer, norm).eval()
        if convert == "convert_sync_batchnorm":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return bn_ext.revert(model) if convert == "revert" else getattr(torch.nn.utils.fusion, convert)(*model)

    norm = kind(4, activation="relu")
    before = dict(norm.__dict__)
    words = r"would lose the activation inside .*set .*activation` to None"
    with pytest.raises((RuntimeError, ValueError), match=words):
        run(norm)
    assert type(norm) is kind
    assert norm.__dict__.keys() == before.keys()
    assert norm.activation == ("relu", 0.0)
    norm.activation = None
    assert not isinstance(list(run(norm).modules())[-1], kind)


class Ours(bn_ext.BatchNorm2d):
    """A subclass of this package's."""


def test_subclasses_of_ours_need_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    """They are what was asked for, and take options."""
    model = bn_ext.convert(nn.Sequential(Ours(3)), skip_nonfinite=True)
    assert type(model[0]) is Ours
    assert model[0].skip_nonfinite
    assert not recwarn
