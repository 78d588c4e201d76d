"""How evenly the CPU back-end shares its work among 4 to 64 threads: values counted by tests/cpu_shares, no times.

The shapes are those of ResNet-50 at batch sizes 32 and 8. A share is the number of values of the busiest thread divided
by the mean over all threads. The busiest thread is that of each parallel region, and the regions are added up, because
one begins after all threads have ended the one before. A value that is summed and normalised counts twice.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import build

from benchmarks.shapes import RESNET50

SOURCES = [
    Path(__file__).parent / "cpu_shares" / "shares.cpp",
    Path(__file__).parents[1] / "csrc" / "cpu" / "batch_norm_cpu.cpp",
]
STAGES = {"forward": 2, "backward": 2, "eval": 1}
BATCHES = (32, 8)
THREADS = (4, 8, 16, 32, 64)
LIMIT = 1.35

Shares = dict[tuple[str, int], dict[int, float]]  # (shape, batch size): threads: share

# All shares above LIMIT, in forward and backward of training. A channels_last tensor of at most 2^21 values has 7 or 8
# segments, so some of 16 threads and more have none. Most contiguous tensors have groups of planes of at least 12 KiB.
CHANNELS_LAST: Shares = {
    ("stem_64x112x112", 8): {64: 2.56},
    ("layer1_64x56x56", 32): {64: 2.56},
    ("layer1_64x56x56", 8): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer1_256x56x56", 8): {64: 2.56},
    ("layer2_128x56x56", 8): {32: 2.46, 64: 4.92},
    ("layer2_128x28x28", 32): {32: 2.46, 64: 4.92},
    ("layer2_128x28x28", 8): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer2_512x28x28", 8): {32: 2.46, 64: 4.93},
    ("layer3_256x28x28", 32): {64: 2.56},
    ("layer3_256x28x28", 8): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer3_256x14x14", 32): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer3_256x14x14", 8): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer3_1024x14x14", 32): {64: 2.56},
    ("layer3_1024x14x14", 8): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer4_512x14x14", 32): {32: 2.46, 64: 4.93},
    ("layer4_512x14x14", 8): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer4_512x7x7", 32): {16: 2.0, 32: 4.0, 64: 8.0},
    ("layer4_512x7x7", 8): {16: 2.29, 32: 4.57, 64: 9.14},
    ("layer4_2048x7x7", 32): {32: 2.29, 64: 4.57},
    ("layer4_2048x7x7", 8): {16: 2.0, 32: 4.0, 64: 8.0},
}
CONTIGUOUS_FLOAT32: Shares = {
    ("layer3_256x14x14", 32): {32: 1.5, 64: 1.5},
    ("layer3_256x14x14", 8): {32: 1.5, 64: 1.5},
    ("layer4_512x14x14", 32): {64: 1.5},
    ("layer4_512x14x14", 8): {64: 1.5},
    ("layer4_512x7x7", 32): {64: 2.5},
    ("layer4_512x7x7", 8): {64: 2.62},
}
CONTIGUOUS_BFLOAT16: Shares = {
    ("layer2_128x28x28", 32): {32: 1.5, 64: 1.5},
    ("layer2_128x28x28", 8): {32: 1.5, 64: 1.5},
    ("layer3_256x28x28", 32): {64: 1.5},
    ("layer3_256x28x28", 8): {64: 1.5},
    ("layer3_256x14x14", 32): {16: 1.38, 32: 1.38, 64: 2.75},
    ("layer3_256x14x14", 8): {16: 1.38, 32: 1.38, 64: 2.75},
    ("layer3_1024x14x14", 32): {64: 1.38},
    ("layer3_1024x14x14", 8): {64: 1.38},
    ("layer4_512x14x14", 32): {32: 1.38, 64: 1.38},
    ("layer4_512x14x14", 8): {32: 1.38, 64: 1.38},
    ("layer4_512x7x7", 32): {64: 2.5},
    ("layer4_512x7x7", 8): {32: 2.0, 64: 4.0},
}
TRAINING = {
    ("channels_last", "float32"): CHANNELS_LAST,
    ("channels_last", "bfloat16"): CHANNELS_LAST,
    ("contiguous", "float32"): CONTIGUOUS_FLOAT32,
    ("contiguous", "bfloat16"): CONTIGUOUS_BFLOAT16,
}
# In both layouts and dtypes: few units, of about 2^13 values.
EVAL: Shares = {("layer4_512x7x7", 8): {64: 2.61}}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The back-end with kernels that count, as a program."""
    compiler = build.compiler()
    if compiler is None:
        pytest.skip(f"needs g++ {build.OLDEST_GCC} or newer (CXX names another one)")
    target = tmp_path_factory.mktemp("cpu_shares") / "shares"
    folders = ["-I", SOURCES[0].parent / "include", "-isystem", Path(torch.__file__).parent / "include"]
    command = [*compiler, "-O1", "-Wall", "-Wextra", "-Werror", *folders, *SOURCES, "-o", target]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target


def counts(program: Path, cases: list[str]) -> list[tuple[int, int]]:
    """For each case the values of all threads and of the busiest one."""
    result = subprocess.run([program], input="\n".join(cases), capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == len(cases)
    return [(int(total), int(busiest)) for total, busiest in lines]


def test_shares_by_hand(program: Path) -> None:
    """392 rows are cut into 7 segments of 56, so the busiest of 64 threads, and of 7, has one; of 4 threads it has two.

    With one thread, or of 2^14 values and fewer, one thread does it all.
    """
    values, segment = 8 * 512 * 49, 56 * 512
    cases = [f"8 512 49 1 float32 forward {threads}" for threads in (64, 7, 4, 1)]
    assert counts(program, [*cases, "8 32 64 1 float32 backward 64"]) == [
        (2 * values, 2 * segment),
        (2 * values, 2 * segment),
        (2 * values, 4 * segment),
        (2 * values, 2 * values),
        (2 * 2**14, 2 * 2**14),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", STAGES)
def test_busiest_thread_has_little_more_than_the_mean(program: Path, direction: str, layout: str, dtype: str) -> None:
    """Except in the cases that are listed. A change that makes one of them more even must correct the list."""
    keys = [(shape, batch, threads) for shape in RESNET50 for batch in BATCHES for threads in THREADS]
    cases = [
        f"{batch} {shape.channels} {shape.height * shape.width} {layout == 'channels_last':d} {dtype} {direction} {n}"
        for shape, batch, n in keys
    ]
    uneven: Shares = {}
    for (shape, batch, threads), (total, busiest) in zip(keys, counts(program, cases), strict=True):
        values = batch * shape.channels * shape.height * shape.width
        assert total == STAGES[direction] * values, f"{shape.name} N={batch}: values are left out or done twice"
        share = busiest * threads / total
        if share > LIMIT:
            uneven.setdefault((shape.name, batch), {})[threads] = round(share, 2)
    assert uneven == (EVAL if direction == "eval" else TRAINING[layout, dtype])
