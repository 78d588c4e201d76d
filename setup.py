"""Builds the extension bn_ext._C against the torch that is installed; metadata is in pyproject.toml.

Environment: BN_EXT_CUDA=0|1 leaves the CUDA kernels out or insists on them; TORCH_CUDA_ARCH_LIST, MAX_JOBS and
CUDA_HOME as for every torch extension.
"""

import os
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


def choose_cuda(sources: list[str]) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason in words. Never asks whether a GPU is in the machine."""
    wanted = os.environ.get("BN_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"bn_ext: BN_EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return False, "it was built with BN_EXT_CUDA=0, build it again without that"
    if not sources:
        reason = "this version has no CUDA kernels yet, move the model to the CPU or use torch.nn"
    elif torch.version.cuda is None:
        reason = (
            f"torch {torch.__version__} was built without CUDA, install a CUDA build of torch and build bn_ext again"
        )
    elif cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
        reason = "no CUDA toolkit was found at build time, set CUDA_HOME to one and build bn_ext again"
    else:
        return True, f"torch has CUDA {torch.version.cuda}, toolkit in CUDA_HOME"
    if wanted == "1":
        sys.exit(f"bn_ext: BN_EXT_CUDA=1, but {reason}")
    return False, reason


def build_config(cuda: bool, reason: str) -> str:
    """What bn_ext.build_info() tells of the build; a module beside the extension, readable when that cannot load."""
    lines = [
        '"""Written by setup.py when it has built the extension."""',
        "",
        f"TORCH = {torch.__version__!r}",
        f"CUDA = {cuda!r}",
        f"CUDA_REASON = {reason!r}",
        f"CUDA_ARCHITECTURES = {os.environ.get('TORCH_CUDA_ARCH_LIST', '') if cuda else ''!r}",
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


def extension(cuda: bool, cuda_sources: list[str], reason: str) -> "cpp_extension.CppExtension":
    """The one extension module, with or without CUDA sources."""
    sources = [
        str(path.relative_to(ROOT)) for folder in ("csrc", "csrc/cpu") for path in sorted((ROOT / folder).glob("*.cpp"))
    ]
    # OpenMP: without it at::parallel_for in an extension is serial, without a word.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    cxx = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", *openmp]
    depends = [
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inl", ".cuh")
    ]
    if cuda:
        return cpp_extension.CUDAExtension(
            "bn_ext._C",
            sources + cuda_sources,
            extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
            extra_link_args=openmp,
            depends=depends,
        )
    return cpp_extension.CppExtension(
        "bn_ext._C",
        [*sources, "csrc/cuda/unavailable.cpp"],
        define_macros=[("BN_EXT_CUDA_REASON", f'"{reason}"')],
        extra_compile_args={"cxx": cxx},
        extra_link_args=openmp,
        depends=depends,
    )


def main() -> None:
    """Decides, says what was decided and why, and builds."""
    cuda_sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    cuda, reason = choose_cuda(cuda_sources)
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    print(f"bn_ext: torch {torch.__version__}; CUDA kernels: {'yes' if cuda else 'no'}: {reason}", flush=True)
    setup(
        ext_modules=[extension(cuda, cuda_sources, reason)],
        cmdclass={"build_ext": build_command(build_config(cuda, reason))},
    )


main()
