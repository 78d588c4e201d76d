"""The planner of the CUDA kernels, as data: every shape gets a plan that covers it once and fills the device."""

import ctypes
import itertools
import random

import pytest

from . import build
from .batch_norm import kernels
from .device import Fault
from .structs import OF_H200, Machine, Plan, Shape

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

RESNET50 = [
    (64, 112),
    *itertools.product((64, 256), (56,)),
    *itertools.product((128, 512), (56, 28)),
    *itertools.product((256, 1024), (28, 14)),
    *itertools.product((512, 2048), (14, 7)),
]
DEVICE = Machine(132)


def check(plan: Plan, shape: Shape, value_bytes: int, alignment: int) -> None:
    """What holds for every plan."""
    plane = 1 if shape.channels_last else shape.s
    images = shape.n * (shape.s if shape.channels_last else 1)
    access = plan.vector * value_bytes
    assert access in {value_bytes, 4, 8, 16}
    assert alignment % access == 0
    assert plan.pitch % plan.vector == 0
    assert plan.slice_width % plan.vector == 0

    assert plan.slice_width == plan.slice_channels * plane
    assert (plan.slices - 1) * plan.slice_channels < shape.c <= plan.slices * plan.slice_channels
    wide = plan.one_channel and plan.columns == 1
    if wide:
        assert plan.image_rows * plan.vector == plane
        assert plan.columns == 1
    else:
        assert plan.image_rows == 1
        assert plan.columns * plan.vector == plan.slice_width
        assert plan.row_values == plane
    assert plan.rows == images * plan.image_rows
    assert plan.one_channel == (plan.vector == 1 or wide)

    assert 0 < plan.columns * plan.row_lanes <= plan.threads <= 256
    assert plan.threads % 32 == 0
    assert 0 < plan.rows_per_thread <= 256
    segment_rows = plan.rows_of_segment
    assert 0 <= plan.row_lanes * plan.rows_per_thread - segment_rows < plan.row_lanes
    assert (plan.segments - 1) * segment_rows < plan.rows <= plan.segments * segment_rows
    assert plan.slices * plan.segments < 2**31
    # A mask: lanes that share a byte stand side by side, and have equally many rows.
    assert plan.whole_bytes == (plan.pitch % 8 == 0 and plan.slice_width % 8 == 0)
    lanes_of_byte = 8 // plan.vector
    if plan.whole_bytes and wide:
        assert plan.image_rows % lanes_of_byte == plan.row_lanes % lanes_of_byte == segment_rows % lanes_of_byte == 0
    elif plan.whole_bytes:
        assert plan.columns % lanes_of_byte == 0
    # Partial sums in shared memory, with gaps: block_partials() of plan.h.
    stride = plan.columns * (plan.pieces + (plan.pieces > 2)) | 1
    assert -(-plan.row_lanes // plan.warp_rows) * stride * 16 <= 48 * 1024


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value_bytes", [2, 4])
@pytest.mark.parametrize("n", [1, 8, 32, 128, 256])
def test_resnet50(n: int, value_bytes: int, channels_last: bool) -> None:
    """16-byte accesses in every layer; from a few MB on every multiprocessor has a block."""
    for channels, size in RESNET50:
        shape = Shape(n, channels, size * size, channels_last)
        plan = kernels().make_plan(shape, value_bytes, 16, DEVICE)
        check(plan, shape, value_bytes, 16)
        assert plan.vector * value_bytes == 16, (channels, size)
        if n * channels * size * size * value_bytes >= 2**23:
            assert plan.slices * plan.segments >= DEVICE.multiprocessors, (channels, size)
        assert plan.columns * plan.row_lanes >= 0.75 * plan.threads


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value_bytes", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 32, 256])
def test_resnet50_with_masks(n: int, value_bytes: int, channels_last: bool) -> None:
    """16-byte accesses, and every byte of a mask is written by one block."""
    for channels, size in RESNET50:
        shape = Shape(n, channels, size * size, channels_last)
        plan = kernels().make_plan(shape, value_bytes, 16, DEVICE, for_mask=True)
        check(plan, shape, value_bytes, 16)
        assert plan.whole_bytes, (channels, size)
        assert plan.vector * value_bytes == 16, (channels, size)
        assert plan.columns * plan.row_lanes >= 0.75 * plan.threads


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("n", [32, 256])
def test_waves_of_blocks_are_full(n: int, channels_last: bool) -> None:
    """Large layers: of the time that the last block takes, counted in rows, threads work 80 % or more on average."""
    for channels, size in RESNET50:
        if n * channels * size * size < 2**24:
            continue
        plan = kernels().make_plan(Shape(n, channels, size * size, channels_last), 2, 16, DEVICE)
        at_a_time = DEVICE.multiprocessors * (768 // plan.threads)
        waves = -(-plan.slices * plan.segments // at_a_time)
        worked = plan.slices * plan.rows / plan.row_lanes
        assert worked >= 0.8 * waves * at_a_time * plan.rows_per_thread, (channels, size)


def test_a_channel_is_split_over_many_blocks() -> None:
    """C = 64 fills 132 multiprocessors, in both layouts; so does C = 1."""
    for channels, channels_last in itertools.product((64, 1), (False, True)):
        plan = kernels().make_plan(Shape(256, channels, 112 * 112, channels_last), 2, 16, DEVICE)
        assert plan.slices * plan.segments >= DEVICE.multiprocessors


def test_any_shape() -> None:
    """Random shapes of up to 2^40 values, any alignment."""
    generator = random.Random(0)
    for _ in range(20_000):
        value_bytes = generator.choice([2, 4, 8])
        alignment = generator.choice([a for a in (2, 4, 8, 16) if a >= value_bytes])
        n, c, s = (int(2 ** generator.uniform(0, 13.5)) for _ in range(3))
        if generator.random() < 0.3:
            s = 1
        shape = Shape(n, c, s, generator.random() < 0.5 or s == 1)
        machine, for_mask = Machine(generator.choice([1, 16, 132])), generator.random() < 0.3
        plan = kernels().make_plan(shape, value_bytes, alignment, machine, for_mask)
        check(plan, shape, value_bytes, alignment)


@pytest.mark.parametrize(
    ("shape", "value_bytes"),
    [
        (Shape(1, 2, 2**30 + 8, False), 2),
        (Shape(2**30 + 8, 2, 1, True), 2),
        (Shape(1, 1, 2**36 + 1, False), 2),
        (Shape(880_802, 3, 1, True), 4),
        (Shape(65_536 * 3, 4, 4, False), 4),
        (Shape(2, 2**28, 1, True), 4),
        (Shape(2, 70_000, 49, False), 2),
    ],
)
def test_huge_tensors(shape: Shape, value_bytes: int) -> None:
    plan = kernels().make_plan(shape, value_bytes, 16, DEVICE)
    check(plan, shape, value_bytes, 16)
    assert plan.plane == (1 if shape.channels_last else min(shape.s, 2**30))


@pytest.mark.parametrize(("choice", "uses_pdl"), [(None, True), ("1", True), ("0", False)])
@pytest.mark.parametrize("single_pass_tiles", [0, 1])
def test_pdl_switch_changes_nothing_else_in_the_plan(
    choice: str | None, uses_pdl: bool, single_pass_tiles: int
) -> None:
    """BN_EXT_CUDA_PDL acts on tensors of every size, with and without teams."""
    for n in (1, 32, 256):
        shape = Shape(n, 64, 56 * 56, False)
        machine = Machine(132, OF_H200, True, True, True)
        expected = kernels().make_plan(shape, 2, 16, machine, False, single_pass_tiles)
        if choice is not None:
            kernels().device.call("batch_norm_choose_pdl", choice, ctypes.byref(machine))
        plan = kernels().make_plan(shape, 2, 16, machine, False, single_pass_tiles)
        assert expected.uses_pdl
        assert plan.uses_pdl == uses_pdl
        plan.uses_pdl = True
        assert bytes(plan) == bytes(expected)
        without = kernels().make_plan(shape, 2, 16, machine.without_teams, False, single_pass_tiles)
        assert without.uses_pdl == uses_pdl


def test_no_pdl_on_a_machine_without_it() -> None:
    machine = Machine(132, OF_H200, True, True)
    kernels().device.call("batch_norm_choose_pdl", "1", ctypes.byref(machine))
    assert not kernels().make_plan(Shape(1, 64, 49, False), 2, 16, machine).uses_pdl


@pytest.mark.parametrize("choice", ["", "2", "off", "10", "1 "])
def test_invalid_choice_of_pdl_is_rejected(choice: str) -> None:
    with pytest.raises(Fault, match="neither 0 nor 1"):
        kernels().device.call("batch_norm_choose_pdl", choice, ctypes.byref(Machine(1)))


@pytest.mark.parametrize(
    ("choices", "staggers", "quarters"),
    [("", True, 2), ("stagger=0", False, 2), ("prefetch=0.25,stagger=0", False, 1), ("stagger=1,prefetch=1", True, 4)],
)
def test_teams_come_out_of_step(choices: str, staggers: bool, quarters: int) -> None:
    """BN_EXT_CUDA_TUNING: half of the resident teams begin later, and a part of the next slice is prefetched."""
    machine = Machine(132, OF_H200, True, True, True, True, 2)
    kernels().device.call("batch_norm_tune", choices, ctypes.byref(machine))
    large, small = Shape(256, 256, 56 * 56, False), Shape(2, 64, 28 * 28, False)
    plan = kernels().make_plan(large, 2, 16, machine, False, 1)
    resident = 2 * machine.multiprocessors // plan.segments
    assert plan.team_name == "grid"
    assert 1 < plan.teams < plan.slices
    assert plan.staggered_teams == (resident // 2 if staggers else 0)
    assert 0 < plan.stagger_ns <= 3000 if staggers else plan.stagger_ns == 0
    assert plan.prefetched_rows == -(-plan.rows_per_thread * quarters // 4)
    plan = kernels().make_plan(small, 2, 16, machine, False, 1)
    assert plan.teams == plan.slices  # of which there are fewer than multiprocessors
    assert (plan.stagger_ns, plan.prefetched_rows) == (0, 0)


@pytest.mark.parametrize("choices", ["stagger", "stagger=2", "prefetch=0.3", "evict=1", "stagger=1,,prefetch=1", "=1"])
def test_no_such_tuning(choices: str) -> None:
    with pytest.raises(Fault, match="no such choice"):
        kernels().device.call("batch_norm_tune", choices, ctypes.byref(Machine(1)))


def test_alignment_narrows_the_accesses() -> None:
    shape = Shape(32, 64, 56 * 56, False)
    for alignment, vector in ((16, 8), (8, 4), (4, 2), (2, 1)):
        assert kernels().make_plan(shape, 2, alignment, DEVICE).vector == vector
    assert kernels().make_plan(shape, 4, 8, DEVICE).vector == 2
