"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own without torch."""

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu import build
from cuda_on_cpu.batch_norm import SOURCES, Kernels, Settings, kernels, memory_dtype, statistics_dtype
from cuda_on_cpu.device import POLICIES
from cuda_on_cpu.structs import DTYPES, KINDS, MULTI_KERNEL, SMALL, Activation, Machine, Shape, activation

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

MACHINES = [MULTI_KERNEL, SMALL, Machine(SMALL.multiprocessors, SMALL.shared_bytes, False, True)]
SHAPES = [(3, 65, 7), (2, 5, 49), (1, 3, 300), (2, 4, 289), (9, 300, 1), (2, 64, 128), (4, 16, 12)]


# Plain batch norm, and one of each kind of kernel that has an activation or a residual: name, residual.
FUSED = [(None, False), ("relu6", True), ("leaky_relu", False), (None, True), ("gelu", True), ("mish", False)]


def digest_of_every_kernel(library: Kernels, dtype: str) -> str:
    """Run every width and direction; a digest of all results."""
    digest = hashlib.sha256()
    first = DTYPES.index(dtype)
    generator = np.random.default_rng(first)
    fused = itertools.cycle(FUSED[1 + first :] + FUSED[1 : 1 + first])
    for number, (n, c, s) in enumerate(SHAPES, len(SHAPES) * first):
        for channels_last, training, machine in itertools.product((False, True), (False, True), MACHINES):
            if machine is not MULTI_KERNEL and not training:
                continue
            for name, has_residual in (FUSED[0], next(fused)):
                shape = Shape(n, c, s, channels_last or s == 1)
                settings = Settings(machine, POLICIES[number % 4], seed=number)
                if number % 2:
                    settings = replace(settings, misalignment=memory_dtype(dtype).itemsize)
                for results in _both_passes(
                    library, generator, shape, dtype, settings, training, activation(name, 0.5), has_residual
                ):
                    for key, values in sorted(results.items()):
                        digest.update(b"" if key == "plan" or values is None else values.tobytes())
    return digest.hexdigest()


def _both_passes(
    library: Kernels,
    generator: np.random.Generator,
    shape: Shape,
    dtype: str,
    settings: Settings,
    training: bool,
    formula: Activation,
    has_residual: bool,
) -> Iterator[dict[str, Any]]:
    statistics = memory_dtype(statistics_dtype(dtype))
    x, dy, z = (_random(generator, shape.n * shape.c * shape.s, dtype) for _ in range(3))
    names = ("weight", "bias", "running_mean", "running_var")
    vectors: dict[str, Any] = {name: generator.random(shape.c).astype(statistics) + 0.5 for name in names}
    vectors["num_batches_tracked"] = np.array([3])
    types = (shape, dtype, statistics_dtype(dtype))
    given: dict[str, Any] = {"training": training, "activation": formula, "z": z if has_residual else None}
    masks = has_residual and formula.kind == KINDS.index("relu_like")
    forward = library.forward(*types, x, vectors, settings, momentum=None, masks=masks, **given)
    yield forward
    has_dz = has_residual and formula.kind != KINDS.index("none")
    if masks or not has_dz:
        given["z"] = None
    wanted = (True, True, True, has_dz)
    yield library.backward(*types, dy, x, forward, settings, mask=forward["mask"], wanted=wanted, **given)


def _random(generator: np.random.Generator, count: int, dtype: str) -> np.ndarray:
    values = generator.normal(size=count)
    if dtype == "bfloat16":
        return (values.astype("float32").view("uint32") >> 16).astype("uint16")
    return values.astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_sanitizers_find_nothing(dtype: str) -> None:
    """And the results are those of the other build."""
    library = build.library(SOURCES, "sanitized")
    environment = build.sanitizer_environment() | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", "from cuda_on_cpu.test_kernels_sanitized import main; main()", str(library), dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [digest_of_every_kernel(kernels(), dtype)]


def main() -> None:
    """What the other process runs."""
    print(digest_of_every_kernel(Kernels(Path(sys.argv[1])), sys.argv[2]))
