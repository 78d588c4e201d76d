"""For gpu_check.sh: ask torch and Python once for all that the script needs to know; exits with 2 if it cannot go on.

Prints four lines: the GPUs' compute capabilities, the state of the sources, those optional packages that there are, and
the machine as JSON.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("xdist", "pytest_benchmark")


def machine(torch: Any) -> dict[str, Any]:
    """What the results are of."""
    return {
        "device": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def missing() -> str:
    """Why the script cannot go on; empty if it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} cannot import torch; name another Python with PYTHON=, as PYTHON=.venv/bin/python"
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine; the tests that need none are run by make test"
    if importlib.util.find_spec("pytest") is None:
        return f"{sys.executable} cannot import pytest"
    return ""


def main() -> int:
    """Print the answers, or the reason on stderr."""
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
