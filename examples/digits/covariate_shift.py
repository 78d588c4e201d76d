"""Experiment a: what BN does to the inputs of sigmoids, after figure 1 of the paper.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, section 4.1. Three hidden layers of 100 sigmoids, mini-batches of
60 and small Gaussian weights are the paper's; the 8 x 8 digits stand in for its 28 x 28 ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import bn_ext

from .data import Digits, all_finite, batches, measure_accuracy
from .progress import Progress

PIXELS = 64
UNITS = 100
CLASSES = 10
BATCH_SIZE = 60
WEIGHT_DEVIATION = 0.1
# Chosen for the network without BN: at 0.1 it needs five times as many steps to 90 % as at 1.0, at 4.0
# a quarter fewer. So what BN gains is not the gain of a learning rate that suits only BN.
LEARNING_RATE = 1.0
PERCENTILES = (15, 50, 85)

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Plan:
    """How long to train each network, and how many steps lie between two measurements."""

    steps: int
    measure_every: int = 20


FULL = Plan(steps=4000)
SHORT = Plan(steps=1000)


@dataclass
class Curve:
    """What one network did during training; entry i of each list was measured at `steps[i]`."""

    name: str
    losses: list[float] = field(default_factory=list)  # of every step, not only the measured ones
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # on the test images, percent
    percentiles: list[Tensor] = field(default_factory=list)  # each (3, UNITS), see PERCENTILES
    finite: bool = True  # every weight and every running statistic at the end

    def steps_to(self, accuracy: float) -> int | None:
        """Return the first measured step with at least this test accuracy in percent, if any."""
        reached = (s for s, a in zip(self.steps, self.accuracy, strict=True) if a >= accuracy)
        return next(reached, None)

    def wander(self) -> Tensor:
        """Return how far the median input of each unit moved: highest minus lowest, (UNITS,)."""
        medians = torch.stack(self.percentiles)[:, 1]
        return medians.amax(dim=0) - medians.amin(dim=0)

    def spread(self, index: int) -> float:
        """Return the 85th minus the 15th percentile at a measurement, averaged over the units."""
        low, _, high = self.percentiles[index]
        return float((high - low).mean())


def typical_unit(curve: Curve) -> int:
    """Return the unit whose input wandered as far as the median unit's: not the showiest one."""
    return int(curve.wander().argsort()[UNITS // 2])


def build_network(norm: Norm | None, seed: int) -> nn.Sequential:
    """Build the sigmoid network; the same seed gives the same weights with and without BN."""
    generator = torch.Generator().manual_seed(seed)

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs)
        nn.init.normal_(layer.weight, std=WEIGHT_DEVIATION, generator=generator)
        nn.init.zeros_(layer.bias)
        return layer

    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (PIXELS, UNITS, UNITS):
        layers.append(linear(inputs, UNITS))
        if norm is not None:
            layers.append(norm(UNITS))
        layers.append(nn.Sigmoid())
    return nn.Sequential(*layers, linear(UNITS, CLASSES))


class InputRecorder:
    """Gathers what a layer receives while training, the very mini-batches it learns from."""

    def __init__(self, layer: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        layer.register_forward_pre_hook(self._gather)

    def _gather(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            self.inputs.append(inputs[0].detach())

    def take_percentiles(self) -> Tensor:
        """Return the percentiles of each unit's gathered inputs, (3, UNITS), and start afresh."""
        gathered = torch.cat(self.inputs)
        self.inputs.clear()
        shares = torch.tensor(PERCENTILES, dtype=gathered.dtype, device=gathered.device) / 100
        return gathered.quantile(shares, dim=0).cpu()


def train(name: str, norm: Norm | None, digits: Digits, plan: Plan, seed: int) -> Curve:
    """Train one network by plain SGD and return its curve."""
    model = build_network(norm, seed).to(digits.train_images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    recorder = InputRecorder(model[-2])
    curve = Curve(name)
    losses = []
    with Progress(f"(a) {name}", plan.steps, is_timed=False) as progress:
        for images, labels in batches(digits, BATCH_SIZE, plan.steps, seed):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            progress.advance()
            if progress.done % plan.measure_every == 0:
                curve.steps.append(progress.done)
                curve.accuracy.append(measure_accuracy(model, digits))
                curve.percentiles.append(recorder.take_percentiles())
    curve.losses = torch.stack(losses).tolist()
    curve.finite = all_finite(model)
    return curve


def run(digits: Digits, plan: Plan, seed: int) -> list[Curve]:
    """Train without BN, with torch.nn's and with bn_ext's: the same weights, the same batches."""
    norms: dict[str, Norm | None] = {
        "no BN": None,
        "torch.nn BN": nn.BatchNorm1d,
        "bn_ext BN": bn_ext.BatchNorm1d,
    }
    return [train(name, norm, digits, plan, seed) for name, norm in norms.items()]
