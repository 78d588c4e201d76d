"""For gpu_check.sh: write summary.json from the list of its steps; exits with 1 unless all passed or were left out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = [
    "build",
    "verify",
    "verify-none",
    "verify-block",
    "verify-cluster",
    "tests",
    "benchmark",
    "driver",
    "memcheck",
    "racecheck",
    "initcheck",
    "synccheck",
]


def commit(sources: Path) -> str:
    """Of the sources, with a mark if there are changes on top; empty if there is no git."""
    command = ["git", "-C", str(sources), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def driver() -> str:
    """Version of the GPU's driver; empty if nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> dict[str, Any]:
    """What the results are of."""
    import torch  # late: a summary is written also where this fails

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "devices": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else [],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def main(steps_file: str, sources: str, summary_file: str) -> int:
    """Write the summary and print where it is."""
    steps = []
    for line in Path(steps_file).read_text().splitlines():
        name, result, status, seconds, command = line.split("\t")
        code = int(status) if status else None
        steps.append({"name": name, "result": result, "status": code, "seconds": int(seconds), "command": command})
    # A script that was ended before its time has not passed.
    complete = [step["name"] for step in steps] == STEPS
    passed = complete and all(step["result"].startswith(("passed", "skipped: ")) for step in steps)
    passed = passed and steps[0]["result"] == "passed"
    summary: dict[str, Any] = {"passed": passed, "commit": commit(Path(sources)), "driver": driver()}
    try:
        summary |= machine()
    except Exception as error:
        summary["error"] = f"torch could not be asked: {error}"
    summary |= {"seconds": sum(step["seconds"] for step in steps), "steps": steps}
    Path(summary_file).write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{'passed' if passed else 'FAILED'}: {summary_file}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
