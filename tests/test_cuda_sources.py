"""The kernels' sources include no torch header, directly or through another: nvcc takes half a minute for one."""

from pathlib import Path

import pytest
from cuda_on_cpu.build import included

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
OTHERS = ("counters.h", "kernels.h", "machine.cpp", "plan_cache.h", "plan.cpp", "plan_teams.cpp", "traffic.cpp")
KERNELS = sorted([*CUDA.rglob("*.cu"), *CUDA.glob("*.cuh"), *(CUDA / name for name in OTHERS)])
TORCH = ("torch/", "ATen/", "c10/", "pybind11/", "Python.h", "caffe2/")


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.name)
def test_no_torch_header(file: Path) -> None:
    found = list(included(file, set()))
    assert found
    assert [f"{where.name} includes {name}" for where, name in found if name.startswith(TORCH)] == []


def test_kernels_are_found_and_the_host_side_would_be_caught() -> None:
    assert {"kernels.cu", "forward_float32.cu"} <= {file.name for file in KERNELS}
    assert any(name.startswith(TORCH) for _, name in included(CUDA / "batch_norm_cuda.cpp", set()))
