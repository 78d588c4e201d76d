"""Builds the extension bn_ext._C against the installed torch. Metadata is in pyproject.toml.

Environment variables: BN_EXT_CUDA=0 builds without CUDA kernels, and BN_EXT_CUDA=1 fails if they cannot be built.
TORCH_CUDA_ARCH_LIST, MAX_JOBS and CUDA_HOME work as for every torch extension. BN_EXT_PHASE_CLOCK=1 makes a build for
lab/, whose kernels record when they reach each phase.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"bn_ext: torch cannot be imported ({error}). Install torch, then build with "
        "`pip install --no-build-isolation .`, because an isolated build does not see the installed torch."
    )

# PTX of the newest architecture lets newer GPUs run the kernels.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def find_toolkit() -> Path | None:
    """Return the CUDA toolkit's folder. The nvcc on PATH, from which torch derives it, may be only a wrapper."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for folder in [named] if named else [cpp_extension.CUDA_HOME, "/usr/local/cuda"]:
        if folder and Path(folder, "bin", "nvcc").exists() and Path(folder, "include", "cuda_runtime.h").exists():
            return Path(folder)
    return None


def choose_cuda() -> tuple[Path | None, str]:
    """Return the toolkit for the CUDA kernels, or None, and the reason. It does not matter whether there is a GPU."""
    wanted = os.environ.get("BN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"bn_ext: BN_EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "it was built with BN_EXT_CUDA=0, rebuild bn_ext without this setting"
    toolkit = find_toolkit()
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA, install a CUDA build of torch and rebuild bn_ext"
    elif toolkit is None:
        reason = "no CUDA toolkit was found at build time, set CUDA_HOME to its folder and rebuild bn_ext"
    else:
        return toolkit, f"torch has CUDA {torch.version.cuda}, and a toolkit was found"
    if wanted == "1":
        sys.exit(f"bn_ext: BN_EXT_CUDA=1, but {reason}")
    return None, reason


def wants_phase_clock(cuda: bool) -> bool:
    """Whether BN_EXT_PHASE_CLOCK requests kernels that record the times of their phases, for lab/, not for releases."""
    wanted = os.environ.get("BN_EXT_PHASE_CLOCK", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"bn_ext: BN_EXT_PHASE_CLOCK must be 0 or 1, got {wanted!r}")
    if wanted == "1" and not cuda:
        sys.exit("bn_ext: BN_EXT_PHASE_CLOCK=1 requires CUDA kernels, but this build has none; set BN_EXT_CUDA=1 too")
    return wanted == "1"


def build_config(cuda: bool, reason: str, phase_clock: bool) -> str:
    """Return the module that bn_ext.build_info() reads. It can be read even if the extension cannot be loaded."""
    lines = [
        '"""Written by setup.py after it has built the extension."""',
        "",
        f"TORCH = {torch.__version__!r}",
        f"CUDA = {cuda!r}",
        f"CUDA_REASON = {reason!r}",
        f"CUDA_ARCHITECTURES = {os.environ.get('TORCH_CUDA_ARCH_LIST', '') if cuda else ''!r}",
        f"PHASE_CLOCK = {phase_clock!r}",
    ]
    return "\n".join(lines) + "\n"


def build_command(config: str) -> type:
    """Return torch's build_ext, extended to write the build config next to the extension."""

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            super().run()
            package = ROOT / "bn_ext" if self.inplace else Path(self.build_lib) / "bn_ext"
            (package / "_build_config.py").write_text(config)

    return BuildExtension


def paths(*patterns: str) -> list[str]:
    """Return files of the source folder, named as setuptools requires."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def optimisation() -> list[str]:
    """Return flags that only GCC accepts: for -O3's vectoriser, and for earlier garbage collection.

    The rest of -O3 takes a quarter of the compile time and makes nothing faster. Garbage collection frees 100 MB while
    torch's header for autograd is compiled.
    """
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # no compiler: the build will report it, and metadata does not need one
        return []
    is_gcc = "Free Software Foundation" in version
    return ["-ftree-vectorize", "-fvect-cost-model=dynamic", "--param=ggc-min-expand=30"] if is_gcc else []


def extension(cuda: bool, reason: str, phase_clock: bool) -> "cpp_extension.CppExtension":
    """Return the extension module, with the CUDA back-end or its replacement."""
    # Every build has the planner and one of these two files.
    excluded = "csrc/cuda/unavailable.cpp" if cuda else "csrc/cuda/batch_norm_cuda.cpp"
    sources = [path for path in paths("csrc/*.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/*.cpp") if path != excluded]
    # Without OpenMP, at::parallel_for in an extension is silently serial.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    # Nobody reads errno, and without it the compiler vectorises loops with a square root.
    cxx = ["-O2", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", *optimisation(), *openmp]
    # Only the headers of the operators that are used: this halves the compiler's time and memory.
    macros = [("AT_PER_OPERATOR_HEADERS", None), *[("BN_EXT_PHASE_CLOCK", None)] * phase_clock]
    depends = paths("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh")
    if cuda:
        return cpp_extension.CUDAExtension(
            "bn_ext._C",
            sources + paths("csrc/cuda/**/*.cu"),
            define_macros=macros,
            # nvcc compiles two architectures of a file in parallel, so the last file ends sooner.
            extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "--threads=2"]},
            extra_link_args=openmp,
            depends=depends,
        )
    return cpp_extension.CppExtension(
        "bn_ext._C",
        sources,
        define_macros=[*macros, ("BN_EXT_CUDA_REASON", f'"{reason}"')],
        extra_compile_args={"cxx": cxx},
        extra_link_args=openmp,
        depends=depends,
    )


def main() -> None:
    """Choose whether to build CUDA kernels, print the choice and its reason, and build."""
    toolkit, reason = choose_cuda()
    cuda = toolkit is not None
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
    print(f"bn_ext: torch {torch.__version__}; CUDA kernels: {'yes' if cuda else 'no'}: {reason}", flush=True)
    phase_clock = wants_phase_clock(cuda)
    setup(
        ext_modules=[extension(cuda, reason, phase_clock)],
        cmdclass={"build_ext": build_command(build_config(cuda, reason, phase_clock))},
    )


main()
