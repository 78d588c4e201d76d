"""bn_ext.fuse: every spelling of an activation and an addition is found, and what is not safe is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import ADD, ADD_RELU, RELU, UNUSED, Block, check, inputs, seen_of
from torch import Tensor, nn

import bn_ext

Function = Callable[..., Any]


ACTIVATIONS: dict[str, tuple[str, Function]] = {
    "F.relu": ("relu", F.relu),
    "F.relu in place": ("relu", lambda y: F.relu(y, inplace=True)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "relu": ("relu", lambda y: y.relu()),
    "relu_": ("relu", lambda y: y.relu_()),
    "F.leaky_relu": ("leaky_relu(negative_slope=0.01)", F.leaky_relu),
    "F.leaky_relu 0.2": ("leaky_relu(negative_slope=0.2)", lambda y: F.leaky_relu(y, 0.2)),
    "F.leaky_relu slope": ("leaky_relu(negative_slope=0.3)", lambda y: F.leaky_relu(y, negative_slope=0.3)),
    "F.leaky_relu 0": ("leaky_relu(negative_slope=0.0)", lambda y: F.leaky_relu(y, 0.0)),
    "F.leaky_relu_": ("leaky_relu(negative_slope=0.2)", lambda y: F.leaky_relu_(y, 0.2)),
    "F.relu6": ("relu6", F.relu6),
    "F.hardtanh": ("relu6", lambda y: F.hardtanh(y, 0.0, 6.0)),
    "F.hardtanh_": ("relu6", lambda y: F.hardtanh_(y, 0.0, 6.0)),
    "F.elu": ("elu(alpha=1.0)", F.elu),
    "F.elu 0.5": ("elu(alpha=0.5)", lambda y: F.elu(y, 0.5, inplace=True)),
    "F.elu_": ("elu(alpha=0.5)", lambda y: F.elu_(y, 0.5)),
    "F.silu": ("silu", F.silu),
    "F.silu in place": ("silu", lambda y: F.silu(y, inplace=True)),
    "F.gelu": ("gelu", F.gelu),
    "F.gelu tanh": ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
    "F.hardswish": ("hardswish", F.hardswish),
    "F.mish": ("mish", F.mish),
    "torch.sigmoid": ("sigmoid", torch.sigmoid),
    "sigmoid": ("sigmoid", lambda y: y.sigmoid()),
    "sigmoid_": ("sigmoid", lambda y: y.sigmoid_()),
    "F.sigmoid": ("sigmoid", F.sigmoid),
    "torch.tanh": ("tanh", torch.tanh),
    "tanh_": ("tanh", lambda y: y.tanh_()),
    "F.tanh": ("tanh", F.tanh),
}


MODULES: dict[str, tuple[str, Function]] = {
    "ReLU": ("relu", nn.ReLU),
    "ReLU in place": ("relu", lambda: nn.ReLU(inplace=True)),
    "LeakyReLU": ("leaky_relu(negative_slope=0.2)", lambda: nn.LeakyReLU(0.2, inplace=True)),
    "ReLU6": ("relu6", lambda: nn.ReLU6(inplace=True)),
    "ELU": ("elu(alpha=0.5)", lambda: nn.ELU(0.5)),
    "SiLU": ("silu", lambda: nn.SiLU(inplace=True)),
    "GELU": ("gelu", nn.GELU),
    "GELU tanh": ("gelu_tanh", lambda: nn.GELU("tanh")),
    "Hardswish": ("hardswish", lambda: nn.Hardswish(inplace=True)),
    "Sigmoid": ("sigmoid", nn.Sigmoid),
    "Tanh": ("tanh", nn.Tanh),
    "Mish": ("mish", nn.Mish),
}


def in_place(y: Tensor, z: Tensor) -> Tensor:
    """Y += z, as in a forward."""
    y += z
    return y


ADDITIONS: dict[str, Function] = {
    "y + z": lambda y, z: y + z,
    "z + y": lambda y, z: z + y,
    "y += z": in_place,
    "torch.add(y, z)": torch.add,
    "torch.add(z, y)": lambda y, z: torch.add(z, y),
    "torch.add(y, z, alpha=1)": lambda y, z: torch.add(y, z, alpha=1),
    "torch.add(y, other=z)": lambda y, z: torch.add(y, other=z),
    "y.add(z)": lambda y, z: y.add(z),
    "z.add(y)": lambda y, z: z.add(y),
    "y.add_(z)": lambda y, z: y.add_(z),
    "y.__add__(z)": lambda y, z: y.__add__(z),
    "y.__radd__(z)": lambda y, z: y.__radd__(z),
    "y.__iadd__(z)": lambda y, z: y.__iadd__(z),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_spellings_of_activations(name: str) -> None:
    what, function = ACTIVATIONS[name]
    fused = check(lambda self, x, z: function(self.bn(self.conv(x))) * z, [f"batch_norm + {what}", UNUSED])
    [(activation, residual)] = seen_of(fused, *inputs())
    described = activation if isinstance(activation, str) else activation[0]
    assert (described, residual) == (what.partition("(")[0], False)


@pytest.mark.parametrize("name", MODULES)
def test_activation_modules(name: str) -> None:
    what, make = MODULES[name]
    fused = check(lambda self, x, z: self.act(self.bn(self.conv(x))), [f"batch_norm + {what}", UNUSED], make())
    seen = []
    fused.act.forward = lambda y: seen.append(y)
    assert seen_of(fused.eval(), *inputs()) == [(None, False)]  # its own forward: the original runs
    assert len(seen) == 1


@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("name", ADDITIONS)
def test_spellings_of_additions(name: str, activated: bool) -> None:
    add = ADDITIONS[name]
    what = "batch_norm + add + relu" if activated else "batch_norm + add"
    end = F.relu if activated else torch.exp
    fused = check(lambda self, x, z: end(add(self.bn(self.conv(x)), z)), [what, UNUSED])
    assert seen_of(fused, *inputs()) == [("relu" if activated else None, True)]


def both(self: Block, x: Tensor, z: Tensor) -> Tensor:
    return F.relu(self.bn2(self.conv2(z)) + self.bn(self.conv(x)))


def both_in_place(self: Block, x: Tensor, z: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    y += self.bn2(self.conv2(z))
    return y.relu_()


def second_in_place(self: Block, x: Tensor, z: Tensor) -> Tensor:
    y, w = self.bn(self.conv(x)), self.bn2(self.conv2(z))
    w += y
    return w.relu_()


def residual_block(self: Block, x: Tensor, z: Tensor) -> Tensor:
    y = self.act(self.bn(self.conv(x)))
    y = self.bn2(self.conv2(y))
    y += x
    return self.act(y)


def chain_of_fused(self: Block, x: Tensor, z: Tensor) -> Tensor:
    y = self.act(self.bn(self.conv(x)))
    return self.act(self.bn2(self.conv2(z)) + y)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (both, ["its result is the residual of bn2", ADD_RELU]),
        (both_in_place, [ADD_RELU, "its result is the residual of bn"]),
        (second_in_place, ["its result is the residual of bn2", ADD_RELU]),
        (residual_block, [RELU, ADD_RELU]),
        (chain_of_fused, [RELU, ADD_RELU]),
        (lambda self, x, z: self.bn(x).relu(), [RELU, UNUSED]),
        (lambda self, x, z: (lambda s: s.relu() * s)(self.bn(x) + z), [ADD, UNUSED]),
        (lambda self, x, z: F.relu(self.bn(F.conv2d(x, self.conv.weight)) + z[..., :3, :4]), [ADD_RELU, UNUSED]),
    ],
)
def test_combinations(body: Function, expected: list[str]) -> None:
    check(body, expected)


def test_batch_norm_itself_and_not_a_module() -> None:
    norm, report = bn_ext.fuse(nn.BatchNorm2d(3), report=True)
    assert type(norm) is bn_ext.BatchNorm2d
    assert str(report).endswith("0 of 1 batch norms fused")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        bn_ext.fuse([norm])


def test_report_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3))
    expected = """
