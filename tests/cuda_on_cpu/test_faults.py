"""What is left of a pass when CUDA refuses it: the multi-kernel path, or an error and nothing changed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from bn_ext import testing

from . import build
from .batch_norm import MULTI_KERNEL, Settings, kernels
from .device import Fault
from .operators import CudaOnCpu, bits
from .test_single_pass import SPILLING, TEAMS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

OUT_OF_MEMORY, LOST = 2, 700
"""cudaErrorMemoryAllocation, cudaErrorIllegalAddress."""
REFUSALS = {
    "block": {"too many resources": 701, "invalid value": 1, "no memory for its code": OUT_OF_MEMORY},
    "cluster": {"cluster misconfiguration": 912, "too many resources": 701, "no memory for its code": OUT_OF_MEMORY},
    "grid": {"too many blocks": 720, "too many resources": 701, "no memory for its code": OUT_OF_MEMORY},
}
CASES = {**TEAMS, **{f"{name}: spills": case for name, case in SPILLING.items()}}


def step(operator: CudaOnCpu, case: testing.Case, activation: str | None = None) -> list[Tensor]:
    """All that a training step writes; behind an activation with a residual, and so a mask."""
    inputs = testing.make_inputs(case)
    leaves = [t.clone().requires_grad_() for t in (inputs.input, inputs.weight, inputs.bias)]
    mean, var, count = inputs.running_mean.clone(), inputs.running_var.clone(), torch.tensor(7)
    residual = None if activation is None else inputs.dy.flip(0).clone(memory_format=torch.preserve_format)
    y = operator(leaves[0], mean, var, *leaves[1:], True, 0.1, 1e-5, count, activation=activation, residual=residual)
    gradients = torch.autograd.grad(y, leaves, inputs.dy)
    assert count.item() == 8
    return [y.detach(), *gradients, mean, var]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", CASES)
def test_refused_teams(name: str, activation: str | None) -> None:
    """Whatever CUDA says: the multi-kernel path's bits, each statistic updated once, no error left for others."""
    machine, shape, layout = CASES[name]
    case = testing.Case(shape, torch.float32, layout)
    multi_kernel = CudaOnCpu(Settings(machine.without_teams))
    expected = step(multi_kernel, case, activation)
    team = name.split(",")[0].split(":")[0]
    granted = CudaOnCpu(Settings(machine))
    step(granted, case, activation)
    assert granted.calls[1].plan.team_name == team
    for error in REFUSALS[team].values():
        operator = CudaOnCpu(Settings(machine, refusal=("launch", 0, 1, error)))
        actual = step(operator, case, activation)
        assert kernels().device.last_error() == 0
        assert all((bits(a) == bits(e)).all() for a, e in zip(actual, expected, strict=True))
        for call, as_multi_kernel in zip(operator.calls, multi_kernel.calls, strict=True):
            assert call.plan.team_name == "none"
            assert call.launches == as_multi_kernel.launches > 1


@pytest.mark.parametrize("name", ["block", "cluster", "grid"])
def test_a_lost_device(name: str) -> None:
    """It refuses the multi-kernel path too: its error comes out, and stays, for every call will meet it."""
    machine, shape, layout = TEAMS[name]
    operator = CudaOnCpu(Settings(machine, refusal=("launch", 0, -1, LOST)))
    with pytest.raises(Fault, match=r"^a launch failed: an illegal memory access"):
        step(operator, testing.Case(shape, torch.float32, layout))
    assert kernels().device.launch_count() == 0
    assert kernels().device.last_error() == LOST


def in_a_thread(call: Callable[[], object], times: int = 1) -> list[tuple[str, int]]:
    """The errors of passes, and how many kernels ran; in a new thread, since each remembers what it has loaded."""

    def run() -> tuple[str, int]:
        try:
            call()
        except Fault as fault:
            return str(fault), kernels().device.launch_count()
        return "", kernels().device.launch_count()

    with ThreadPoolExecutor(1) as pool:
        return [pool.submit(run).result() for _ in range(times)]


NO_MEMORY = ("a launch failed: out of memory", 0)


@pytest.mark.parametrize("training", [True, False])
def test_no_memory_for_a_kernels_code(training: bool) -> None:
    """No kernel has run when one of the pass cannot be loaded, so none of the statistics is updated."""
    inputs = testing.make_inputs(testing.Case((8, 16, 5, 5), torch.float32))

    def run(granted: int, times: int = 1) -> list[tuple[str, int]]:
        operator = CudaOnCpu(Settings(MULTI_KERNEL, refusal=("load", granted, 1, OUT_OF_MEMORY)))
        return in_a_thread(
            lambda: operator(inputs.input, inputs.running_mean, inputs.running_var, training=training), times
        )

    count = 3 if training else 1
    assert [run(granted) for granted in range(count + 1)] == [[NO_MEMORY]] * count + [[("", count)]]
    assert run(0, times=2) == [NO_MEMORY] * 2  # it is asked for again


def test_no_memory_for_the_code_of_backward_kernels() -> None:
    """The same of gradients; then the graph is still there."""
    leaf, dy = torch.randn(8, 16, 5, 5).requires_grad_(), torch.randn(8, 16, 5, 5)
    operator = CudaOnCpu(Settings(MULTI_KERNEL))
    y = operator(leaf, None, None, training=True)
    for granted in range(3):
        operator.settings = Settings(MULTI_KERNEL, refusal=("load", granted, 1, OUT_OF_MEMORY))
        assert in_a_thread(lambda: y.backward(dy)) == [NO_MEMORY]
        assert leaf.grad is None
    operator.settings = Settings(MULTI_KERNEL)
    assert in_a_thread(lambda: y.backward(dy)) == [("", 3)]
