"""bn_ext.fuse: every spelling of an activation and an addition is found, and what is not safe is left alone."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import Block, assert_same, calls, fused_and_stock, inputs
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


def check(body: Function, expected: list[str], activation: nn.Module | None = None, **others: Any) -> nn.Module:
    """Fuse a Block: the report says what is expected, and it does what it did."""
    fused, stock, told = fused_and_stock(Block(body, activation))
    assert told == expected
    assert_same(fused, stock, inputs(), **others)
    return fused


def calls_of(model: nn.Module, *arguments: Tensor) -> list[tuple[Any, bool]]:
    with calls() as seen:
        model(*arguments)
    return seen


UNUSED = "no traced forward calls it"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_spellings_of_activations(name: str) -> None:
    what, function = ACTIVATIONS[name]
    fused = check(lambda self, x, z: function(self.bn(self.conv(x))) * z, [f"batch_norm + {what}", UNUSED])
    [(activation, residual)] = calls_of(fused, *inputs())
    described = activation if isinstance(activation, str) else activation[0]
    assert (described, residual) == (what.partition("(")[0], False)


@pytest.mark.parametrize("name", MODULES)
def test_activation_modules(name: str) -> None:
    what, make = MODULES[name]
    fused = check(lambda self, x, z: self.act(self.bn(self.conv(x))), [f"batch_norm + {what}", UNUSED], make())
    seen = []
    fused.act.forward = lambda y: seen.append(y)
    assert calls_of(fused.eval(), *inputs()) == [(None, False)]  # its own forward: the original runs
    assert len(seen) == 1


@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("name", ADDITIONS)
def test_spellings_of_additions(name: str, activated: bool) -> None:
    add = ADDITIONS[name]
    what = "batch_norm + add + relu" if activated else "batch_norm + add"
    end = F.relu if activated else torch.exp
    fused = check(lambda self, x, z: end(add(self.bn(self.conv(x)), z)), [what, UNUSED])
    assert calls_of(fused, *inputs()) == [("relu" if activated else None, True)]


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


ADD, ADD_RELU, RELU = "batch_norm + add", "batch_norm + add + relu", "batch_norm + relu"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (both, ["it is what bn2 adds", ADD_RELU]),
        (both_in_place, [ADD_RELU, "it is what bn adds"]),
        (second_in_place, ["it is what bn2 adds", ADD_RELU]),
        (residual_block, [RELU, ADD_RELU]),
        (chain_of_fused, [RELU, ADD_RELU]),
        (lambda self, x, z: self.bn(x).relu(), [RELU, UNUSED]),
        (lambda self, x, z: (lambda s: s.relu() * s)(self.bn(x) + z), [ADD, UNUSED]),
        (lambda self, x, z: F.relu(self.bn(F.conv2d(x, self.conv.weight)) + z[..., :3, :4]), [ADD_RELU, UNUSED]),
    ],
)
def test_combinations(body: Function, expected: list[str]) -> None:
    check(body, expected)


def meanwhile(change: Function, fresh: bool) -> Function:
    """A body in which something is changed between the batch norm and the addition of what is so far not read."""

    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        x = self.conv(x) if fresh else x * 2
        y = self.bn(x)
        w = change(self, z if fresh else x)
        return F.relu(y + w)

    return body


def doubled_by_statement(self: Block, t: Tensor) -> Tensor:
    t *= 2
    return t


CHANGES: dict[str, Function] = {
    "method": lambda self, t: t.mul_(2),
    "statement": doubled_by_statement,
    "function": lambda self, t: torch.relu_(t),
    "inplace": lambda self, t: F.relu(t, inplace=True),
    "inplace by position": lambda self, t: F.dropout(t, 0.0, True, True),
    "module": lambda self, t: self.act(t),
    "operator": lambda self, t: operator.imul(t, 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_input_that_is_changed_in_place_meanwhile(name: str) -> None:
    """Where the batch norm's input is out of reach of others, it is fused all the same."""
    model = Block(meanwhile(CHANGES[name], fresh=False), nn.ReLU(inplace=True))
    fused, stock, told = fused_and_stock(model)
    assert told == ["its input may be changed in place before the activation or addition", UNUSED]
    with torch.no_grad():  # a batch norm saves its input: torch refuses the backward pass
        for training in (True, False):
            results = [m.train(training)(*arguments) for m in (fused, stock) for arguments in [inputs_of_seed()]]
            torch.testing.assert_close(*results)
    check(meanwhile(CHANGES[name], fresh=True), [ADD_RELU, UNUSED], nn.ReLU(inplace=True))


def inputs_of_seed() -> tuple[Tensor, Tensor]:
    """The same in each call."""
    torch.manual_seed(0)
    return inputs()


def summand_changed_later(self: Block, x: Tensor, z: Tensor) -> Tensor:
    z = z * 1
    y = F.hardswish(self.bn(self.conv(x)) + z)
    z.flatten(1).mul_(2)
    return y + z


def summand_changed_before_the_activation(self: Block, x: Tensor, z: Tensor) -> Tensor:
    z = z * 1
    s = self.bn(self.conv(x)) + z
    w = z.detach().mul_(2)
    return F.relu(s) + w


def write_to_the_other(self: Block, x: Tensor, z: Tensor) -> Tensor:
    z = z * 1
    w = z.view_as(z)
    z += self.bn(self.conv(x))
    return z.relu() + w


def twice(self: Block, x: Tensor, z: Tensor) -> Tensor:
    return self.bn(self.bn(x).relu()).relu()


