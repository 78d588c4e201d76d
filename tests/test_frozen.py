"""torchvision's and timm's frozen batch norms after convert: one operator, the same numbers."""

import copy
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import timm_stand_in
from helpers.fusing import assert_same
from torch import Tensor, nn
from torch.profiler import profile

import bn_ext

KINDS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
PLACES = {"FrozenBatchNorm2d": "torchvision.ops.misc", "FrozenBatchNormAct2d": "timm.layers.norm_act"}


@pytest.fixture(params=[(source, name) for source in ("stand-in", "real") for name in KINDS], ids=": ".join)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, of its package if that is installed, and of the stand-in in any case."""
    source, name = request.param
    if source == "real":
        return getattr(pytest.importorskip(PLACES[name]), name)
    place = PLACES[name].split(".")
    for length in range(1, len(place)):
        monkeypatch.setitem(sys.modules, ".".join(place[:length]), types.ModuleType(place[0]))
    monkeypatch.setitem(sys.modules, PLACES[name], timm_stand_in)
    return getattr(timm_stand_in, name)


def pair(kind: Any, **options: Any) -> tuple[Any, Any]:
    """A converted module and its stock twin, in float64."""
    stock = kind(3, **options).double()
    for buffer in stock.buffers():
        buffer.uniform_(0.5, 2)
    return bn_ext.convert(copy.deepcopy(stock)), stock


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 5, 6, dtype=dtype, requires_grad=True)


def operators(module: nn.Module, x: Tensor) -> set[str]:
    """The names of all that a call runs."""
    with profile() as profiler:
        module(x)
    return {event.name for event in profiler.events()}


def check(ours: nn.Module, stock: nn.Module) -> None:
    assert_same(ours, stock, (images(),), tolerance=1e-12)


def test_one_operator_gives_the_same(kind: Any) -> None:
    ours, stock = pair(kind)
    assert isinstance(ours, kind)
    assert repr(ours) == repr(stock)
    check(ours, stock)
    called = operators(ours, images())
    assert "aten::mul" not in called
    assert "aten::relu" not in called
    assert any("bn_ext" in name or "BatchNorm" in name for name in called)


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "eps": lambda m: setattr(m, "eps", 0.5),
    "a buffer": lambda m: setattr(m, "weight", torch.full((3,), 3.0, dtype=torch.float64)),
    "a buffer in place": lambda m: m.running_var.fill_(7),
    "buffers for all channels": lambda m: setattr(m, "bias", torch.ones(1, dtype=torch.float64)),
    "a parameter": lambda m: (
        delattr(m, "weight"),
        m.register_parameter("weight", nn.Parameter(torch.rand(3, dtype=torch.float64))),
    ),
    "a hook": hooked,
    "a negative eps": lambda m: setattr(m, "eps", -0.1),
    "half of it in float32": lambda m: setattr(m, "bias", m.bias.float()),
}
OF_ACT: dict[str, Callable[[Any], Any]] = {
    "another activation": lambda m: setattr(m, "act", nn.SiLU()),
    "an unknown activation": lambda m: setattr(m, "act", nn.Softplus()),
    "a hook of act": lambda m: hooked(m.act),
    "a hook of drop": lambda m: hooked(m.drop),
    "a dropout": lambda m: setattr(m, "drop", nn.Dropout(0.5)),
}


@pytest.mark.parametrize("name", [*CHANGES, *OF_ACT])
def test_later_changes_are_heeded(kind: Any, name: str) -> None:
    if name in OF_ACT and kind.__name__ == "FrozenBatchNorm2d":
        pytest.skip("it has no activation")
    ours, stock = pair(kind)
    for module in (ours, stock):
        torch.manual_seed(2)
        (CHANGES | OF_ACT)[name](module)
    check(ours, stock)


def test_dtypes_that_promote(kind: Any) -> None:
    """As theirs: bfloat16 images and float32 buffers give float32."""
    ours, stock = (module.float() for module in pair(kind))
    x = images(torch.bfloat16)
    assert ours(x).dtype == stock(x).dtype == torch.float32
    torch.testing.assert_close(ours(x), stock(x))


def test_copies_and_revert(kind: Any) -> None:
    ours, stock = pair(kind)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) is not kind
        check(twin, stock)
    model = bn_ext.convert(bn_ext.convert(nn.Sequential(ours)))
    assert type(bn_ext.revert(model)[0]) is kind
    check(ours, stock)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_scripted_and_traced(kind: Any) -> None:
    ours, stock = pair(kind)
    x = images()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours))
    for module in (compiled, torch.jit.script(ours), traced):
        torch.testing.assert_close(module(x), stock(x), rtol=1e-12, atol=1e-12)
    graphs = [torch.fx.symbolic_trace(nn.Sequential(m)).graph for m in (ours, stock)]
    assert [[(n.op, n.name) for n in graph.nodes] for graph in graphs[:1]] == [
        [(n.op, n.name) for n in graphs[1].nodes]
    ]


def scaled(self: Any, x: Tensor) -> Tensor:
    """A forward that does more."""
    scale = self.weight * (self.running_var + self.eps).rsqrt()
    shift = self.bias - self.running_mean * scale
    return (x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)) * self.scale


def test_unknown_classes_are_left_alone(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's subclass, a class of the same name with another base, and a forward that reads more."""

    class Sub(kind):  # type: ignore[misc]
        pass

    class Base(nn.Module):
        def __init__(self, num_features: int) -> None:
            super().__init__()

    members = {"__module__": kind.__module__, "forward": kind.forward}
    for other in (Sub, type(kind.__name__, (Base,), members), kind):
        if other is kind:
            monkeypatch.setattr(kind, "forward", scaled)
        assert type(bn_ext.convert(other(3))) is other
