"""Stand-ins for classes of timm and torchvision where these are not installed: the same names, children and order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, _assert, nn


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm, then the child `drop`, then the child `act`."""

    def __init__(
        self,
        num_features: int,
        *,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        drop_layer: Callable[[], nn.Module] = nn.Identity,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        self.drop = drop_layer()
        self.act = act_layer(**(act_kwargs or {})) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        _assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """A batch norm of buffers only, by its formula."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.full((num_features,), float(name in ("weight", "running_var"))))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class FrozenBatchNormAct2d(nn.Module):
    """The same, then the child `drop`, then the child `act`."""

    def __init__(
        self, num_features: int, act_layer: Callable[[], nn.Module] = nn.ReLU, drop_layer: Any = nn.Identity
    ) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.full((num_features,), float(name in ("weight", "running_var"))))
        self.drop, self.act = drop_layer(), act_layer()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return self.act(self.drop(x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)))


BatchNormAct2d.__module__ = FrozenBatchNormAct2d.__module__ = "timm.layers.norm_act"
FrozenBatchNorm2d.__module__ = "torchvision.ops.misc"
