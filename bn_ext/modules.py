"""Modules that drop in for torch.nn's batch norms: they differ in the operator that does the work."""

import torch
from torch import Tensor
from torch.fx import Proxy

from bn_ext.functional import batch_norm


class _FusedForward(torch.nn.modules.batchnorm._BatchNorm):
    """torch.nn's forward with this package's operator."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`; in training, update running_mean, running_var and num_batches_tracked."""
        if not isinstance(input, Proxy):  # torch.fx.symbolic_trace: there are no dimensions to look at
            self._check_input_dim(input)
        momentum = self.momentum
        if self.training:
            if not self.track_running_stats:
                return batch_norm(input, None, None, self.weight, self.bias, True, momentum, self.eps)
            count = self.num_batches_tracked
            return batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                True,
                0.0 if momentum is None and count is None else momentum,
                self.eps,
                num_batches_tracked=count,
            )
        mean, var = self.running_mean, self.running_var
        use_batch = mean is None and var is None
        return batch_norm(input, mean, var, self.weight, self.bias, use_batch, momentum, self.eps)


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
