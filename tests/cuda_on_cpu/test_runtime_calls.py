"""What a pass asks of CUDA: the second one of a known kind the launches, and nothing else."""

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from bn_ext import testing

from . import build
from .batch_norm import MULTI_KERNEL, Settings, kernels
from .device import Fault
from .operators import Call, CudaOnCpu, bits
from .structs import OF_H200, Machine
from .test_faults import step
from .test_single_pass import CLUSTERS, ONE

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

Result = TypeVar("Result")
LAUNCH = "cudaLaunchKernelEx"
ATTRIBUTES = ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaFuncSetAttribute"]
"""Of a kernel with more than 48 KiB of shared memory, for which it is asked for in two attributes."""
LOADED = ["cudaGetDevice", "cudaFuncGetAttributes"]
VERSION = "cudaDriverGetVersion"
LARGE_CLUSTERS, LARGE_GRIDS = Machine(4, OF_H200, True, True, True), Machine(4, OF_H200, False, True, True)

# A machine and a shape; what the first forward pass of a thread asks for, what the second one does.
WAYS = {
    "none": (MULTI_KERNEL, (8, 64, 14, 14), [*LOADED * 3, VERSION, *[f"{LAUNCH} pdl"] * 3]),
    "block": (ONE, (32, 4, 20, 20), [*ATTRIBUTES, VERSION, f"{LAUNCH} pdl"]),
    "cluster": (
        LARGE_CLUSTERS,
        (64, 2, 32, 32),
        [*ATTRIBUTES, "cudaOccupancyMaxActiveClusters", "cudaGetDevice", VERSION, f"{LAUNCH} cluster pdl"],
    ),
    "grid": (
        LARGE_GRIDS,
        (64, 2, 32, 32),
        [
            *ATTRIBUTES,
            "cudaGetDevice",
            "cudaDeviceGetAttribute",
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
            "cudaGetDevice",
            f"{LAUNCH} cooperative",
        ],
    ),
}


def in_a_thread(body: Callable[[], Result]) -> Result:
    """In a new one, which remembers no plan and has asked CUDA for nothing."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body).result()


def passes(settings: Settings, shape: tuple[int, ...], activation: str | None = None) -> list[Call]:
    """A training step's forward and backward pass, by a remembered plan if there is one; their results are right."""
    operator, case = CudaOnCpu(replace(settings, remembers=True)), testing.Case(shape, torch.float32)
    results = step(operator, case, activation)
    chosen = CudaOnCpu(settings)
    expected = step(chosen, case, activation)
    assert all((bits(a) == bits(e)).all() for a, e in zip(results, expected, strict=True))
    assert [bytes(call.plan) for call in operator.calls] == [bytes(call.plan) for call in chosen.calls]
    return operator.calls


def launches(call: Call) -> list[str]:
    """Those of all calls of CUDA that a pass made."""
    return [name for name in call.calls if name.startswith(LAUNCH)]


@pytest.mark.parametrize("team", WAYS)
def test_the_first_pass_asks_and_the_second_one_only_launches(team: str) -> None:
    machine, shape, expected = WAYS[team]

    def run() -> list[list[Call]]:
        return [passes(Settings(machine), shape) for _ in range(3)]

    first, *later = in_a_thread(run)
    assert [call.plan.team_name for call in first] == [team, team]
    assert first[0].calls == expected
    assert len(first[1].calls) > len(launches(first[1]))
    for forward, backward in later:
        assert forward.calls == launches(first[0])
        assert backward.calls == launches(first[1])
        assert len(forward.calls) == len(backward.calls) == (3 if team == "none" else 1)


@pytest.mark.parametrize("team", WAYS)
def test_a_pass_with_a_mask_that_atomics_write_clears_it(team: str) -> None:
    """One call more, which is no launch."""
    machine, (n, _, _, _), _ = WAYS[team]
    shape = (n, 3, 9, 9)
    _, (forward, backward) = in_a_thread(lambda: [passes(Settings(machine), shape, "relu") for _ in range(2)])
    assert not forward.plan.whole_bytes
    assert forward.calls == ["cudaMemsetAsync", *launches(forward)]
    assert backward.calls == launches(backward)


def test_attributes_are_set_once_for_a_kernel() -> None:
    """By the first of two shapes that take the same one; a cluster is asked about for each shape."""

    def run() -> list[Call]:
        return [passes(Settings(LARGE_CLUSTERS), (n, 2, 32, 32))[0] for n in (64, 63)]

    first, second = in_a_thread(run)
    assert first.calls[: len(ATTRIBUTES)] == ATTRIBUTES
    asked = ["cudaGetDevice", "cudaOccupancyMaxActiveClusters", "cudaGetDevice", f"{LAUNCH} cluster pdl"]
    assert second.calls == asked


@pytest.mark.parametrize("team", WAYS)
def test_each_thread_asks_for_itself(team: str) -> None:
    machine, shape, expected = WAYS[team]
    for _ in range(2):
        assert in_a_thread(lambda: passes(Settings(machine), shape))[0].calls == expected


