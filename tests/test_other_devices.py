"""Devices without kernels of ours get torch's operators: fake tensors of any device, and a device made in Python."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers.libraries import CLASSES, images, norm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["xpu", "mps", "mtia"]


class Calls(TorchDispatchMode):
    """Lists the operators, except for questions after the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.prim.device.default:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh", ("elu", 0.5)])
@pytest.mark.parametrize("device", DEVICES)
def test_fake_tensors_in_eval(
    device: str, activation: Any, residual: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Without gradients: autograd asks for the device itself, as training does."""
    results, called = [], []
    for library in ("torch", "bn_ext"):
        with FakeTensorMode():
            x = torch.empty(4, 3, 5, 6, device=device, dtype=dtype, memory_format=layout)
            module = CLASSES[library][2](3, activation=activation, device=device).eval()
            with torch.no_grad(), Calls() as calls:
                y = module(x, *[x] * residual)
        results.append((y.shape, y.device, y.dtype, y.stride()))
        called.append(calls.names)
    assert results[0] == results[1]
    assert results[0][1].type == device
    assert called[0] == called[1]
    assert not [name for name in called[1] if "bn_ext" in name]


def test_real_values_on_a_device_made_in_python() -> None:
    """In a process of its own: there is one such device in a process, and it stays."""
    folder = Path(__file__).parent
    paths = [str(folder.parent), str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.elsewhere"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "64 compared"


class Refuses(TorchDispatchMode):
    """An operator that a mode cannot do."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in str(function):
            raise NotImplementedError("not this one")
        return function(*args, **(kwargs or {}))


def test_error_in_python_below_torchs_operators() -> None:
    """It arrives as it was raised, and the count is as it was."""
    module = norm("bn_ext")
    with forward_ad.dual_level(), Refuses(), pytest.raises(NotImplementedError, match="not this one"):
        module(forward_ad.make_dual(images(), images()))
    assert module.num_batches_tracked == 0
