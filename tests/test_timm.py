"""timm's BatchNormAct2d after convert and fuse: the same numbers, whatever its children become later."""

import copy
import io
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import timm_stand_in
from helpers.fusing import assert_same, fused_and_stock
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import bn_ext

Change = Callable[[Any], Any]


@pytest.fixture(params=["stand-in", "timm"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, of timm if that is installed, and of the stand-in in any case."""
    if request.param == "timm":
        return pytest.importorskip("timm.layers.norm_act").BatchNormAct2d
    for name in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", timm_stand_in)
    return timm_stand_in.BatchNormAct2d


class Residual(nn.Module):
    """A norm, an addition and an activation, as at the end of timm's blocks."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1, dtype=torch.float64), norm, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


def pair(kind: Any, around: Callable[[Any], Any] = lambda norm: norm, **options: Any) -> tuple[Any, Any]:
    """A converted module, in another perhaps, and its stock twin, in float64."""
    stock = around(kind(3, **copy.deepcopy(options))).double()  # timm writes to act_kwargs
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    return bn_ext.convert(copy.deepcopy(stock)), stock


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 3, 5, 6), dtype=torch.float64, requires_grad=True)


def is_one_operation(module: nn.Module, name: str = "relu") -> bool:
    """Whether the operator does all that the module does, activation included."""
    y = module(images())
    direct = bn_ext.BatchNorm2d(3, activation=name, dtype=torch.float64)
    direct.load_state_dict(module.state_dict(), strict=False)
    return bool(y.grad_fn.name() == direct(images()).grad_fn.name())


OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "silu": {"act_layer": nn.SiLU},
    "leaky_relu": {"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.3, "inplace": True}},
    "no activation": {"apply_act": False},
    "an activation that the operator does not know": {"act_layer": nn.Softplus},
    "an activation with parameters": {"act_layer": nn.PReLU, "act_kwargs": {"init": 0.3}},
    "dropout": {"drop_layer": nn.Dropout},
    "dropout that drops nothing": {"drop_layer": lambda: nn.Dropout2d(0.0)},
    "dropout without activation": {"drop_layer": nn.Dropout, "apply_act": False},
    "untracked": {"track_running_stats": False},
    "without weight": {"affine": False},
    "cumulative average": {"momentum": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_converted_module_gives_the_same(kind: Any, options: dict[str, Any]) -> None:
    ours, stock = pair(kind, **options)
    assert isinstance(ours, kind)
    assert isinstance(ours, bn_ext.BatchNorm2d)
    assert type(ours).__name__ == "BatchNormAct2d"
    assert_same(ours, stock, (images(),), tolerance=1e-12)


def test_activation_is_in_the_operator_if_that_is_sure(kind: Any) -> None:
    assert is_one_operation(pair(kind)[0])
    assert is_one_operation(pair(kind, act_layer=nn.SiLU)[0], "silu")
    assert not is_one_operation(pair(kind, act_layer=nn.Softplus)[0])
    dropping = pair(kind, drop_layer=nn.Dropout)[0]
    assert not is_one_operation(dropping)
    assert is_one_operation(dropping.eval())


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


CHANGES: dict[str, tuple[dict[str, Any], Change]] = {
    "another activation": ({}, lambda m: setattr(m, "act", nn.SiLU())),
    "an unknown activation": ({}, lambda m: setattr(m, "act", nn.Softplus())),
    "no activation": ({}, lambda m: setattr(m, "act", nn.Identity())),
    "an activation after all": ({"apply_act": False}, lambda m: setattr(m, "act", nn.ReLU())),
    "another slope": ({"act_layer": nn.LeakyReLU}, lambda m: setattr(m.act, "negative_slope", 0.7)),
    "another bound": ({"act_layer": nn.ReLU6}, lambda m: setattr(m.act, "max_val", 0.2)),
    "another forward of act": ({}, lambda m: setattr(m.act, "forward", torch.cos)),
    "a hook of act": ({}, lambda m: hooked(m.act)),
    "a hook of drop": ({}, lambda m: hooked(m.drop)),
    "a hook of the module": ({}, hooked),
    "a dropout": ({}, lambda m: setattr(m, "drop", nn.Dropout(0.5))),
    "a dropout that drops in evaluation": (
        {"drop_layer": nn.Dropout},
        lambda m: m.drop.register_forward_pre_hook(lambda drop, args: drop.train() and None),
    ),
    "a dropout that stops": ({"drop_layer": nn.Dropout}, lambda m: setattr(m.drop, "p", 0.0)),
    "a frozen norm": ({}, lambda m: setattr(m, "track_running_stats", False)),
    "other momentum": ({}, lambda m: setattr(m, "momentum", None)),
}


@pytest.mark.parametrize("fuse", [False, True], ids=["converted", "fused"])
@pytest.mark.parametrize(("options", "change"), CHANGES.values(), ids=CHANGES)
def test_later_changes_are_heeded(kind: Any, options: dict[str, Any], change: Change, fuse: bool) -> None:
    ours, stock = pair(kind, Residual, **options)
    if fuse:
        bn_ext.fuse(ours)
    assert_same(ours, stock, (images(),), tolerance=1e-12)
    change(ours.norm), change(stock.norm)
    assert_same(ours, stock, (images(),), tolerance=1e-12)


def test_hooks_of_all_modules_see_the_activation(kind: Any) -> None:
    seen: list[list[str]] = []
    for module in pair(kind):
        seen.append([])
        with register_module_forward_hook(lambda m, args, output: seen[-1].append(type(m).__name__)):
            module(images())
    assert seen[0] == seen[1] == ["Identity", "ReLU", "BatchNormAct2d"]


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({}, "batch_norm + relu"),
        ({"apply_act": False}, "batch_norm + add + relu"),
        ({"act_layer": nn.Softplus}, "its activation is its child act, a Softplus"),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_and_reported(kind: Any, options: dict[str, Any], reported: str, recompute: bool) -> None:
    fused, stock, told = fused_and_stock(Residual(kind(3, dtype=torch.float64, **options)))
    assert told == [reported]
    bn_ext.fuse(fused, recompute=recompute)
    assert_same(fused, stock, (images(),), tolerance=1e-12)
    assert type(bn_ext.revert(fused).norm) is kind
    assert type(fused) is Residual


def test_sum_in_place_behind_a_later_activation(kind: Any) -> None:
    """It keeps the dtype of the norm, also when the norm has got an activation that the operator does not know."""

    class InPlace(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            y += x.double()
            return self.act(y)

    fused, stock, told = fused_and_stock(InPlace(kind(3, apply_act=False)).float())
    assert told == ["batch_norm + add + relu"]
    for model in (fused, stock):
        model.norm.act = nn.Softplus()
    x = images().float()
    torch.testing.assert_close(fused(x), stock(x))


def test_two_norms_that_are_added(kind: Any) -> None:
    """Only the one that ends in no activation of its own takes the other."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.shortcut = kind(3, dtype=torch.float64, apply_act=False), kind(3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(x) + self.shortcut(x)).relu()

    fused, stock, told = fused_and_stock(Both())
    assert told == ["batch_norm + add + relu", "batch_norm + relu"]
    assert_same(fused, stock, (images(),), tolerance=1e-12)


def test_revert_gives_the_class_back(kind: Any) -> None:
    ours, stock = pair(kind)
    model = nn.Sequential(ours)
    bn_ext.convert(model, skip_nonfinite=True)
    assert ours.skip_nonfinite
    assert bn_ext.convert(bn_ext.convert(model))[0] is ours
    bn_ext.revert(model)
    assert type(ours) is kind
    assert vars(ours).keys() == vars(stock).keys()
    assert_same(ours, stock, (images(),), tolerance=0.0)


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies_are_of_the_same_class(kind: Any, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    ours, stock = pair(kind)
    twin = duplicate(ours)
    assert type(twin) is type(ours)
    assert_same(twin, stock, (images(),), tolerance=1e-12)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["relu", "no activation", "an activation with parameters", "dropout"])
def test_compiled(kind: Any, name: str) -> None:
    ours, stock = pair(kind, Residual, **OPTIONS[name])
    for training in (True, False):
        if name == "dropout" and training:
            continue  # compiled code draws other random numbers
        ours.train(training), stock.train(training)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert_same(compiled._orig_mod, stock, (images(),), modes=(training,), tolerance=1e-12)
        x = images()
        torch.testing.assert_close(compiled(x), stock(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "no activation", "an activation with parameters"])
def test_traced_and_scripted(kind: Any, name: str) -> None:
    """One node in a graph of torch.fx, which follows its mode; the same numbers from all."""
    ours, stock = pair(kind, **OPTIONS[name])
    model = nn.Sequential(ours)
    traced = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes if n.op.startswith("call")] == [("call_module", "0")]
    assert_same(traced, nn.Sequential(stock), (images(),), tolerance=1e-12)
    for training in (True, False):
        ours.train(training), stock.train(training)
        x = images()
        torch.testing.assert_close(torch.jit.script(traced)(x), stock(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.jit.script(ours)(x), stock(x), rtol=1e-12, atol=1e-12)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), stock(x), rtol=1e-12, atol=1e-12)


def test_hooked_module_in_a_graph(kind: Any) -> None:
    ours, stock = pair(kind)
    hooked(ours), hooked(stock)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours))
    assert_same(traced, nn.Sequential(stock), (images(),), tolerance=1e-12)


def test_unknown_classes_are_left_alone(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's subclass, a class of the same name with another base, and timm's with a forward that reads more."""

    class Sub(kind):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return 2 * super().forward(x)

    class Base(nn.BatchNorm2d):
        pass

    forward = kind.forward
    namesake = type("BatchNormAct2d", (Base,), {"__module__": kind.__module__, "forward": forward})
    for other in (Sub, namesake, kind):
        monkeypatch.setattr(kind, "forward", lambda self, x: self.act(self.drop(forward(self, x))) * self.scale)
        with pytest.warns(UserWarning, match="did not convert these subclasses"):
            assert type(bn_ext.convert(other(3))) is other


def test_errors(kind: Any) -> None:
    ours, stock = pair(kind)
    for module in (ours, stock):
        with pytest.raises(AssertionError, match=r"expected 4D input \(got 3D input\)"):
            module(images(4, 3, 5))
    with pytest.raises(AttributeError, match=r"applies its child `act`: replace this child instead .* 'silu'"):
        ours.activation = "silu"
    assert is_one_operation(ours)
    for module in (ours, stock):
        module.drop = nn.Dropout(0.0)
        module.eval().drop.p = 1.5
        with pytest.raises(ValueError, match="between 0 and 1"):
            module(images())


def test_converters_of_timm_keep_the_activation() -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    ours, stock = (module.eval() for module in pair(norm_act.BatchNormAct2d, act_layer=nn.SiLU))
    x = images()
    for convert in (norm_act.freeze_batch_norm_2d, norm_act.convert_sync_batchnorm):
        made, expected = convert(copy.deepcopy(ours)), convert(copy.deepcopy(stock))
        assert type(made) is type(expected)
        torch.testing.assert_close(made(x), expected(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mobilenetv3_small_050", {"batch_norm + hardswish": 18, "batch_norm + relu": 5, "batch_norm + add": 7}),
        ("regnetx_002", {"batch_norm + relu": 27, "batch_norm + add + relu": 13}),
    ],
)
def test_networks_of_timm(name: str, counts: dict[str, int]) -> None:
    timm = pytest.importorskip("timm")
    fused, stock, told = fused_and_stock(timm.create_model(name, num_classes=5).double())
    assert {what: told.count(what) for what in told if what.startswith("batch_norm")} == counts
    # Roundings of float64, 1e-16 each, that up to 44 batch norms over four values each multiply.
    assert_same(fused, stock, (images(4, 3, 32, 32),), tolerance=1e-7)


def test_a_fused_parent_comes_fused_from_a_file(kind: Any) -> None:
    fused = bn_ext.fuse(Residual(kind(3, apply_act=False).double()))
    loaded, x = pickle.loads(pickle.dumps(fused)), images()
    assert type(loaded) is type(fused) is not Residual
    torch.testing.assert_close(loaded(x), fused(x))
    bn_ext.revert(loaded.norm)
    assert type(loaded.norm) is kind
    torch.testing.assert_close(loaded.eval()(x), fused.eval()(x))


def test_reverted_gives_the_class_back_for_a_while(kind: Any) -> None:
    converted, stock = pair(kind)
    ours = type(converted)
    with bn_ext.reverted(converted):
        assert type(converted) is kind
    assert type(converted) is ours is not kind
    assert_same(converted, stock, (images(),))
