"""What a plan is expected to move is what the kernels move, to the byte: batch_norm.py asserts it of every pass.

Here of passes drawn at random, those that no other test makes among them, and told of some known cases.
"""

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from . import build
from .batch_norm import Settings, kernels, memory_dtype, statistics_dtype
from .device import Counters
from .structs import DTYPES, MULTI_KERNEL, OF_H200, SAVED, Machine, Plan, Shape, activation
from .traffic import Moved, Traffic, check_traffic

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

KIB = 1024
MACHINES = {
    "none": MULTI_KERNEL,
    "block": Machine(1, OF_H200),
    "cluster": Machine(4, 32 * KIB, True, True),
    "grid": Machine(4, 32 * KIB, False, True),
    "few rows on chip": Machine(2, 20 * KIB, True, True),
}
SHAPES = [(4, 8, 196), (6, 5, 49), (3, 16, 400), (2, 3, 1024), (64, 12, 1), (5, 7, 30), (16, 16, 144)]
ACTIVATIONS = [None, "relu", "leaky_relu", "relu6", "silu", "gelu"]


def values(generator: np.random.Generator, count: int, dtype: str) -> NDArray[Any]:
    """Random ones; of bfloat16 as they lie in memory."""
    drawn = generator.standard_normal(count).astype("float32")
    return (drawn.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else drawn.astype(dtype)


def run_at_random(draw: random.Random) -> list[tuple[str, ...]]:
    """A forward pass, perhaps once more, and a backward pass; what distinguishes each from others."""
    n, c, s = draw.choice(SHAPES)
    shape = Shape(n, c, s, draw.random() < 0.5 or s == 1)
    dtype, name, machine = draw.choice(DTYPES), draw.choice(ACTIVATIONS), draw.choice(list(MACHINES))
    width = memory_dtype(dtype).itemsize
    misalignment = draw.choice([0, 0, width])
    settings = Settings(MACHINES[machine], draw.choice(["random", "descending"]), draw.randrange(9), misalignment)
    training, has_z = draw.random() < 0.7, draw.random() < 0.5
    has_mask = has_z and name in ("relu", "leaky_relu", "relu6") and draw.random() < 0.8
    generator = np.random.default_rng(draw.randrange(2**32))
    x, z, dy = (values(generator, n * c * s, dtype) for _ in range(3))
    params = statistics_dtype(dtype)
    vector = np.linspace(0.5, 1.5, c).astype(params)
    vectors = {key: vector for key in ("weight", "bias", "running_mean", "running_var")}
    given = {"training": training, "activation": activation(name, 0.2 if name == "leaky_relu" else 0.0)}
    with_z = {"z": z if has_z else None, "masks": has_mask}

    first = kernels().forward(shape, dtype, params, x, vectors, settings, **given, **with_z)
    saved = {key: first[key] for key in SAVED}
    ran = [("forward", described(first["plan"]), f"mask {has_mask}")]
    if draw.random() < 0.3:
        again = kernels().forward(shape, dtype, params, x, {}, settings, **given, **with_z, saved=saved)
        ran.append(("recompute", described(again["plan"]), f"mask {has_mask}"))

    is_scalar = draw.random() < 0.2
    needs_z = has_z and name is not None
    wanted = [draw.random() < 0.7 for _ in range(4)]
    wanted[3] = wanted[3] and needs_z
    back = kernels().backward(
        *(shape, dtype, params, dy[:1] if is_scalar else dy, x, saved, settings),
        **given,
        wanted=wanted,
        z=z if needs_z and not has_mask else None,
        mask=first["mask"] if has_mask else None,
    )
    ran.append(("backward", described(back["plan"]), f"mask {has_mask}", f"scalar {is_scalar}", f"wanted {wanted}"))
    return ran


def described(plan: Plan) -> str:
    """The team, and whether all of a slice fits."""
    lanes = min(plan.row_lanes * plan.kept_rows, plan.rows)
    spills = plan.team_name != "none" and plan.segments * lanes < plan.rows
    return plan.team_name + " spills" * spills


@pytest.mark.slow
def test_passes_at_random() -> None:
    draw = random.Random(0)
    ran = [one for _ in range(600) for one in run_at_random(draw)]
    paths = {"none", "block", "cluster", "cluster spills", "grid", "grid spills"}
    for direction in ("forward", "backward"):
        assert {one[1] for one in ran if one[0] == direction} >= paths
        assert {one[1] for one in ran if one[0] == direction and one[2] == "mask True"} >= paths
    assert {one[1] for one in ran if one[0] == "recompute"} == {"none"}
    assert len({one[4] for one in ran if one[0] == "backward"}) == 16


def test_known_numbers() -> None:
    """BN + add + ReLU, 16 bits: 4N, and 6N backward, and a mask each in three kernels; 3N, 4N and a mask in one."""
    n = 8 * 64 * 784 * 2
    shape = Shape(8, 64, 784, False)
    x, vector = values(np.random.default_rng(0), n // 2, "bfloat16"), np.ones(64, "float32")
    vectors = {"weight": vector, "bias": vector, "running_mean": None, "running_var": None}
    relu, device = activation("relu"), kernels().device
    for machine, forward, backward in (
        (MULTI_KERNEL, (3 * n, n + n // 16), (4 * n, 2 * n)),
        (Machine(1, OF_H200), (2 * n, n + n // 16), (2 * n, 2 * n)),
    ):
        settings = Settings(machine)
        first = kernels().forward(
            *(shape, "bfloat16", "float32", x, vectors, settings), training=True, activation=relu, z=x, masks=True
        )
        moved = device.counters("activation")
        assert (moved.bytes_read, moved.bytes_written) == forward
        back = kernels().backward(
            *(shape, "bfloat16", "float32", x, x, first, settings),
            training=True,
            wanted=(True,) * 4,
            activation=relu,
            mask=first["mask"],
        )
        moved = device.counters("activation")
        mask_bytes = 1 if machine is MULTI_KERNEL else 4  # for each access of 8 values; from one sector for many
        assert back["plan"].vector == 8
        assert (moved.bytes_read, moved.bytes_written) == (backward[0] + mask_bytes * n // 16, backward[1])


def test_a_byte_too_many_is_found() -> None:
    expected = Traffic(read=1000, written=500, launches=3)
    moved = Moved(125, 125, 0, 1, None, False)
    check_traffic(Counters(bytes_read=1000, bytes_written=500), expected, moved)
    for read, written in ((1001, 500), (999, 500), (1000, 499), (1000, 501)):
        with pytest.raises(AssertionError):
            check_traffic(Counters(bytes_read=read, bytes_written=written), expected, moved)