UNSAFE: dict[str, tuple[Function, str]] = {
    "used elsewhere": (lambda self, x, z: (y := self.bn(x)).relu() + y.sum(), "its result is used 2 times"),
    "returned too": (lambda self, x, z: ((y := self.bn(x)).relu(), y), "its result is used 2 times"),
    "returned": (lambda self, x, z: self.bn(x), "nothing to fuse: its result is returned"),
    "unused": (lambda self, x, z: (self.bn(x), z * 2)[1], "its result is not used"),
    "doubled": (lambda self, x, z: (lambda y: y + y)(self.bn(x)).relu(), "its result is added to itself"),
    "number": (lambda self, x, z: (self.bn(x) + 1).relu(), "nothing to fuse: it is followed by add"),
    "alpha": (lambda self, x, z: torch.add(self.bn(x), z, alpha=2), "nothing to fuse: it is followed by add"),
    "hardtanh": (lambda self, x, z: F.hardtanh(self.bn(x)), "nothing to fuse: it is followed by hardtanh"),
    "softplus": (lambda self, x, z: F.softplus(self.bn(x)), "nothing to fuse: it is followed by softplus"),
    "slope given": (lambda self, x, z: F.prelu(self.bn(x), z[0, :, 0, 0]), "nothing to fuse: it is followed by prelu"),
    "twice": (twice, "it is called more than once"),
    "other tensor written": (write_to_the_other, "the addition writes to the other tensor"),
    "summand changed": (summand_changed_later, "what is added to it is changed in place later"),
    "summand changed early": (
        summand_changed_before_the_activation,
        "what is added to it is changed in place later",
    ),
    "statistics": (
        lambda self, x, z: self.bn(x).relu() + self.bn.running_mean[:, None, None],
        "its parameters or statistics are also used elsewhere",
    ),
    "keyword": (lambda self, x, z: self.bn(input=x).relu(), "it is called with other arguments"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_places_are_left_alone(name: str) -> None:
    body, reason = UNSAFE[name]
    fused = check(body, [reason, UNUSED])
    assert set(calls_of(fused, *inputs())) == {(None, False)}


def test_summand_changed_later_by_a_module() -> None:
    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        z = z * 1
        y = F.hardswish(self.bn(self.conv(x)) + z)
        return y + self.act(z)

    check(body, ["what is added to it is changed in place later", UNUSED], nn.ReLU(inplace=True))
    check(body, ["batch_norm + add + hardswish", UNUSED], nn.ReLU())


def test_aliases_of_what_is_added_in_place() -> None:
    """torch.fx has no x += y; w is the same tensor as y, so it must see the sum."""

    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        y = x * 2
        w = y
        y *= 3
        y -= z
        return self.bn(self.conv(x)).relu() + y + w

    assert calls_of(check(body, [RELU, UNUSED]), *inputs()) == [("relu", False)]


def test_integers_that_are_raised_are_not_shared() -> None:
    def body(self: Block, x: Tensor, z: Tensor) -> Tensor:
        n = x.shape[0]
        m = n
        n += 1
        return self.bn(self.conv(x)).relu() * n + m

    check(body, [RELU, UNUSED])


class Sub(nn.BatchNorm2d):
    """Who knows."""


@pytest.mark.filterwarnings("ignore:bn_ext.convert left these alone")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Sub(3), "it is a Sub, which may do something else"),
        (lambda: bn_ext.BatchNorm2d(3, activation="silu"), "it has an activation of its own"),
        (lambda: nn.LazyBatchNorm2d(), "it is lazy: run the model once, then fuse"),
    ],
)
def test_batch_norms_of_other_kinds(make: Function, reason: str) -> None:
    model, report = bn_ext.fuse(nn.Sequential(make(), nn.ReLU()), report=True)
    assert [row.reason for row in report.rows] == [reason]
    assert not report.fused
    torch.testing.assert_close(model(torch.randn(2, 3, 4, 4)).shape, torch.Size([2, 3, 4, 4]))


HOOKS: dict[str, Function] = {
    "forward": lambda m, f: m.register_forward_hook(lambda m, i, o: f()),
    "forward pre": lambda m, f: m.register_forward_pre_hook(lambda m, i: f()),
    "backward": lambda m, f: m.register_full_backward_hook(lambda m, i, o: f()),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, o: f()),
}


@pytest.mark.parametrize("where", ["bn", "act"])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_still_run(kind: str, later: bool, where: str) -> None:
    model, called = Block(lambda self, x, z: self.act(self.bn(self.conv(x)))), []

    def hook() -> None:
        HOOKS[kind](getattr(model, where), lambda: called.append(1))

    if not later:
        hook()
    fused, _, told = fused_and_stock(model)
    reasons = {"bn": "it has hooks, or a forward of its own", "act": "nothing to fuse: it is followed by ReLU"}
    assert told[0] == (RELU if later else reasons[where])
    if later:
        assert calls_of(fused, *inputs()) == [("relu", False)]
        hook()
    fused(*inputs()).sum().backward()
    assert called == [1]


def test_batch_norm_itself_and_not_a_module() -> None:
    norm, report = bn_ext.fuse(nn.BatchNorm2d(3), report=True)
    assert type(norm) is bn_ext.BatchNorm2d
    assert str(report).endswith("0 of 1 batch norms fused")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        bn_ext.fuse([norm])


def test_report_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3))
    expected = """
batch norm  does               in       why no more
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
