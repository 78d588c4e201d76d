"""Facts about the build and this machine: versions, CUDA, instruction set, threads."""

import dataclasses
import importlib
import importlib.metadata
from typing import Any

import torch

from bn_ext import _extension


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """Facts about the build for bug reports and benchmarks; `print` shows them as a table.

    Examples:
        >>> info = bn_ext.build_info()
        >>> info.version == bn_ext.__version__, info.torch == torch.__version__
        (True, True)
    """

    version: str
    """Version of bn_ext."""
    torch: str
    """Version of the torch that is imported."""
    torch_at_build: str
    """Version of the torch that bn_ext was built against; empty if it has not been built."""
    loaded: bool
    """Whether the extension module could be loaded."""
    reason: str
    """Why it could not be loaded and how to fix that; empty if it was loaded."""
    cuda: bool
    """Whether the CUDA kernels are built."""
    cuda_reason: str
    """Why the CUDA kernels are or are not built."""
    cuda_architectures: str
    """Compute capabilities of the CUDA kernels, in the format of TORCH_CUDA_ARCH_LIST."""
    phase_clock: bool
    """Whether the CUDA kernels record when each phase starts (BN_EXT_PHASE_CLOCK=1); never so in a release."""
    instruction_set: str
    """Instruction set of the CPU kernels in use: avx512, avx2 or baseline; empty if not loaded."""
    threads: int
    """Threads that the CPU kernels use (torch.get_num_threads())."""
    cpu_cache_bytes: int
    """Size of the last-level cache that the CPU kernels assume for `threads` threads; 0 if not loaded."""

    def __str__(self) -> str:
        cuda = f"{'yes' if self.cuda else 'no'} ({self.cuda_reason})"
        if self.cuda_architectures:
            cuda += f", architectures {self.cuda_architectures}"
        if self.phase_clock:
            cuda += ", with the phase clock"
        lines = [
            ("bn_ext", self.version),
            ("torch", f"{self.torch}, at build {self.torch_at_build or 'unknown'}"),
            ("extension", "loaded" if self.loaded else f"not loaded: {self.reason}"),
            ("CUDA kernels", cuda),
            ("CPU kernels", f"{self.instruction_set or 'none'}, {self.threads} threads"),
            ("CPU cache", f"{self.cpu_cache_bytes / 2**20:g} MiB used"),
        ]
        return "\n".join(f"{name:<13} {value}" for name, value in lines)


def version() -> str:
    """Return the installed version of bn_ext."""
    try:
        return importlib.metadata.version("bn_ext")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _instruction_set() -> str:
    if _extension.module is None:
        return ""
    try:
        return str(_extension.module.instruction_set())
    except ValueError as error:  # BN_EXT_CPU_CAPABILITY requests a set that this processor lacks
        return f"none: {error}"


def _cpu_cache_bytes() -> int:
    if _extension.module is None:
        return 0
    try:
        return int(_extension.module.last_level_cache_bytes(torch.get_num_threads()))
    except ValueError:  # the first call of an operator reports it
        return 0


def build_info() -> BuildInfo:
    """Return facts about the build of bn_ext and about this machine.

    Never fails: if the extension cannot be loaded, `loaded` is False and `reason` explains why.

    Returns:
        A `BuildInfo`; `print(bn_ext.build_info())` shows it as a short table.

    Examples:
        >>> info = bn_ext.build_info()
        >>> info.threads == torch.get_num_threads()
        True
    """
    try:
        config: Any = importlib.import_module("bn_ext._build_config")
    except ImportError:
        config = None
    module = _extension.module
    return BuildInfo(
        version=version(),
        torch=torch.__version__,
        torch_at_build=config.TORCH if config else "",
        loaded=module is not None,
        reason=_extension.reason,
        cuda=bool(config and config.CUDA and module is not None),
        cuda_reason=config.CUDA_REASON if config else "bn_ext has not been built",
        cuda_architectures=config.CUDA_ARCHITECTURES if config else "",
        phase_clock=bool(config and getattr(config, "PHASE_CLOCK", False)),
        instruction_set=_instruction_set(),
        threads=torch.get_num_threads(),
        cpu_cache_bytes=_cpu_cache_bytes(),
    )
