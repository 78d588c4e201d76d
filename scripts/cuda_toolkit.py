"""Find the CUDA toolkit."""

import os
import shutil
from pathlib import Path


def find_nvcc() -> Path | None:
    """Return the CUDA compiler in CUDA_HOME if that is set, else the one on PATH or in the default folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in [Path(home, "bin", "nvcc")] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]:
        if candidate and Path(candidate).exists():
            return Path(candidate)
    return None
