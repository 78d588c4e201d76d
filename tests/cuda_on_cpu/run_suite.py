"""Runs the package's test suite with the CUDA kernels, on the simulated device, in place of the CPU kernels.

python tests/cuda_on_cpu/run_suite.py [pytest's arguments; a -k takes the place of the one here]

The package is built once more for that, in a copy of the sources under build/, with backend.cpp as its CPU back-end. A
fault of the device comes out as a RuntimeError of the call.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils import cpp_extension

from cuda_on_cpu import build
from cuda_on_cpu.batch_norm import KERNELS

FOLDER = build.FOLDER / "suite"
NOT_COPIED = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "*.egg-info")

# These look at the build, at the CPU kernels, at what measures, at Python code that is the same for all devices, or at
# the simulated device itself; or they are too large for it.
WITHOUT = [
    "tests/cuda_on_cpu",
    *(f"tests/test_{name}.py" for name in ("build", "cuda_sources", "gpu_check", "large", "processor")),
    *(f"tests/test_{name}.py" for name in ("benchmarks", "benchmark_reports", "benchmark_runs", "cudnn_graph")),
    *(f"tests/test_{name}.py" for name in ("convergence_benchmark", "device_limits", "step_profile")),
    *(f"tests/test_{name}.py" for name in ("training_benchmark", "training_report", "networks_check", "opacus")),
    *(f"tests/test_{name}.py" for name in ("fuse_arguments", "fuse_changes", "fuse_effects", "fuse_questions")),
    *(f"tests/test_{name}.py" for name in ("fuse_code_changes", "fuse_module_changes")),
    *(f"tests/test_{name}.py" for name in ("reverted", "exact_class_tools")),
]
# Whether a mean with inf in it is inf or NaN depends on the order of sums; test_kernels.py has its own such test.
EXCEPT = "not instruction_set and not 16_bit_value and not inf_and_nan"


def build_package() -> None:
    """Copy the sources and build the extension in them, or bring both up to date."""
    shutil.rmtree(FOLDER / "csrc", ignore_errors=True)  # or files that are gone would be compiled
    shutil.copytree(build.ROOT, FOLDER, ignore=NOT_COPIED, dirs_exist_ok=True)
    kernels = build.library(KERNELS)
    folders = [FOLDER / folder for folder in ("csrc", "csrc/cpu", "csrc/cpu/isa")]
    sources = [path for folder in folders for path in sorted(folder.glob("*.cpp"))]
    sources = [path for path in sources if path.name != "batch_norm_cpu.cpp"]
    sources += [FOLDER / "csrc/cuda/unavailable.cpp", FOLDER / "tests/cuda_on_cpu/backend.cpp"]
    objects = FOLDER / "build"
    objects.mkdir(exist_ok=True)
    cpp_extension.load(
        "_C",
        [str(source) for source in sources],
        extra_cflags=["-O1", "-fopenmp", "-fvisibility=hidden", "-DBN_EXT_CUDA_REASON=__FILE__"],
        extra_include_paths=[str(build.HERE / "include")],
        extra_ldflags=["-fopenmp", str(kernels), f"-Wl,-rpath,{kernels.parent}"],
        build_directory=str(objects),
        is_python_module=False,
    )
    shutil.copy(objects / "_C.so", FOLDER / "bn_ext")
    config = f"TORCH, CUDA, CUDA_REASON, CUDA_ARCHITECTURES = {torch.__version__!r}, False, 'a build for tests', ''\n"
    (FOLDER / "bn_ext" / "_build_config.py").write_text(config)


def main() -> None:
    """Build, and run the tests in the copy."""
    build_package()
    ignored = [f"--ignore={path}" for path in WITHOUT]
    marks = ["-m", "not processes"]  # whose processes would each simulate a device
    command = [sys.executable, "-m", "pytest", "tests", *ignored, *marks, "-k", EXCEPT, *sys.argv[1:]]
    # The copy before anything installed.
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    sys.exit(subprocess.run(command, cwd=FOLDER, env=environment, check=False).returncode)


main()
