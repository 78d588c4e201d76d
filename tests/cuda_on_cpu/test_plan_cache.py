"""Which passes are taken for each other, so that the plan of one is the other's: see csrc/cuda/plan_cache.h."""

import ctypes
import itertools
import math
from collections.abc import Iterator
from typing import TypeVar

import pytest

from . import build
from .batch_norm import MULTI_KERNEL, kernels
from .structs import BackwardParams, ForwardParams, Machine, Plan, activation
from .test_single_pass import CLUSTERS, GRIDS, ONE

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

Struct = TypeVar("Struct", bound=ctypes.Structure)
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


def changed(params: Struct, path: str) -> Iterator[Struct]:
    """Copies in which the member at that path has another value: an address none, or another alignment."""
    *outer, name = path.split(".")
    for step_of_address in (None, 2, 8):
        copy = type(params).from_buffer_copy(params)
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
    for machine, shape, dtype, name in itertools.product((MULTI_KERNEL, ONE, CLUSTERS, GRIDS), shapes, range(4), names):
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
