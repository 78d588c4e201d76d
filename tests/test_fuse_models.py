"""bn_ext.fuse on whole networks: what is found in each, and the same loss, gradients, statistics and state_dict."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import assert_same, calls, fused_and_stock
from helpers.networks import NETWORKS, ResNet, of_transformers
from torch import Tensor, nn

import bn_ext

# Roundings of float64, 1e-16 each, that up to 60 batch norms over four values each multiply by up to 1e8.
TOLERANCE = 1e-7

# How many batch norms do what; the others end a branch that something else than an activation or a sum follows.
EXPECTED: dict[str, dict[str, int]] = {
    "DenseNet": {"batch_norm + relu": 11},
    "MobileNetV3": {"batch_norm + hardswish": 5, "batch_norm + relu": 2, "batch_norm + add": 2},
    "ResNet": {"batch_norm + relu": 3, "batch_norm + add + relu": 2},
}
OF_TRANSFORMERS: dict[str, dict[str, int]] = {
    "ResNet": {"batch_norm + relu": 7, "batch_norm + add + relu": 3},
    "MobileNetV1": {"batch_norm + relu6": 27},
    "MobileNetV2": {"batch_norm + relu6": 35, "batch_norm + add": 10},
    "EfficientNet": {"batch_norm + silu": 6, "batch_norm in training, batch_norm + add in evaluation": 1},  # a dropout
}
OF_TORCHVISION: dict[str, dict[str, int]] = {
    "resnet18": {"batch_norm + relu": 9, "batch_norm + add + relu": 8},
    "resnet50": {"batch_norm + relu": 33, "batch_norm + add + relu": 16},
    "densenet121": {"batch_norm + relu": 121},
    "mobilenet_v2": {"batch_norm + relu6": 35, "batch_norm + add": 10},
    "mobilenet_v3_small": {"batch_norm + hardswish": 18, "batch_norm + relu": 5, "batch_norm + add": 6},
    "efficientnet_b0": {"batch_norm + silu": 33},
}


def check(model: nn.Module, expected: dict[str, int], size: int, modes: tuple[bool, ...] = (True, True, False)) -> None:
    """Fused and stock are the same, and the batch norms are called as the report says."""
    fused, stock, _ = fused_and_stock(model.double())
    _, report = bn_ext.fuse(fused, report=True)
    done = [row.what for row in report.fused]
    assert {what: done.count(what) for what in done} == expected
    x = torch.randn(4, 3, size, size, dtype=torch.float64, requires_grad=True)
    with calls() as seen:
        assert_same(fused, stock, (x,), lambda output: getattr(output, "logits", output), modes, TOLERANCE)
    assert len(seen) == len(modes) * len(report.rows)
    described = ["batch_norm" + " + add" * residual + (f" + {name}" if name else "") for name, residual in seen]
    counted: Counter[str] = Counter()
    for training in modes:
        for what, count in expected.items():
            counted[what_in(what, training)] += count
    counted["batch_norm"] += len(seen) - counted.total()
    assert Counter(described) == counted


def what_in(what: str, training: bool) -> str:
    """What a batch norm does in one mode, of what the report says of both."""
    one, _, other = what.removesuffix(" in evaluation").partition(" in training, ")
    return one if training or not other else other


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    check(NETWORKS[name](), EXPECTED[name], 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_networks_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    check(of_transformers(name), OF_TRANSFORMERS[name], 32)


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_networks_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    check(getattr(models, name)(num_classes=5), OF_TORCHVISION[name], 32, (True, False))


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Of twenty steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    values: list[float] = []
    for _ in range(20):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def test_training_of_a_resnet() -> None:
    model = ResNet()
    fused = bn_ext.fuse(copy.deepcopy(model))
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 5
    expected = losses(model, images, labels)
    assert expected[-1] < expected[0] / 2
    # Roundings of float32 in another order, 1e-7 each, are multiplied by every step of training: by some 1e3 in all.
    torch.testing.assert_close(losses(fused, images, labels), expected, rtol=1e-3, atol=1e-3)
    evaluated: list[Any] = [m.eval()(images) for m in (fused, model)]
    torch.testing.assert_close(*evaluated, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_compiled_network() -> None:
    model = ResNet().double()
    stock = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(bn_ext.fuse(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for _ in range(2):
        actual, expected = compiled(x), stock(x)
        torch.testing.assert_close(actual, expected)
        actual.square().sum().backward(), expected.square().sum().backward()
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(model.state_dict(), stock.state_dict())
