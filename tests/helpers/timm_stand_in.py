"""A stand-in for timm.layers.norm_act where timm is not installed: the same class name, children and order."""

from collections.abc import Callable
from typing import Any

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


BatchNormAct2d.__module__ = "timm.layers.norm_act"
