"""What a pass asks of CUDA: the second one of a known kind the launches, and nothing else."""

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from bn_ext import testing

from . import build
from .batch_norm import GENERAL, Settings, kernels
from .device import Fault
from .operators import Call, CudaOnCpu, bits
from .structs import OF_H200, BackwardParams, ForwardParams, Machine, Plan, activation
from .test_faults import step
from .test_resident import CLUSTERS, GRIDS, ONE

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
    "none": (GENERAL, (8, 64, 14, 14), [*LOADED * 3, VERSION, *[f"{LAUNCH} early"] * 3]),
    "block": (ONE, (32, 4, 20, 20), [*ATTRIBUTES, VERSION, f"{LAUNCH} early"]),
    "cluster": (
        LARGE_CLUSTERS,
        (64, 2, 32, 32),
        [*ATTRIBUTES, "cudaOccupancyMaxActiveClusters", "cudaGetDevice", VERSION, f"{LAUNCH} cluster early"],
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
    asked = ["cudaGetDevice", "cudaOccupancyMaxActiveClusters", "cudaGetDevice", f"{LAUNCH} cluster early"]
    assert second.calls == asked


@pytest.mark.parametrize("team", WAYS)
def test_each_thread_asks_for_itself(team: str) -> None:
    machine, shape, expected = WAYS[team]
    for _ in range(2):
        assert in_a_thread(lambda: passes(Settings(machine), shape))[0].calls == expected


@pytest.mark.parametrize("team", ["block", "cluster", "grid"])
def test_a_refused_launch_is_forgotten(team: str) -> None:
    """The general kernels take its place, and are loaded for that; the next pass asks for its teams again."""
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
    """One of the general kernels, which no others replace."""
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
    assert second == last == [f"{LAUNCH} early"] * 3
    assert after == ["cudaGetDevice"] * 3 + second  # they are loaded still


@pytest.mark.parametrize("machine", [GENERAL, ONE, CLUSTERS], ids=["general", "block", "cluster"])
@pytest.mark.parametrize(
    ("capture", "is_asked", "starts_early"),
    [
        ((False, 13000), False, True),
        ((True, 13000), False, True),
        ((True, 12030), False, True),
        ((False, 12020), True, True),
        ((True, 12020), True, False),
    ],
)
def test_early_starts_in_graphs(
    machine: Machine, capture: tuple[bool, int], is_asked: bool, starts_early: bool
) -> None:
    """From CUDA 12.3 on; before, the stream is asked whether it is captured."""
    settings = Settings(machine, capture=capture)
    _, (forward, backward) = in_a_thread(lambda: [passes(settings, (8, 6, 20, 20)) for _ in range(2)])
    for call in (forward, backward):
        assert [name.endswith(" early") for name in launches(call)] == [starts_early] * call.launches
        asked = ["cudaStreamIsCapturing"] * (call.launches if is_asked else 0)
        assert sorted(call.calls) == sorted([*launches(call), *asked])


@pytest.mark.parametrize("team", ["none", "block", "cluster"])
def test_no_launch_starts_early_where_that_is_switched_off(team: str) -> None:
    machine, shape, _ = WAYS[team]
    usual = Machine(machine.multiprocessors, machine.shared_bytes, machine.clusters, machine.cooperative, False)
    for call in in_a_thread(lambda: passes(Settings(usual), shape)):
        assert call.plan.team_name == team
        assert not any(name.endswith(" early") for name in call.calls)
        assert VERSION not in call.calls


def test_only_so_many_plans_are_remembered() -> None:
    """With one more than there is room for, all are chosen again."""
    settings = Settings(GENERAL, remembers=True)

    def run(rows: int) -> list[str]:
        operator = CudaOnCpu(settings)
        operator(torch.randn(rows, 4), None, None, training=True)
        return operator.calls[0].calls

    def run_all() -> list[list[str]]:
        for rows in range(2, 130):
            run(rows)
        return [run(2), run(130), run(130), run(2)]

    known, one_more, new, forgotten = in_a_thread(run_all)
    assert known == new == [f"{LAUNCH} early"] * 3
    assert one_more == forgotten == ["cudaGetDevice"] * 3 + known


MACHINE = Machine(4, 64 * 1024, True, True, True)
NOT_LOOKED_AT = {"momentum", "eps"}
"""Numbers that no plan and no choice of kernels depends on."""


def fields_of(params: ctypes.Structure, prefix: str = "") -> Iterator[str]:
    """The paths of all numbers and addresses in a struct, those of structs in it too."""
    for name, kind in params._fields_:  # type: ignore[misc]
        if issubclass(kind, ctypes.Structure):
            yield from fields_of(getattr(params, name), f"{prefix}{name}.")
        else:
            yield prefix + name


def changed(params: Result, path: str) -> Iterator[Result]:
    """Copies in which the member at that path has another value: an address none, or another alignment."""
    *outer, name = path.split(".")
    for step_of_address in (None, 2, 8):
        copy = type(params).from_buffer_copy(params)  # type: ignore[attr-defined]
        struct = copy
        for part in outer:
            struct = getattr(struct, part)
        value, kind = getattr(struct, name), dict(struct._fields_)[name]
        if kind is ctypes.c_void_p:
            setattr(struct, name, step_of_address and value + step_of_address)
        elif step_of_address is not None:
            return
        else:
            setattr(struct, name, not value if kind is ctypes.c_bool else 1.0 if math.isnan(value) else value + 1)
        yield copy


def an_example(params: type[ctypes.Structure]) -> ctypes.Structure:
    """Of a pass: every address there is, all different."""
    example = params()
    for i, (name, kind) in enumerate(params._fields_, 1):  # type: ignore[misc]
        if kind is ctypes.c_void_p:
            setattr(example, name, 4096 * i)
    example.shape.n, example.shape.c, example.shape.s = 8, 16, 49
    example.training = True
    example.activation = activation("relu")
    return example


def alike(direction: str, a: tuple[ctypes.Structure, Machine, int], b: tuple[ctypes.Structure, Machine, int]) -> bool:
    """Whether one is taken for the other."""
    result = ctypes.c_int64()
    at = [given for p, machine, device in (a, b) for given in (ctypes.byref(p), ctypes.byref(machine), device)]
    kernels().device.call(f"batch_norm_alike_{direction}", *at, ctypes.byref(result))
    return bool(result.value)


@pytest.mark.parametrize(("direction", "params"), [("forward", ForwardParams), ("backward", BackwardParams)])
def test_everything_but_some_numbers_tells_passes_apart(direction: str, params: type[ctypes.Structure]) -> None:
    """Every member of a pass's parameters and of the machine, and the device."""
    example = an_example(params)
    same = (example, MACHINE, 0)
    assert alike(direction, same, same)
    assert not alike(direction, same, (example, MACHINE, 1))
    for path in fields_of(MACHINE):
        for other in changed(MACHINE, path):
            assert not alike(direction, same, (example, other, 0)), path
    count = 0
    for path in fields_of(example):
        for other in changed(example, path):
            assert alike(direction, same, (other, MACHINE, 0)) == (path in NOT_LOOKED_AT), path
            count += 1
    assert count > 40


@pytest.mark.parametrize(("direction", "params"), [("forward", ForwardParams), ("backward", BackwardParams)])
def test_passes_that_are_taken_for_each_other_have_one_plan(direction: str, params: type[ctypes.Structure]) -> None:
    """Addresses that are aligned alike, any momentum and eps: of every machine, shape, dtype and activation."""
    names = [None, "relu", "leaky_relu", "silu"]
    shapes = [(8, 64, 196, False), (4, 96, 144, True), (8, 6, 1600, False), (64, 12, 1, True)]
    for machine, shape, dtype, name in itertools.product((GENERAL, ONE, CLUSTERS, GRIDS), shapes, range(4), names):
        first = an_example(params)
        first.shape.n, first.shape.c, first.shape.s, first.shape.channels_last = shape
        first.dtype, first.activation = dtype, activation(name, 0.1)
        first.x += 8 * (dtype % 2)
        second = params.from_buffer_copy(first)
        for field, kind in params._fields_:  # type: ignore[misc]
            if kind is ctypes.c_void_p:
                setattr(second, field, getattr(first, field) + 48)
            elif field in NOT_LOOKED_AT:
                setattr(second, field, 0.25)
        assert alike(direction, (first, machine, 0), (second, machine, 0))
        plans = [Plan(), Plan()]
        kernels().device.set_machine(16, 228 * 1024, 8)
        for p, plan in zip((first, second), plans, strict=True):
            at = (ctypes.byref(p), ctypes.byref(machine), ctypes.byref(plan))
            kernels().device.call(f"batch_norm_plan_{direction}", *at)
        assert bytes(plans[0]) == bytes(plans[1])