@pytest.mark.parametrize("team", ["block", "cluster", "grid"])
def test_a_refused_launch_is_forgotten(team: str) -> None:
    """The multi-kernel path takes its place and loads its kernels; the next pass asks for its teams again."""
    machine, shape, expected = WAYS[team]
    settings, refusing = Settings(machine), Settings(machine, refusal=("launch", 0, 1, 720), remembers=True)
    case = testing.Case(shape, torch.float32)

    def run() -> list[list[Call]]:
        operator = CudaOnCpu(refusing)
        known = passes(settings, shape)
        step(operator, case)
        return [known, operator.calls, passes(settings, shape), passes(settings, shape)]

    _, refused, again, last = in_a_thread(run)
    for call in refused:
        assert call.plan.team_name == "none"
        assert launches(call)[0] == launches(again[refused.index(call)])[0]  # which was refused
        assert call.calls[1:3] == ["cudaGetLastError", "cudaGetDevice"]
        assert "cudaFuncGetAttributes" in call.calls
        assert call.launches == len(launches(call)) - 1 > 1
    assert again[0].calls == ["cudaGetDevice", *(name for name in expected[len(ATTRIBUTES) :] if name != VERSION)]
    assert again[0].plan.team_name == team
    assert last[0].calls == launches(again[0])


def test_a_pass_that_fails_is_forgotten() -> None:
    """A kernel of the multi-kernel path, which no other path replaces."""
    machine, shape, expected = WAYS["none"]
    x = torch.randn(shape)

    def run(**given: object) -> list[str]:
        operator = CudaOnCpu(Settings(machine, remembers=True, **given))  # type: ignore[arg-type]
        operator(x, None, None, training=True)
        return operator.calls[0].calls

    def run_all() -> list[list[str]]:
        first, second = run(), run()
        with pytest.raises(Fault, match="too many resources"):
            run(refusal=("launch", 1, 1, 701))
        return [first, second, run(), run()]

    first, second, after, last = in_a_thread(run_all)
    assert first == expected
    assert second == last == [f"{LAUNCH} pdl"] * 3
    assert after == ["cudaGetDevice"] * 3 + second  # they are loaded still


@pytest.mark.parametrize("machine", [MULTI_KERNEL, ONE, CLUSTERS], ids=["multi_kernel", "block", "cluster"])
@pytest.mark.parametrize(
    ("capture", "is_asked", "uses_pdl"),
    [
        ((False, 13000), False, True),
        ((True, 13000), False, True),
        ((True, 12030), False, True),
        ((False, 12020), True, True),
        ((True, 12020), True, False),
    ],
)
def test_pdl_in_graphs_needs_cuda_12_3(
    machine: Machine, capture: tuple[bool, int], is_asked: bool, uses_pdl: bool
) -> None:
    """From CUDA 12.3 on; before, the stream is asked whether it is captured."""
    settings = Settings(machine, capture=capture)
    _, (forward, backward) = in_a_thread(lambda: [passes(settings, (8, 6, 20, 20)) for _ in range(2)])
    for call in (forward, backward):
        assert [name.endswith(" pdl") for name in launches(call)] == [uses_pdl] * call.launches
        asked = ["cudaStreamIsCapturing"] * (call.launches if is_asked else 0)
        assert sorted(call.calls) == sorted([*launches(call), *asked])


@pytest.mark.parametrize("team", ["none", "block", "cluster"])
def test_no_launch_uses_pdl_if_it_is_disabled(team: str) -> None:
    machine, shape, _ = WAYS[team]
    usual = Machine(machine.multiprocessors, machine.shared_bytes, machine.clusters, machine.cooperative, False)
    for call in in_a_thread(lambda: passes(Settings(usual), shape)):
        assert call.plan.team_name == team
        assert not any(name.endswith(" pdl") for name in call.calls)
        assert VERSION not in call.calls


def test_only_so_many_plans_are_remembered() -> None:
    """With one more than there is room for, all are chosen again."""
    settings = Settings(MULTI_KERNEL, remembers=True)

    def run(rows: int) -> list[str]:
        operator = CudaOnCpu(settings)
        operator(torch.randn(rows, 4), None, None, training=True)
        return operator.calls[0].calls

    def run_all() -> list[list[str]]:
        for rows in range(2, 130):
            run(rows)
        return [run(2), run(130), run(130), run(2)]

    known, one_more, new, forgotten = in_a_thread(run_all)
    assert known == new == [f"{LAUNCH} pdl"] * 3
    assert one_more == forgotten == ["cudaGetDevice"] * 3 + known


STREAMS = itertools.count(1)
"""Numbers of streams that no test has used yet."""


def zeros_of_stream(size: int, device: int, stream: int) -> int | None:
    """The address of a stream's counters."""
    memory = ctypes.c_void_p()
    kernels().device.call("batch_norm_zeros_of_stream", size, device, stream, ctypes.byref(memory))
    return memory.value


def test_counters_of_a_stream_are_made_once() -> None:
    """Of each stream of each device; again where they are too few, and where there was no memory for them."""
    device = kernels().device
    device.reset()
    first, other = next(STREAMS), next(STREAMS)
    device.refuse("allocate", 0, 1, 2)
    assert zeros_of_stream(16, 0, first) is None
    assert device.last_error() == 0
    device.clear_calls()
    exchange = "cudaThreadExchangeStreamCaptureMode"
    memory = zeros_of_stream(16, 0, first)
    assert memory is not None
    assert device.calls() == [exchange, "cudaMalloc", "cudaMemsetAsync", exchange]
    assert ctypes.string_at(memory, 16) == bytes(16)
    device.clear_calls()
    assert zeros_of_stream(1 << 16, 0, first) == memory
    assert device.calls() == []
    apart = {memory, zeros_of_stream(16, 1, first), zeros_of_stream(16, 0, other), zeros_of_stream(1 << 17, 0, first)}
    assert len(apart) == 4
    assert zeros_of_stream(16, 0, first) in apart - {memory}
    device.reset()