batch norm  computes           in       reason
0.1         batch_norm + relu  0
1           batch_norm         (model)  nothing to fuse: its result is returned
1 of 2 batch norms fused
"""
    assert str(bn_ext.fuse(model, report=True)[1]) == expected.strip()
    assert bn_ext.fuse(model) is model


def test_fusing_twice_does_nothing_more_and_revert_undoes_it() -> None:
    model = Block(residual_block)
    _, report = bn_ext.fuse(model, report=True)
    kind = type(model)
    assert kind is not Block
    assert isinstance(model, Block)
    assert bn_ext.fuse(model, report=True)[1] == report
    assert type(model) is kind
    bn_ext.revert(model)
    assert type(model) is Block
    assert type(model.bn) is nn.BatchNorm2d


def test_relu6_with_other_bounds_is_no_relu6() -> None:
    """It is a Hardtanh, which reads its bounds in every call."""
    other = nn.ReLU6()
    other.max_val = 0.5
    check(lambda m, x, z: m.act(m.bn(x)), ["nothing to fuse: it is followed by ReLU6", UNUSED], other)
    with pytest.raises(ValueError, match=r"got 'torch\.nn\.modules\.activation\.ReLU6'"):
        bn_ext.BatchNorm2d(3, activation=other)
    fused = check(lambda m, x, z: m.act(m.bn(x)), ["batch_norm + relu6", UNUSED], nn.ReLU6())
    x, z = inputs()
    fused.act.min_val = 0.3
    torch.testing.assert_close(fused(x, z), fused.bn(x).clamp(0.3, 6))
