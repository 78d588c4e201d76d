"""Five image networks, written out: torchvision's layers in torchvision's order, in place where it works in place.

Dropout and stochastic depth are left out: they draw random numbers, and what they do has nothing to do with batch norm.
Initial values are He's for the convolutions and torch's own for the rest.

Sources: He et al. 2016 (arXiv 1512.03385) with the stride in the 3x3 convolution ("v1.5"); Huang et al. 2017
(1608.06993); Howard et al. 2019 (1905.02244); Tan and Le 2019 (1905.11946).
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

CLASSES = 1000
Activation = Callable[[], nn.Module]
relu = partial(nn.ReLU, inplace=True)
hardswish = partial(nn.Hardswish, inplace=True)
silu = partial(nn.SiLU, inplace=True)


def conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Make a convolution that keeps the plane's size at stride 1, without a bias: batch norm has one."""
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)


def classifier(features: nn.Sequential, *head: nn.Module) -> nn.Sequential:
    """Put the mean over the plane and a head behind `features`, and draw the convolutions' weights."""
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


class Residual(nn.Module):
    """ResNet's block: convolutions with batch norm, plus the input, and ReLU."""

    def __init__(self, convolutions: list[nn.Conv2d], stride: int):
        super().__init__()
        channels, out = convolutions[0].in_channels, convolutions[-1].out_channels
        layers: list[nn.Module] = []
        for each in convolutions:
            layers += [each, nn.BatchNorm2d(each.out_channels), relu()]
        self.branch = nn.Sequential(*layers[:-1])
        self.relu = relu()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(conv(channels, out, stride=stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Add branch and shortcut."""
        y = self.branch(x)
        y += self.shortcut(x)
        return self.relu(y)  # type: ignore[no-any-return]


def basic(channels: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions."""
    return Residual([conv(channels, width, 3, stride), conv(width, width, 3)], stride)


def bottleneck(channels: int, width: int, stride: int) -> Residual:
    """A 3x3 convolution between two 1x1 ones, the last four times as wide."""
    return Residual([conv(channels, width), conv(width, width, 3, stride), conv(width, 4 * width)], stride)


def resnet(block: Callable[[int, int, int], Residual], expansion: int, repeats: Iterable[int]) -> nn.Module:
    """ResNet: four stages of blocks, each half as large and twice as wide as the one before."""
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.BatchNorm2d(64), relu(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(repeats):
        width = 64 << stage
        for index in range(count):
            layers.append(block(channels, width, 2 if stage and not index else 1))
            channels = width * expansion
    return classifier(nn.Sequential(*layers), nn.Linear(channels, CLASSES))


def before_conv(channels: int, convolution: nn.Conv2d) -> list[nn.Module]:
    """Batch norm and ReLU before the convolution, as in DenseNet."""
    return [nn.BatchNorm2d(channels), relu(), convolution]


class DenseBlock(nn.Module):
    """DenseNet's block: each layer sees what all layers before it gave."""

    def __init__(self, channels: int, growth: int, count: int):
        super().__init__()
        width = 4 * growth
        self.layers = nn.ModuleList(
            nn.Sequential(
                *before_conv(channels + index * growth, conv(channels + index * growth, width)),
                *before_conv(width, conv(width, growth, 3)),
            )
            for index in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Collect the features."""
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet121() -> nn.Module:
    """DenseNet-121: four dense blocks; between them, half the channels on a quarter of the plane."""
    growth, channels = 32, 64
    layers: list[nn.Module] = [conv(3, channels, 7, 2), nn.BatchNorm2d(channels), relu(), nn.MaxPool2d(3, 2, 1)]
    for index, count in enumerate((6, 12, 24, 16)):
        if index:
            layers += [*before_conv(channels, conv(channels, channels // 2)), nn.AvgPool2d(2)]
            channels //= 2
        layers.append(DenseBlock(channels, growth, count))
        channels += count * growth
    layers += [nn.BatchNorm2d(channels), relu()]
    return classifier(nn.Sequential(*layers), nn.Linear(channels, CLASSES))


class SqueezeExcite(nn.Module):
    """Scale each channel by what a small network makes of all channels' means."""

    def __init__(self, channels: int, squeezed: int, activation: Activation, gate: Activation):
        super().__init__()
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            activation(),
            nn.Conv2d(squeezed, channels, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the scales."""
        return self.scale(x) * x  # type: ignore[no-any-return]


def conv_norm(
    channels: int, out: int, *sizes: int, activation: Activation, eps: float, momentum: float
) -> list[nn.Module]:
    """Convolution, batch norm, activation."""
    return [conv(channels, out, *sizes), nn.BatchNorm2d(out, eps=eps, momentum=momentum), activation()]


class InvertedResidual(nn.Module):
    """A depthwise convolution between two 1x1 ones, wide inside; plus the input where the shapes agree."""

    def __init__(
        self,
        channels: int,
        wide: int,
        out: int,
        kernel: int,
        stride: int,
        layer: Callable[..., list[nn.Module]],  # conv_norm, with all but its sizes and activation
        activation: Activation,
        squeeze: nn.Module | None,
    ):
        super().__init__()
        layers = layer(channels, wide, activation=activation) if wide != channels else []
        layers += layer(wide, wide, kernel, stride, wide, activation=activation)
        layers += [squeeze] if squeeze is not None else []
        layers += layer(wide, out, activation=nn.Identity)[:-1]
        self.branch = nn.Sequential(*layers)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Apply the branch."""
        y: Tensor = self.branch(x)
        if self.adds:
            y += x
        return y


def mobilenet_v3_large() -> nn.Module:
    """MobileNetV3-Large."""
    layer = partial(conv_norm, eps=1e-3, momentum=0.01)
    layers = layer(3, 16, 3, 2, activation=hardswish)
    channels = 16
    for kernel, wide, out, squeezed, activation, stride in (
        (3, 16, 16, 0, relu, 1),
        (3, 64, 24, 0, relu, 2),
        (3, 72, 24, 0, relu, 1),
        (5, 72, 40, 24, relu, 2),
        (5, 120, 40, 32, relu, 1),
        (5, 120, 40, 32, relu, 1),
        (3, 240, 80, 0, hardswish, 2),
        (3, 200, 80, 0, hardswish, 1),
        (3, 184, 80, 0, hardswish, 1),
        (3, 184, 80, 0, hardswish, 1),
        (3, 480, 112, 120, hardswish, 1),
        (3, 672, 112, 168, hardswish, 1),
        (5, 672, 160, 168, hardswish, 2),
        (5, 960, 160, 240, hardswish, 1),
        (5, 960, 160, 240, hardswish, 1),
    ):
        squeeze = SqueezeExcite(wide, squeezed, nn.ReLU, nn.Hardsigmoid) if squeezed else None
        layers.append(InvertedResidual(channels, wide, out, kernel, stride, layer, activation, squeeze))
        channels = out
    layers += layer(channels, 960, activation=hardswish)
    return classifier(nn.Sequential(*layers), nn.Linear(960, 1280), hardswish(), nn.Linear(1280, CLASSES))


def efficientnet_b0() -> nn.Module:
    """EfficientNet-B0."""
    layer = partial(conv_norm, eps=1e-5, momentum=0.1)
    layers = layer(3, 32, 3, 2, activation=silu)
    channels = 32
    for expand, kernel, first_stride, out, count in (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    ):
        for stride in (first_stride, *[1] * (count - 1)):
            wide = expand * channels
            squeeze = SqueezeExcite(wide, channels // 4, silu, nn.Sigmoid)
            layers.append(InvertedResidual(channels, wide, out, kernel, stride, layer, silu, squeeze))
            channels = out
    layers += layer(channels, 1280, activation=silu)
    return classifier(nn.Sequential(*layers), nn.Linear(1280, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(resnet, basic, 1, (2, 2, 2, 2)),
    "resnet50": partial(resnet, bottleneck, 4, (3, 4, 6, 3)),
    "densenet121": densenet121,
    "mobilenet_v3_large": mobilenet_v3_large,
    "efficientnet_b0": efficientnet_b0,
}
