"""What the CPU back-end does in its own way on each processor: instruction sets, streamed results, pages, caches."""

import os
import subprocess
import sys

import pytest

import bn_ext

EVERY_VALUE = """
import sys, bn_ext
sys.path.insert(0, "tests")
from test_numerics import check_every_16_bit_value
check_every_16_bit_value("cpu")
print(bn_ext.build_info().instruction_set)
"""


def instruction_sets() -> list[str]:
    """Those that this processor can run; a wrong name's error lists them."""
    output = run_python("import bn_ext; print(bn_ext.build_info())", BN_EXT_CPU_CAPABILITY="none").stdout
    return output.split("must be one of ")[1].split(" on this")[0].split(", ")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without a GPU: a processor's instruction set is chosen once."""
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", instruction_sets())
def test_every_16_bit_value_is_loaded_and_rounded_right(name: str) -> None:
    result = run_python(EVERY_VALUE, BN_EXT_CPU_CAPABILITY=name)
    assert result.stdout.split() == [name], result.stderr


# No cache: all results are streamed past it.
CACHES = pytest.mark.parametrize("cache_bytes", ["", "0"])


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("name", instruction_sets())
def test_every_instruction_set_is_right(name: str, cache_bytes: str) -> None:
    environment = {"BN_EXT_CPU_CAPABILITY": name, "BN_EXT_CPU_CACHE_BYTES": cache_bytes}
    result = run_python("from bn_ext.__main__ import main; main(['verify'])", **environment)
    assert "16 of 16 within tolerance" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("cache_bytes", ["32M", "-1", "much"])
def test_a_cache_size_that_is_no_number_is_refused(cache_bytes: str) -> None:
    code = "import torch, bn_ext; bn_ext.BatchNorm1d(3)(torch.randn(5, 3))"
    result = run_python(code, BN_EXT_CPU_CACHE_BYTES=cache_bytes)
    assert result.returncode != 0
    assert f"BN_EXT_CPU_CACHE_BYTES must be a number of bytes such as 33554432, got {cache_bytes}" in result.stderr


@pytest.mark.parametrize(
    ("reported", "threads", "usable"),
    [(260, 2, 32), (300, 1, 32), (256, 64, 256), (512, 16, 64), (8, 4, 8), (32, 96, 32)],
)
def test_a_shared_cache_counts_by_the_threads(reported: int, threads: int, usable: int) -> None:
    """In MiB. A cache that is as large as a machine's own is taken as reported."""
    module = bn_ext._extension.module
    assert module.usable_cache_bytes(reported << 20, threads) == usable << 20


def test_build_info_shows_the_cache() -> None:
    code = "import bn_ext; print(bn_ext.build_info())"
    assert "CPU cache     5.5 MiB used" in run_python(code, BN_EXT_CPU_CACHE_BYTES=str(11 << 19)).stdout


ACTIVATIONS = """
import bn_ext
from bn_ext import testing
from bn_ext.activations import NAMES
for seed, name in enumerate([None, *NAMES]):
    for shape in ((5, 3, 7, 9), (3, 16, 14, 14), (33, 5)):
        for residual in (True, False):
            for dtype in testing.TOLERANCE:
                case = testing.Case(shape, dtype, activation=name, residual=residual, seed=seed)
                assert max(testing.check(bn_ext.batch_norm, case).values()) <= 1, case
print("right", bn_ext.build_info().instruction_set)
"""


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("name", instruction_sets())
def test_activations_of_every_instruction_set(name: str, cache_bytes: str) -> None:
    result = run_python(ACTIVATIONS, BN_EXT_CPU_CAPABILITY=name, BN_EXT_CPU_CACHE_BYTES=cache_bytes)
    assert result.stdout.split() == ["right", name], result.stderr


RESULTS = """
import hashlib, torch, bn_ext
torch.manual_seed(0)
found = hashlib.sha256()
for shape in ((3, 16, 14, 14), (2, 20, 7, 9), (33, 40), (5, 3, 31, 33), (40, 6, 6, 6)):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in (torch.contiguous_format, torch.channels_last)[: len(shape) - 2 or 1]:
            x, z, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
            x.requires_grad_(), z.requires_grad_()
            weight = torch.rand(shape[1], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
            for options in ({}, {"activation": "relu"}, {"activation": "relu", "residual": z}, {"activation": "silu"}):
                y = bn_ext.batch_norm(x, None, None, weight, training=True, **options)
                inputs = [x, weight, *[z] * ("residual" in options)]
                for result in (y, *torch.autograd.grad(y, inputs, dy)):
                    found.update(result.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(found.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", instruction_sets())
def test_streamed_results_are_the_same_to_the_bit(name: str) -> None:
    """Runs that share a cache line with their neighbours are written partly past the caches and partly not."""
    streamed, stored = (
        run_python(RESULTS, BN_EXT_CPU_CAPABILITY=name, BN_EXT_CPU_CACHE_BYTES=size) for size in ("0", str(1 << 40))
    )
    assert streamed.stdout, streamed.stderr
    assert streamed.stdout == stored.stdout


FAULTS = """
import mmap, resource, torch, bn_ext
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block.madvise(mmap.MADV_HUGEPAGE)
before = faults()
block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
if faults() - before > 4096:
    print("none")
    raise SystemExit
x, dy = torch.randn(2, 16, 64, 112, 112)
norm = bn_ext.BatchNorm2d(64)
x.requires_grad_()
inputs = [x, norm.weight, norm.bias]
torch.autograd.grad(norm(x), inputs, dy)
before = faults()
y = norm(x)
forward = faults()
dx = torch.autograd.grad(y, inputs, dy)[0]
print(forward - before, faults() - forward, x.nbytes // 4096)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux")
def test_large_results_do_not_cost_a_page_fault_per_page() -> None:
    """As torch's do, whose allocator gets memory of this size from the system for every call."""
    result = run_python(FAULTS, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert result.stdout, result.stderr
    if result.stdout.strip() == "none":
        pytest.skip("this system gives no huge pages on request")
    forward, backward, pages = map(int, result.stdout.split())
    assert forward < pages / 4, (forward, pages)
    assert backward < pages / 4, (backward, pages)
