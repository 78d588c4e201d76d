"""Where the CUDA toolkit is."""

import os
import shutil
from pathlib import Path


def find_nvcc() -> Path | None:
    """The CUDA compiler: of CUDA_HOME, the one on the PATH, or the usual folder's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in [Path(home, "bin", "nvcc")] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]:
        if candidate and Path(candidate).exists():
            return Path(candidate)
    return None
