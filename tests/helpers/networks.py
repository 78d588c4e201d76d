"""Small networks of the kinds that people train: written out here, or from transformers' and torchvision's classes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Batch norm and ReLU before each convolution."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return F.dropout(self.conv2(self.relu(self.norm2(y))), 0.1, training=self.training)


class DenseBlock(nn.ModuleDict):
    """Each layer sees the results of all before it."""

    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__({f"layer{i}": DenseLayer(channels + i * growth, growth) for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """After Huang et al. 2017 (arXiv 1608.06993)."""

    def __init__(self, growth: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(DenseBlock(2, 8, growth), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1)),
            *(nn.AvgPool2d(2), DenseBlock(2, 8, growth), nn.BatchNorm2d(16)),
        )
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


class SqueezeExcite(nn.Module):
    """Scales channels by what is in all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True)
        return x * F.hardsigmoid(self.expand(y), inplace=True)


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, squeeze and excite, project; and a sum where shapes allow it."""

    def __init__(self, channels: int, expanded: int, out: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.use_residual = stride == 1 and channels == out
        self.block = nn.Sequential(
            *(nn.Conv2d(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded), activation(inplace=True)),
            nn.Conv2d(expanded, expanded, 3, stride, 1, groups=expanded, bias=False),
            *(nn.BatchNorm2d(expanded), activation(inplace=True), SqueezeExcite(expanded)),
            *(nn.Conv2d(expanded, out, 1, bias=False), nn.BatchNorm2d(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.use_residual:
            y += x
        return y


class MobileNetV3(nn.Sequential):
    """After Howard et al. 2019 (arXiv 1905.02244)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, 0.001, 0.01), nn.Hardswish(inplace=True)),
            *(InvertedResidual(8, 16, 8, 1, nn.ReLU), InvertedResidual(8, 16, 12, 2, nn.Hardswish)),
            InvertedResidual(12, 24, 12, 1, nn.Hardswish),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.Hardswish(), nn.Dropout(0.2)),
            nn.Linear(16, classes),
        )


class ResidualLayer(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            identity = self.downsample(x)
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    """After He et al. 2015 (arXiv 1512.03385), for small images."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)
        self.layers = nn.Sequential(ResidualLayer(8, 8, 1), ResidualLayer(8, 16, 2))
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def of_transformers(name: str) -> nn.Module:
    """A tiny classifier, by configuration alone."""
    import transformers

    small: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "bottleneck"},
        "MobileNetV1": {"depth_multiplier": 0.25, "min_depth": 4},
        "MobileNetV2": {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4},
        "EfficientNet": {
            "width_coefficient": 0.2,
            "depth_coefficient": 0.2,
            "depth_divisor": 4,
            "hidden_dim": 256,
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "strides": [1, 2],
            "kernel_sizes": [3, 5],
            "expand_ratios": [1, 6],
            "num_block_repeats": [1, 6],
        },
    }
    config = getattr(transformers, f"{name}Config")(num_labels=5, **small[name])
    model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {"DenseNet": DenseNet, "MobileNetV3": MobileNetV3, "ResNet": ResNet}
