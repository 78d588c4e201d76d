"""Modules that drop in for torch.nn's batch norms: they differ in the operator that does the work."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from bn_ext.activations import Activation, apply, describe, resolve
from bn_ext.functional import batch_norm

# Functions that make something else of whatever is a torch.nn batch norm, from its statistics and parameters, and would
# lose an activation without a word: of torch, apex and detectron2.
_LOSING = {
    "convert_sync_batchnorm",
    "fuse_conv_bn_eval",
    "fuse_linear_bn_eval",
    "convert_syncbn_model",
    "convert_frozen_batchnorm",
}


class _FusedForward(torch.nn.modules.batchnorm._BatchNorm):
    """torch.nn's constructor and forward with this package's operator, an activation and a residual."""

    activation: tuple[str, float] | None = None
    """Name and parameter of what forward() applies to its result. It may be set to all that `batch_norm` takes."""

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        """Take an activation of any kind by its name: a module would become a child."""
        if name == "activation":
            value = None if value is None else resolve(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Refuse statistics to those that would lose the activation (pytorch#187298)."""
        if name == "running_mean" and self.activation is not None:
            caller = sys._getframe(1).f_code.co_name
            if caller in _LOSING:
                raise RuntimeError(
                    f"{caller} would lose the activation inside {self}: set its `activation` to None and apply the "
                    "activation behind it first"
                )
        return super().__getattr__(name)

    def __init_subclass__(cls) -> None:
        """Show the constructor's arguments: those of the torch in use, and activation."""
        super().__init_subclass__()
        shown = list(inspect.signature(super().__init__).parameters.values())[1:]
        shown.append(inspect.Parameter("activation", inspect.Parameter.KEYWORD_ONLY, default=None))
        cls.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """torch.nn's, and the activation if there is one."""
        shown = "" if self.activation is None else f", activation={describe(self.activation)}"
        return f"{super().extra_repr()}{shown}"

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: Activation = None,
        unlike: str | None = None,
    ) -> Tensor:
        """Normalise `input`, add `residual` and apply the activation; in training, update the running statistics.

        Args:
            input: (N, C, ...); see :func:`bn_ext.batch_norm`.
            residual: Added before the activation; like input, or None.
            activation: In place of the module's own, where that is None; what :func:`bn_ext.fuse` calls it with.
            unlike: "add" or "add_", a method of Tensor: adds a residual that is not like input (broadcast, another
                dtype, a number), which is refused otherwise; then the activation runs by itself too.
        """
        if unlike is not None and not _alike(input, residual):
            return apply(getattr(self.forward(input), unlike)(residual), resolve(activation))
        if not isinstance(input, Proxy):  # torch.fx.symbolic_trace: there are no dimensions to look at
            self._check_input_dim(input)
        if activation is None:
            activation = self.activation
        elif self.activation is not None:
            raise ValueError(f"forward() was given activation={activation!r}, but the module has one: {self}")
        mean, var, count = self._member("running_mean"), self._member("running_var"), None
        training, momentum = self.training, self.momentum
        if training:
            if self.track_running_stats:
                count = self._member("num_batches_tracked")
                momentum = 0.0 if momentum is None and count is None else momentum
            else:
                mean = var = None
        else:
            training = mean is None and var is None
        return batch_norm(
            *(input, mean, var, self._member("weight"), self._member("bias"), training, momentum, self.eps),
            num_batches_tracked=count,
            activation=activation,
            residual=residual,
        )

    def _member(self, name: str) -> Any:
        """self.name, found at once: torch.nn.Module searches long, and on small tensors that shows."""
        if name in self._parameters:
            return self._parameters[name]
        return self._buffers[name] if name in self._buffers else getattr(self, name)


def _alike(input: Tensor, residual: object) -> bool:
    """Whether one operator can do both; torch.fx.symbolic_trace cannot tell."""
    if isinstance(input, Proxy) or not isinstance(residual, Tensor):
        return False
    return residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device


class BatchNorm1d(_FusedForward, torch.nn.BatchNorm1d):
    """Drop-in for :class:`torch.nn.BatchNorm1d`: (N, C) or (N, C, L) input.

    Same arguments, parameters, buffers, state_dict, numbers and errors as the torch in use; see
    :func:`bn_ext.batch_norm` for the operation, its dtypes and its numerics.
    """


class BatchNorm2d(_FusedForward, torch.nn.BatchNorm2d):
    """Drop-in for :class:`torch.nn.BatchNorm2d`: (N, C, H, W) input, contiguous or channels_last.

    Same arguments, parameters, buffers, state_dict, numbers and errors as the torch in use; see
    :func:`bn_ext.batch_norm` for the operation, its dtypes and its numerics.
    """


class BatchNorm3d(_FusedForward, torch.nn.BatchNorm3d):
    """Drop-in for :class:`torch.nn.BatchNorm3d`: (N, C, D, H, W) input, contiguous or channels_last_3d.

    Same arguments, parameters, buffers, state_dict, numbers and errors as the torch in use; see
    :func:`bn_ext.batch_norm` for the operation, its dtypes and its numerics.
    """


class LazyBatchNorm1d(_FusedForward, torch.nn.LazyBatchNorm1d):
    """Drop-in for :class:`torch.nn.LazyBatchNorm1d`: becomes a :class:`BatchNorm1d` at its first forward pass."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_FusedForward, torch.nn.LazyBatchNorm2d):
    """Drop-in for :class:`torch.nn.LazyBatchNorm2d`: becomes a :class:`BatchNorm2d` at its first forward pass."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_FusedForward, torch.nn.LazyBatchNorm3d):
    """Drop-in for :class:`torch.nn.LazyBatchNorm3d`: becomes a :class:`BatchNorm3d` at its first forward pass."""

    cls_to_become = BatchNorm3d
