"""A device that is neither CPU nor CUDA, for a process of its own: what it holds is computed on the CPU."""

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from helpers.libraries import both, images, norm

called: list[str] = []


class There(torch.Tensor):
    """A tensor of that device, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Any:
        options = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, here.shape, device="elsewhere:0", **options)
        self.here = here.detach()
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it on the CPU."""
        called.append(str(function))
        kwargs = kwargs or {}
        result = function(*tree_map(_here, args), **tree_map(_here, kwargs))
        result = tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, result)
        return return_and_correct_aliasing(function, args, kwargs, result)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, There) else torch.device("cpu") if isinstance(value, torch.device) else value


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return There(torch.empty(size, dtype=dtype, memory_format=memory_format))


def moved(module: nn.Module) -> nn.Module:
    """With its parameters and buffers there."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            there = None if tensor is None else There(tensor.detach().clone())
            tensors[name] = nn.Parameter(there) if tensors is module._parameters and there is not None else there
    return module


def compare(training: bool, activation: Any, residual: bool, **options: Any) -> None:
    """Values, gradients, statistics and strides are those of torch.nn there; only torch's operators are called."""

    def run(library: str) -> Any:
        module = moved(norm(library, activation=activation, **options)).train(training)
        x, z = (There(t).requires_grad_() for t in (images(), images().cos()))
        leaves = [x, z] if residual else [x]
        called.clear()
        y = module(*leaves)
        assert y.device.type == "elsewhere"
        gradients = torch.autograd.grad((y * y).sum() + y.sum(), [*leaves, *module.parameters()])
        assert [name for name in called if "batch_norm" in name] == [
            "aten.native_batch_norm.default",
            "aten.native_batch_norm_backward.default",
        ]
        results = [y.detach(), *gradients, *module.buffers()]
        return [t.here for t in results], [t.stride() for t in results]

    both(run)


def failing_call_leaves_the_count() -> None:
    """And its error is the one that arrives."""
    module = moved(norm("bn_ext"))
    with pytest.raises(RuntimeError, match="running_mean should contain 2 elements not 3"):
        module(There(images()[:, :2]))
    assert module.num_batches_tracked.here == 0


def count_there_of_a_model_here(momentum: float | None) -> None:
    """It is raised and read there; all else is computed by the kernels."""

    def run(library: str) -> Any:
        module = norm(library, momentum=momentum)
        module._buffers["num_batches_tracked"] = There(torch.tensor(2))
        return [module(images()), module.running_mean, module.running_var, module.num_batches_tracked.here]

    both(run)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("elsewhere")
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    count = 0
    for training in (True, False):
        for activation in (None, "relu", "gelu", ("leaky_relu", 0.2)):
            for residual in (False, True):
                for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
                    compare(training, activation, residual, **options)
                    count += 1
    failing_call_leaves_the_count()
    for momentum in (0.1, None):
        count_there_of_a_model_here(momentum)
    sys.stdout.write(f"{count} compared")
    sys.stdout.flush()
    # Without Python's end: autograd's thread of that device may then still hold objects of Python, and a thread that is
    # ended by force within C++ ends the process with "terminate called without an active exception".
    os._exit(0)
