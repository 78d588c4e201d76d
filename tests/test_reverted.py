"""`with bn_ext.reverted(model)`: torch.nn's exact classes inside, outside all as it was."""

import copy
from typing import Any

import pytest
import torch
from helpers.libraries import filled, images, state, steps
from torch import Tensor, nn

import bn_ext


class Block(nn.Module):
    """Something to fuse."""

    def __init__(self, kind: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), kind(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def network(how: str, **options: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(filled(Block()), filled(Block()), nn.Flatten(), nn.LazyBatchNorm1d()).double()
    if how == "stock":
        return model
    bn_ext.convert(model, **options)
    return bn_ext.fuse(model, recompute=how == "recompute") if how != "converted" else model


KINDS = ("stock", "converted", "fused", "recompute")


def everything(model: nn.Module) -> Any:
    return {m: (type(m), dict(vars(m))) for m in model.modules()}


@pytest.mark.parametrize("how", KINDS)
def test_exact_classes_inside_and_all_as_it_was_outside(how: str) -> None:
    options = {"skip_nonfinite": True, "skip_recomputed": True} if how != "stock" else {}
    model, stock = network(how, **options), network("stock")
    before = everything(model)
    with bn_ext.reverted(model) as same:
        assert same is model
        assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
        assert not any(name in vars(m) for m in model.modules() for name in options)
    assert everything(model) == before
    torch.testing.assert_close(steps(model, images()), steps(stock, images()))


@pytest.mark.parametrize("how", KINDS)
def test_steps_inside_are_torchs_and_count(how: str) -> None:
    model, stock = network(how), network("stock")
    kinds = [type(m) for m in model.modules()]
    with bn_ext.reverted(model):
        y = model(images())
        assert "NativeBatchNorm" in y.grad_fn.name()
        torch.testing.assert_close(y, stock(images()), rtol=0, atol=0)
    assert ("NativeBatchNorm" in model(images()).grad_fn.name()) == (how == "stock")
    stock(images())
    torch.testing.assert_close(state(model), state(stock))
    became = nn.BatchNorm1d if how == "stock" else bn_ext.BatchNorm1d
    assert [type(m) for m in model.modules()] == [*kinds[:-1], became]


def test_what_was_fused_runs_fused_again() -> None:
    block = network("fused")[0]
    with bn_ext.reverted(block):
        assert block(images()).grad_fn.name() == "ReluBackward0"
    assert "BatchNormFunction" in block(images()).grad_fn.name()


def test_an_error_inside_restores_too() -> None:
    model = network("fused")
    before = everything(model)
    with pytest.raises(KeyError), bn_ext.reverted(model):
        raise KeyError
    assert everything(model) == before


def test_copies_made_inside_are_torchs() -> None:
    model, stock = network("fused"), network("stock")
    torch.testing.assert_close(model(images()), stock(images()))  # torch copies no lazy modules
    with bn_ext.reverted(model):
        twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in stock.modules()]
    torch.testing.assert_close(steps(model, images()), steps(twin, images()))


def test_a_tool_that_changes_the_model_is_not_undone() -> None:
    """Replaced, added and removed modules, and classes set by the tool."""

    class Counted(nn.BatchNorm2d):
        """A tool's own."""

    model, stock = network("fused"), network("stock")
    kept, removed = model[1], model[0].norm

    def change(net: Any) -> None:
        net[0].norm = nn.GroupNorm(1, 3).double()
        net[1].norm.__class__ = Counted
        net[3] = nn.BatchNorm1d(images()[0].numel()).double()
        net.append(nn.ReLU())

    with bn_ext.reverted(model):
        change(model)
    change(stock)
    assert type(removed) is bn_ext.BatchNorm2d
    assert type(kept.norm) is Counted
    assert type(model[3]) is nn.BatchNorm1d
    torch.testing.assert_close(steps(model, images()), steps(stock, images()))


def test_nested_and_as_a_decorator() -> None:
    model = network("fused")
    before = everything(model)
    with bn_ext.reverted(model), bn_ext.reverted(model[0]):
        assert type(model[0].norm) is nn.BatchNorm2d

    @bn_ext.reverted(model)
    def inside() -> type:
        return type(model[1].norm)

    assert [inside(), inside()] == [nn.BatchNorm2d] * 2
    assert everything(model) == before


def test_an_activation_of_its_own_is_not_lost() -> None:
    model = nn.Sequential(bn_ext.BatchNorm2d(3), bn_ext.BatchNorm2d(3, activation="relu"))
    before = everything(model)
    with pytest.raises(ValueError, match="would lose the activation inside 1: "), bn_ext.reverted(model):
        pytest.fail("went inside")
    assert everything(model) == before
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"), bn_ext.reverted([model]):
        pytest.fail("went inside")
