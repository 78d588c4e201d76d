"""Experiment b: a small residual network, torch.nn's BatchNorm2d against bn_ext's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bn_ext

from .data import Digits, all_finite, batches, measure_accuracy
from .progress import Progress

BATCH_SIZE = 64
LEARNING_RATE = 0.02
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARM_UP_STEPS = 5  # their times are dropped: memory is allocated, kernels are chosen

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Plan:
    """How long to train, and how many steps lie between two measurements of the accuracy."""

    steps: int
    measure_every: int = 10


FULL = Plan(steps=400)
SHORT = Plan(steps=60, measure_every=5)


class Block(nn.Module):
    """A residual block: conv, BN, ReLU, conv, BN, add, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (N, inputs, H, W), to (N, outputs, H / stride, W / stride)."""
        y = nn.functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nn.functional.relu(y + self.shortcut(x))


def build_network(norm: Norm, seed: int) -> nn.Sequential:
    """Build a stem and three blocks, 8 x 8 pixels down to 4 x 4; the seed decides the weights."""
    # Only convolutions and the last layer draw random numbers, so `norm` does not change them.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            norm(32),
            nn.ReLU(),
            Block(32, 32, 1, norm),
            Block(32, 64, 2, norm),
            Block(64, 64, 1, norm),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class Trainee:
    """A network in training, with the record of its losses, its step times and its accuracies."""

    def __init__(self, name: str, model: nn.Module, steps: int, dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        self.model = model
        self.dtype = dtype  # bfloat16: under autocast
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.accuracy: list[float] = []  # on the test images, percent

    def autocast(self) -> torch.autocast:
        """Compute in this trainee's dtype within this context."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def measure(self, digits: Digits) -> None:
        """Add the present accuracy on the test images to the record."""
        with self.autocast():
            self.accuracy.append(measure_accuracy(self.model, digits))

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Do one step: the time is that of forward, backward and the update of the weights."""
        wait_for(images.device)
        start = time.perf_counter()
        with self.autocast():
            loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        wait_for(images.device)
        self.step_seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    def step_milliseconds(self) -> tuple[float, float, float]:
        """Return the lower quartile, the median and the upper quartile of a step's time in ms."""
        milliseconds = [1e3 * seconds for seconds in self.step_seconds[WARM_UP_STEPS:]]
        low, median, high = statistics.quantiles(milliseconds, n=4)
        return low, median, high

    @property
    def finite(self) -> bool:
        """Whether every weight and every running statistic is finite."""
        return all_finite(self.model)


@dataclass(frozen=True)
class Comparison:
    """The outcome of experiment b; the lists of the trainees belong to the same steps."""

    torch_nn: Trainee
    bn_ext: Trainee
    nudged: Trainee  # torch.nn again, the first weights moved by one rounding
    measured_at: list[int]  # steps of the entries of each trainee's `accuracy`


def wait_for(device: torch.device) -> None:
    """Wait until `device` has done its work, without which a clock sees only the launches."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def largest_difference(left: Trainee, right: Trainee) -> float:
    """Return the largest absolute difference between two networks' weights."""
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Move each weight of the first layer to the next float: a change of one rounding."""
    weight = next(model.parameters())
    weight.copy_(weight.nextafter(torch.full_like(weight, float("inf"))))


def run(digits: Digits, plan: Plan, seed: int) -> Comparison:
    """Train the networks step by step in turn, so that a noisy machine slows all alike.

    The nudged network shows how far training alone drives two networks apart which begin one
    rounding apart: the scale by which to judge the difference between torch.nn and bn_ext.
    """
    device = digits.train_images.device

    def trainee(name: str, norm: Norm) -> Trainee:
        return Trainee(name, build_network(norm, seed).to(device), plan.steps)

    torch_nn = trainee("torch.nn", nn.BatchNorm2d)
    ours = trainee("bn_ext", bn_ext.BatchNorm2d)
    nudged = trainee("torch.nn, nudged", nn.BatchNorm2d)
    nudge(nudged.model)
    # Reversed after each step: either of the two that are compared follows the third or itself.
    trainees = [torch_nn, nudged, ours]
    measured_at = []
    with Progress("(b) torch.nn and bn_ext in turn", plan.steps) as progress:
        for images, labels in batches(digits, BATCH_SIZE, plan.steps, seed):
            for each in trainees:
                each.step(images, labels)
            trainees.reverse()
            progress.advance()
            if progress.done % plan.measure_every == 0:
                measured_at.append(progress.done)
                for each in trainees:
                    each.measure(digits)
    return Comparison(torch_nn, ours, nudged, measured_at)
