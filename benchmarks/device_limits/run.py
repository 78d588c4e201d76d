"""Compile limits.cu, run its parts within a budget of time, and gather the lines that it prints."""

import datetime
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from scripts.cuda_toolkit import find_nvcc
from scripts.gpu_summary import commit

from .. import origin

HERE = Path(__file__).parent
PARTS = ("copy", "launches", "barriers", "resident", "cache", "slices")  # as in limits.cu
SILENCE = 20.0  # seconds without a line, after which the program has come to a halt
LEAST = 5.0  # seconds that the program must have


class LimitsError(Exception):
    """Nothing could be measured; the message says why."""


class Gpu(NamedTuple):
    """What nvidia-smi tells before anything is compiled."""

    name: str
    driver: str
    architecture: str  # as sm_90


def find_gpu() -> Gpu:
    """The first GPU of this machine."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        raise LimitsError(f"there is no GPU to measure: nvidia-smi could not be run ({error})") from error
    if not lines:
        raise LimitsError("there is no GPU to measure: nvidia-smi lists none")
    name, driver, capability = (word.strip() for word in lines[0].rsplit(",", 2))
    return Gpu(name, driver, f"sm_{capability.replace('.', '')}")


def compile_program(architecture: str, folder: Path) -> tuple[Path, str]:
    """The program for this architecture, and nvcc's version."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise LimitsError("no nvcc was found; install the CUDA toolkit or set CUDA_HOME to it")
    program = folder / "limits"
    flags = ["-O3", "--expt-relaxed-constexpr", f"-arch={architecture}"]
    result = subprocess.run(
        [nvcc, *flags, "-o", program, HERE / "limits.cu"], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise LimitsError(f"{nvcc} failed with status {result.returncode}:\n{result.stderr}{result.stdout}")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return program, version.strip().splitlines()[-1]


def run_once(
    command: list[str], end: float, folder: Path, silence: float = SILENCE
) -> tuple[list[dict[str, Any]], str]:
    """The lines that a command prints, and what went wrong with it, if anything.

    It is ended when it has printed nothing for too long, or at `end` of time.monotonic().
    """
    output, errors = folder / "output", folder / "errors"
    wrong = ""
    with output.open("w") as out, errors.open("w") as err, subprocess.Popen(command, stdout=out, stderr=err) as process:
        size, heard = 0, time.monotonic()
        while process.poll() is None and not wrong:
            time.sleep(0.05)
            now = time.monotonic()
            if output.stat().st_size != size:
                size, heard = output.stat().st_size, now
            if now > end:
                wrong = "it was ended, since its time was over"
            elif now - heard > silence:
                wrong = f"it was ended, since nothing had come of it for {silence:.0f} s"
        if wrong:
            process.kill()
    if not wrong and process.returncode != 0:
        said = errors.read_text(errors="replace").strip()
        wrong = f"status {process.returncode}" + (f": {said.splitlines()[-1]}" if said else "")
    return list(parsed(output.read_text(errors="replace"))), wrong


def parsed(text: str) -> list[dict[str, Any]]:
    """The objects among the lines; one that was cut off in the middle is left out."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "part" in value:
            found.append(value)
    return found


def gather(lines: list[dict[str, Any]], wrong: str, parts: dict[str, Any], device: dict[str, Any]) -> None:
    """Sort the lines of one run into its parts; the one that had begun and not ended is where things went wrong."""
    for line in lines:
        values = {name: value for name, value in line.items() if name != "part"}
        if line["part"] == "device":
            device.update(values)
        elif "begins" in line:
            parts[line["part"]] = {"figures": [], "complete": False}
        elif "ends" in line:
            parts[line["part"]].update(complete=line["complete"], seconds=line["seconds"])
        else:
            parts[line["part"]]["figures"].append(values)
    for part in parts.values():
        if wrong and "seconds" not in part and "error" not in part:
            part["error"] = wrong


def run_parts(program: list[str], names: list[str], end: float, folder: Path, silence: float = SILENCE) -> Any:
    """All parts; where the program comes to grief in one, it is run again for those behind it."""
    parts: dict[str, Any] = {}
    device: dict[str, Any] = {}
    left = list(names)
    while left:
        seconds = end - time.monotonic()
        if seconds < LEAST:
            parts |= {name: {"figures": [], "complete": False, "error": "there was no time left"} for name in left}
            break
        lines, wrong = run_once([*program, f"{seconds - 1:.1f}", *left], end, folder, silence)
        gather(lines, wrong, parts, device)
        behind = [name for name in left if name not in parts]
        if len(behind) == len(left):  # nothing would come of it the next time either
            reason = wrong or "nothing came of it"
            parts |= {name: {"figures": [], "complete": False, "error": reason} for name in left}
            break
        left = behind
    return {"device": device, "parts": {name: parts[name] for name in names}}


def measure(gpu: Gpu, program: Path, nvcc: str, names: list[str], end: float, folder: Path) -> dict[str, Any]:
    """Everything that goes into the file."""
    found = run_parts([str(program)], names, end, folder)
    about = {
        "date": datetime.date.today().isoformat(),
        "name": gpu.name,
        "driver": gpu.driver,
        "architecture": gpu.architecture,
        "nvcc": nvcc,
        "sources": origin.sources(),
        "commit": commit(HERE),
    }
    return {"run": about, **found}


def as_text(found: dict[str, Any]) -> str:
    """As JSON, a line for each figure."""
    text = json.dumps(found, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda match: " ".join(match[0].split()), text) + "\n"
