"""How a training step's time is shared out: batch norm, other element-wise arithmetic, the rest.

On a GPU by the kernels' names and times, on a CPU by the operators' own times, as torch.profiler has them.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NORM, ELEMENTWISE, OTHER = "batch norm", "element-wise", "other"
NAMED = 12  # kernels that are named, those that take longest
LONGEST_NAME = 160

# torch's native kernels and operators, cuDNN's (bn_fw_tr_1C11_kernel_NCHW, batchnorm_fwtr_nhwc_semiPersist), and
# Triton's, whose names list the operators that the compiler put into them. All kernels of bn_ext are batch norm's.
NORM_NAME = re.compile(r"batch_?norm|\bbn_(fw|bw|bwd|fwd)|^(void )?bn_ext::", re.IGNORECASE)
# torch's kernels for one value after the other: activations, additions, products, and their gradients.
ELEMENTWISE_KERNEL = re.compile(r"elementwise_kernel")
# Of these, what computes nothing: changes of layout or dtype, and memory that is filled.
COPY = re.compile(r"copy_kernel|FillFunctor|CatArray")
# Names of operators, alone (aten::relu_) or as the compiler strings them together (triton_poi_fused_add_relu_3).
ACTIVATIONS = r"relu6?|silu|sigmoid|hardswish|hardsigmoid|hardtanh|leaky_relu|gelu|elu|mish|softplus|tanh"
ARITHMETIC = rf"(add|sub|mul|div|clamp|clamp_min|threshold|{ACTIVATIONS})_?(_backward)?"
OPERATOR = re.compile(rf"^aten::{ARITHMETIC}$")
TRITON_KERNEL = re.compile(rf"^triton_\w*?_{ARITHMETIC}_")


def classify(name: str) -> str:
    """Say what a kernel or an operator of this name is for: NORM, ELEMENTWISE or OTHER."""
    if NORM_NAME.search(name):
        return NORM
    if COPY.search(name):
        return OTHER
    elementwise = any(pattern.search(name) for pattern in (ELEMENTWISE_KERNEL, OPERATOR, TRITON_KERNEL))
    return ELEMENTWISE if elementwise else OTHER


def seconds_by_name(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Do a step under the profiler: the kernels' times on a GPU, the operators' own ones on a CPU."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    seconds: dict[str, float] = {}
    for event in profiler.events() or []:
        if not cuda:
            name, time = in_optimizer(event) or event.name, event.self_cpu_time_total
        # Annotations span kernels that are events themselves.
        elif event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            name, time = event.name, event.time_range.elapsed_us()
        else:
            continue
        seconds[name] = seconds.get(name, 0.0) + time / 1e6
    if not seconds:
        raise RuntimeError("the profiler saw nothing")
    return seconds


def in_optimizer(event: Any) -> str | None:
    """Name the optimizer's step that an operator is part of: on a CPU its additions are operators like the model's."""
    while event is not None and not event.name.startswith("Optimizer.step"):
        event = event.cpu_parent
    return None if event is None else str(event.name)


def shares(seconds: dict[str, float]) -> dict[str, Any]:
    """Add up the seconds of each class, and name what takes longest."""
    sums = dict.fromkeys((NORM, ELEMENTWISE, OTHER), 0.0)
    for name, time in seconds.items():
        sums[classify(name)] += time
    longest = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:NAMED]
    return {
        "seconds": sums,
        "longest": [[name[:LONGEST_NAME], classify(name), seconds[name]] for name in longest],
    }
