"""bn_ext.fuse with a dropout between batch norm and activation, as MONAI has: passed if it does nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import FUSED, RELU, SEPARATE, assert_same, fused_and_stock, seen_of, x_of
from torch import Tensor, nn

import bn_ext

IN_EVALUATION = "batch_norm in training, batch_norm + relu in evaluation"
NOT_PASSED = "nothing to fuse: it is followed by {}"


class Functional(nn.Module):
    """The dropout as a function, in the three ways to give its arguments."""

    def __init__(self, p: float, way: int = 0) -> None:
        super().__init__()
        self.bn, self.p, self.way = nn.BatchNorm2d(3), p, way

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        if self.way == 0:
            y = F.dropout(y, self.p, self.training)
        elif self.way == 1:
            y = F.dropout(y, training=self.training, p=self.p, inplace=True)
        else:
            y = F.dropout(y, self.p)
        return y.relu()


def block(dropout: nn.Module, dims: int = 2) -> nn.Module:
    return nn.Sequential(getattr(nn, f"BatchNorm{dims}d")(3), dropout, nn.ReLU())


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "p = 0": (lambda: block(nn.Dropout(0.0)), RELU),
    "p = 0 in place": (lambda: block(nn.Dropout(0, inplace=True)), RELU),
    "p = 0.5": (lambda: block(nn.Dropout(0.5)), IN_EVALUATION),
    "p = 1": (lambda: block(nn.Dropout(1.0)), IN_EVALUATION),
    "of channels": (lambda: block(nn.Dropout2d(0.5)), IN_EVALUATION),
    "and an identity": (lambda: block(nn.Dropout(0.5)).insert(1, nn.Identity()), IN_EVALUATION),
    "of other images": (lambda: block(nn.Dropout3d(0.0)), NOT_PASSED.format("Dropout3d")),
    "alpha": (lambda: block(nn.AlphaDropout(0.5)), NOT_PASSED.format("AlphaDropout")),
    "function, p = 0": (lambda: Functional(0.0), RELU),
    "function": (lambda: Functional(0.5), IN_EVALUATION),
    "function by keywords": (lambda: Functional(0.5, 1), IN_EVALUATION),
    "function that always drops": (lambda: Functional(0.5, 2), NOT_PASSED.format("dropout")),
    "function that always drops nothing": (lambda: Functional(0.0, 2), RELU),
}


@pytest.mark.filterwarnings("ignore:dropout3d")
@pytest.mark.parametrize("training", [True, False], ids=["fused in training", "fused in evaluation"])
@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_fused_where_it_does_nothing(make: Callable[[], nn.Module], expected: str, training: bool) -> None:
    fused, stock, told = fused_and_stock(make().double().train(training))
    assert told == [expected]
    assert_same(fused, stock, (x_of().requires_grad_(),))
    assert seen_of(fused.train(), x_of()) == (FUSED if expected == RELU else SEPARATE)
    assert seen_of(fused.eval(), x_of()) == (FUSED if expected in (RELU, IN_EVALUATION) else SEPARATE)


@pytest.mark.parametrize("dims", [1, 3])
def test_dimensions(dims: int) -> None:
    fused, stock, told = fused_and_stock(block(getattr(nn, f"Dropout{dims}d")(0.5), dims).double())
    assert told == [IN_EVALUATION]
    assert_same(fused, stock, (x_of(4, 3, *[5] * dims).requires_grad_(),))


def test_before_and_behind_an_addition() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.first, self.last = nn.BatchNorm2d(3), nn.Dropout(0.3), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(self.bn(x)) + x).relu()

    fused, stock, told = fused_and_stock(Sum().double())
    assert told == ["batch_norm in training, batch_norm + add + relu in evaluation"]
    assert_same(fused, stock, (x_of().requires_grad_(),))
    fused.last.p = stock.last.p = 0.9
    assert_same(fused, stock, (x_of().requires_grad_(),))


CHANGES: dict[str, tuple[float, Callable[[Any], Any]]] = {
    "drops in evaluation too": (0.5, lambda m: m[1].register_forward_pre_hook(lambda m, args: m.train() and None)),
    "another p": (0.0, lambda m: setattr(m[1], "p", 0.9)),
    "a p that is refused": (0.0, lambda m: setattr(m[1], "p", 1.5)),
    "a hook": (0.5, lambda m: m[1].register_forward_hook(lambda m, args, output: output * 2)),
    "a forward of its own": (0.5, lambda m: setattr(m[1], "forward", torch.cos)),
    "another module": (0.5, lambda m: m.__setitem__(1, nn.Softplus())),
}


@pytest.mark.parametrize(("p", "change"), CHANGES.values(), ids=CHANGES)
def test_later_changes_are_heeded(p: float, change: Callable[[Any], Any]) -> None:
    fused, stock, _ = fused_and_stock(block(nn.Dropout(p)).double())
    for model in (fused, stock):
        change(model)
    if fused[1].__dict__.get("p") == 1.5:
        for model in (fused, stock):
            with pytest.raises(ValueError, match="between 0 and 1"):
                model(x_of())
    else:
        assert_same(fused, stock, (x_of().requires_grad_(),))


def test_samples_by_dropout_in_evaluation() -> None:
    """Monte Carlo dropout: the model evaluates, its dropouts are in training."""
    fused, stock, _ = fused_and_stock(block(nn.Dropout(0.5)).double())
    x = x_of()
    for model in (fused, stock):
        model.eval()[1].train()
    assert seen_of(fused, x) == SEPARATE
    samples = []
    for model in (fused, stock):
        torch.manual_seed(3)
        samples.append(model(x))
    torch.testing.assert_close(*samples)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("UNet", {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 2, "act": "relu"}, 9),
        ("BasicUNet", {"features": (4, 4, 8, 8, 8, 4)}, 18),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_networks_of_monai(name: str, options: dict[str, Any], count: int, dropout: float) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    common = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "norm": "batch", "dropout": dropout}
    model = getattr(nets, name)(**common, **options).double()
    fused, stock, _ = fused_and_stock(model)
    _, report = bn_ext.fuse(fused, report=True)
    assert len(report.fused) == len(report.rows) == count
    assert all((" in evaluation" in row.what) == bool(dropout) for row in report.rows)
    # Roundings of float64, 1e-16 each, that up to 18 batch norms over 16 values each multiply.
    assert_same(fused, stock, (torch.randn(4, 1, 32, 32, dtype=torch.float64, requires_grad=True),), tolerance=1e-9)
