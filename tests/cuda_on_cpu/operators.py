"""The kernels on the simulated device as a differentiable operator on CPU tensors, for bn_ext.testing.check."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch_norm import Settings, kernels
from .structs import SAVED, Shape, activation

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x are adjacent; other than contiguous counts as that."""
    return not x.is_contiguous() or math.prod(x.shape[2:]) == 1


def shape_of(x: Tensor) -> Shape:
    """As batch_norm.cpp describes a tensor."""
    return Shape(x.shape[0], x.shape[1], math.prod(x.shape[2:]), is_channels_last(x))


def memory_of(x: Tensor) -> NDArray[Any]:
    """A dense tensor's values in the order in which they lie, bfloat16 as uint16."""
    flat = torch.as_strided(x.detach(), (x.numel(),), (1,))
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy()


def like(x: Tensor, memory: NDArray[Any]) -> Tensor:
    """A tensor laid out as x, of values as they lie."""
    values = torch.from_numpy(memory.copy()).view(x.dtype)
    return torch.as_strided(values, x.shape, x.stride())


def tensor_of(memory: NDArray[Any] | None, dtype: torch.dtype) -> Tensor | None:
    """A vector of the device."""
    return None if memory is None else torch.from_numpy(memory.copy()).view(dtype)


@dataclass
class Call:
    """What one pass was given and gave, and what the device counted."""

    plan: Any
    launches: int
    counters: dict[str, Any]
    calls: list[str]


class CudaOnCpu:
    """Called like torch.nn.functional.batch_norm; `calls` tells of the passes that ran."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.calls: list[Call] = []

    def __call__(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        num_batches_tracked: Tensor | None = None,
        *,
        activation: str | None = None,
        alpha: float = 0.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalise x, add the residual, activate; the running statistics and the count change in place.

        `alpha`: leaky_relu's slope or elu's alpha.
        """
        vectors = {
            "running_mean": running_mean,
            "running_var": running_var,
            "num_batches_tracked": num_batches_tracked,
        }
        options = _Options(training, momentum, eps, activation, alpha)
        return _Function.apply(self, x, weight, bias, residual, vectors, options)

    def record(self, results: dict[str, Any]) -> None:
        """Keep what the device says of the pass that just ran."""
        device = kernels().device
        counters = {kind: device.counters(kind) for kind in ("activation", "parameter", "workspace")}
        self.calls.append(Call(results["plan"], device.launch_count(), counters, device.calls()))


def _params_dtype(x: Tensor, *vectors: Tensor | None) -> torch.dtype:
    defined = [vector.dtype for vector in vectors if vector is not None]
    return defined[0] if defined else torch.promote_types(x.dtype, torch.float32)


def _memories(vectors: dict[str, Tensor | None]) -> dict[str, NDArray[Any] | None]:
    return {name: None if vector is None else memory_of(vector) for name, vector in vectors.items()}


@dataclass
class _Options:
    training: bool
    momentum: float | None
    eps: float
    activation: str | None
    alpha: float

    @property
    def has_mask(self) -> bool:
        return self.activation in ("relu", "leaky_relu", "relu6")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: CudaOnCpu,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        z: Tensor | None,
        running: dict[str, Tensor | None],
        options: _Options,
    ) -> Tensor:
        params = _params_dtype(x, weight, bias, running["running_mean"])
        results = kernels().forward(
            shape_of(x),
            _NAMES[x.dtype],
            _NAMES[params],
            memory_of(x),
            _memories({"weight": weight, "bias": bias, **running}),
            operator.settings,
            training=options.training,
            momentum=options.momentum,
            eps=options.eps,
            activation=activation(options.activation, options.alpha),
            z=None if z is None else memory_of(z),
            masks=options.has_mask and z is not None,
        )
        operator.record(results)
        for name, vector in running.items():
            if vector is not None:
                vector.copy_(tensor_of(results[name], vector.dtype).view_as(vector))
        # As with a mask: without an activation g is dy, and z is not needed.
        needs_z = z is not None and options.activation is not None and not options.has_mask
        ctx.save_for_backward(x, z if needs_z else None)
        ctx.saved, ctx.mask = {name: results[name] for name in SAVED}, results["mask"]
        ctx.operator, ctx.options, ctx.params = operator, options, params
        return like(x, results["y"])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, z = ctx.saved_tensors
        expanded = dy.numel() > 1 and all(stride == 0 for stride in dy.stride())
        dy_memory = memory_of(dy[(0,) * dy.dim()]) if expanded else memory_of(_laid_out_as(x, dy))
        wanted = list(ctx.needs_input_grad[1:5])
        dz = dy if wanted[3] and ctx.options.activation is None else None
        if dz is not None:
            wanted[3] = False
        results = kernels().backward(
            shape_of(x),
            _NAMES[x.dtype],
            _NAMES[ctx.params],
            dy_memory,
            memory_of(x),
            ctx.saved,
            ctx.operator.settings,
            training=ctx.options.training,
            wanted=wanted,
            activation=activation(ctx.options.activation, ctx.options.alpha),
            z=None if z is None else memory_of(z),
            mask=ctx.mask,
        )
        ctx.operator.record(results)
        dx = like(x, results["dx"]) if wanted[0] else None
        dz = like(x, results["dz"]) if wanted[3] else dz
        dweight, dbias = (tensor_of(results[name], ctx.params) for name in ("dweight", "dbias"))
        return None, dx, dweight, dbias, dz, None, None


def _laid_out_as(x: Tensor, values: Tensor) -> Tensor:
    if values.stride() == x.stride():
        return values
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(values)


def bits(values: Tensor) -> NDArray[np.uint8]:
    """For comparisons that tell -0 from 0, and hold for NaN."""
    return memory_of(values).view(np.uint8)
