"""For gpu_check.sh: query torch and Python for all facts that the script needs; exit with 2 if it cannot continue.

Prints four lines: the GPUs' compute capabilities, the state of the sources, the optional packages that are installed,
and the machine as JSON.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("xdist", "pytest_benchmark")


def machine(torch: Any) -> dict[str, Any]:
    """Return the machine and the versions that the results belong to."""
    return {
        "device": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def missing() -> str:
    """Return why the script cannot continue; empty if it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} cannot import torch; set PYTHON to one that can, such as PYTHON=.venv/bin/python"
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine; `make test` runs the tests that need none"
    if importlib.util.find_spec("pytest") is None:
        return f"{sys.executable} cannot import pytest; install it there"
    return ""


def main() -> int:
    """Print the facts, or on stderr why the script cannot continue."""
    if reason := missing():
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks import origin

    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    print(";".join(sorted({f"{major}.{minor}" for major, minor in capabilities})))
    print(origin.sources())
    print(*(name for name in OPTIONAL if importlib.util.find_spec(name) is not None))
    print(json.dumps(machine(torch) | {"driver": origin.driver()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
