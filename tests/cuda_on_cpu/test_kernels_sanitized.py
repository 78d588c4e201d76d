"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own without torch."""

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cuda_on_cpu import build
from cuda_on_cpu.batch_norm import DTYPES, SOURCES, Kernels, Settings, Shape, kernels, memory_dtype, statistics_dtype
from cuda_on_cpu.device import POLICIES

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

SHAPES = [(3, 65, 7), (2, 5, 49), (1, 3, 300), (2, 4, 289), (9, 300, 1), (2, 64, 128), (4, 16, 12)]


def digest_of_every_kernel(library: Kernels) -> str:
    """Run every type, width and direction; a digest of all results."""
    digest = hashlib.sha256()
    generator = np.random.default_rng(0)
    for number, (dtype, (n, c, s)) in enumerate(itertools.product(DTYPES, SHAPES)):
        for channels_last, training in itertools.product((False, True), repeat=2):
            shape = Shape(n, c, s, channels_last or s == 1)
            statistics = memory_dtype(statistics_dtype(dtype))
            x, dy = (_random(generator, n * c * s, dtype) for _ in range(2))
            vectors = {name: generator.random(c).astype(statistics) + 0.5 for name in ("weight", "bias")}
            running = {name: generator.random(c).astype(statistics) + 0.5 for name in ("running_mean", "running_var")}
            count = {"num_batches_tracked": np.array([number])}
            settings = Settings(policy=POLICIES[number % 4], seed=number, misalignment=number % 2 * x.itemsize)
            types = (shape, dtype, statistics_dtype(dtype))
            forward = library.forward(*types, x, vectors | running | count, settings, training=training, momentum=None)
            backward = library.backward(*types, dy, x, forward, settings, training=training)
            for results in (forward, backward):
                for name, values in sorted(results.items()):
                    digest.update(b"" if name == "plan" or values is None else values.tobytes())
    return digest.hexdigest()


def _random(generator: np.random.Generator, count: int, dtype: str) -> np.ndarray:
    values = generator.normal(size=count)
    if dtype == "bfloat16":
        return (values.astype("float32").view("uint32") >> 16).astype("uint16")
    return values.astype(dtype)


def test_sanitizers_find_nothing() -> None:
    """And the results are those of the other build."""
    library = build.library(SOURCES, "sanitized")
    environment = build.sanitizer_environment() | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", "from cuda_on_cpu.test_kernels_sanitized import main; main()", str(library)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [digest_of_every_kernel(kernels())]


def main() -> None:
    """What the other process runs."""
    print(digest_of_every_kernel(Kernels(Path(sys.argv[1]))))
