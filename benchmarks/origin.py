"""What figures and logs come from: the state of the sources, the GPU's driver. Without torch."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources() -> str:
    """Tell one state of the package's sources from another, where there is no git too."""
    files = [*(path for path in (ROOT / "csrc").rglob("*") if path.is_file()), *(ROOT / "bn_ext").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.name != "_build_config.py":
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def driver() -> str:
    """Give the version of the GPU's driver; empty if nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return ""
