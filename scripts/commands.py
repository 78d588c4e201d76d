"""Run the commands of a check; if one fails, stop with one sentence."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent.resolve()


def fail(sentence: str) -> NoReturn:
    """Stop the script with this sentence as its error."""
    sys.exit(f"{Path(sys.argv[0]).stem}: {sentence}")


def run(step: str, *command: str | Path, cwd: Path) -> None:
    """Run a command in `cwd`; stop if it fails. `step` names it in the error."""
    print("+", *command, flush=True)
    status = subprocess.run([str(c) for c in command], cwd=cwd, check=False).returncode
    if status != 0:
        fail(f"{step} failed with status {status}, see above")


def output_of(step: str, *command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Return what a command prints on both streams; stop if it fails."""
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        print(result.stdout)
        fail(f"{step} failed with status {result.returncode}, see above")
    return result.stdout
