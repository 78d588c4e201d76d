"""Builds the extension bn_ext._C against the torch that is installed; metadata is in pyproject.toml.

Environment: BN_EXT_CUDA=0|1 leaves the CUDA kernels out or insists on them; TORCH_CUDA_ARCH_LIST, MAX_JOBS and
CUDA_HOME as for every torch extension. BN_EXT_PHASE_CLOCK=1 makes the build of lab/README.md, whose kernels note when
they come to which phase.
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
        f"bn_ext: torch cannot be imported ({error}). Install torch first, then build with "
        "`pip install --no-build-isolation .`: an isolated build does not see the installed torch."
    )

# The newest architecture gets PTX too, so that later GPUs can run it.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder. Torch takes it from CUDA_HOME or the nvcc on PATH, which may be a mere wrapper."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for folder in [named] if named else [cpp_extension.CUDA_HOME, "/usr/local/cuda"]:
        if folder and Path(folder, "bin", "nvcc").exists() and Path(folder, "include", "cuda_runtime.h").exists():
            return Path(folder)
    return None


def choose_cuda() -> tuple[Path | None, str]:
    """The toolkit to build the CUDA kernels with or None, and the reason. Never asks whether a GPU is there."""
    wanted = os.environ.get("BN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"bn_ext: BN_EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "it was built with BN_EXT_CUDA=0, build it again without that"
    toolkit = find_toolkit()
    if torch.version.cuda is None:
        reason = (
            f"torch {torch.__version__} was built without CUDA, install a CUDA build of torch and build bn_ext again"
        )
    elif toolkit is None:
        reason = "no CUDA toolkit was found at build time, set CUDA_HOME to one and build bn_ext again"
    else:
        return toolkit, f"torch has CUDA {torch.version.cuda}, and a toolkit was found"
    if wanted == "1":
        sys.exit(f"bn_ext: BN_EXT_CUDA=1, but {reason}")
    return None, reason


def wants_phase_clock(cuda: bool) -> bool:
    """Whether BN_EXT_PHASE_CLOCK asks for kernels that note the times of their phases: for lab/, not to be released."""
    wanted = os.environ.get("BN_EXT_PHASE_CLOCK", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"bn_ext: BN_EXT_PHASE_CLOCK must be 0 or 1, got {wanted!r}")
    if wanted == "1" and not cuda:
        sys.exit("bn_ext: BN_EXT_PHASE_CLOCK=1 is for CUDA kernels, and there are to be none; see BN_EXT_CUDA=1")
    return wanted == "1"


def build_config(cuda: bool, reason: str, phase_clock: bool) -> str:
    """What bn_ext.build_info() tells of the build; a module beside the extension, readable when that cannot load."""
    lines = [
        '"""Written by setup.py when it has built the extension."""',
        "",
        f"TORCH = {torch.__version__!r}",
        f"CUDA = {cuda!r}",
        f"CUDA_REASON = {reason!r}",
        f"CUDA_ARCHITECTURES = {os.environ.get('TORCH_CUDA_ARCH_LIST', '') if cuda else ''!r}",
        f"PHASE_CLOCK = {phase_clock!r}",
    ]
    return "\n".join(lines) + "\n"


def build_command(config: str) -> type:
    """Torch's build_ext, which also leaves the build config where it leaves the extension."""

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            super().run()
            package = ROOT / "bn_ext" if self.inplace else Path(self.build_lib) / "bn_ext"
            (package / "_build_config.py").write_text(config)

    return BuildExtension


def paths(*patterns: str) -> list[str]:
    """Files of the source folder, as setuptools wants them named."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def optimisation() -> list[str]:
    """Flags that only GCC takes: -O3's vectorizer, and to collect garbage sooner.

    The rest of -O3 takes a quarter of the compile time and makes nothing faster. The garbage is 100 MB with torch's
    header for autograd.
    """
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # no compiler: the build says so, and metadata needs none
        return []
    is_gcc = "Free Software Foundation" in version
    return ["-ftree-vectorize", "-fvect-cost-model=dynamic", "--param=ggc-min-expand=30"] if is_gcc else []


def extension(cuda: bool, reason: str, phase_clock: bool) -> "cpp_extension.CppExtension":
    """The one extension module, with the CUDA back-end or what stands in for it."""
    # The planner is in every build; of the host's side of CUDA there is one or the other.
    left_out = "csrc/cuda/unavailable.cpp" if cuda else "csrc/cuda/batch_norm_cuda.cpp"
    sources = [path for path in paths("csrc/*.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/*.cpp") if path != left_out]
    # OpenMP: without it at::parallel_for in an extension is serial, without a word.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    # errno: nobody reads it, and loops with a square root become vectors.
    cxx = ["-O2", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", *optimisation(), *openmp]
    # Headers with the operators that are named, not with all of ATen's: half the time and memory of a compiler.
    macros = [("AT_PER_OPERATOR_HEADERS", None), *[("BN_EXT_PHASE_CLOCK", None)] * phase_clock]
    depends = paths("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh")
    if cuda:
        return cpp_extension.CUDAExtension(
            "bn_ext._C",
            sources + paths("csrc/cuda/**/*.cu"),
            define_macros=macros,
            # Two architectures of a file at a time, so that the last file is done sooner.
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
    """Decides, says what was decided and why, and builds."""
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
