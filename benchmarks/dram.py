"""Count what bn_ext and its rivals read from a GPU's memory and write to it: `python -m benchmarks.dram`.

Needs `ncu`, Nsight Compute. A program that makes each call once runs under it. Before every call a read of a large
buffer fills the L2 cache with lines that need no writing back; between the kernels of a call the cache is left alone,
as in real life. The same read behind the call evicts the lines that the call has written and the cache still holds, and
their bytes count as the call's.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from .cells import FileError, read_json
from .names import COMPILED, OURS, RIVAL
from .tables import table, versions

HERE = Path(__file__).parent
MARK = "spin_kernel"  # of torch.cuda._sleep: before a call's kernels, behind them, and behind the read that follows
READ, WRITTEN = METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
DIRECTIONS = ("forward", "backward")
FLUSH_BYTES = 512 << 20
GRACE = 45.0  # seconds that starting and reporting may take beside the calls


def calls(providers: list[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Give what is measured: a description, and the call; large shapes and one that the cache could hold."""
    import torch

    from .bench import make_subject
    from .inputs import DTYPES, LAYOUTS, Case, make_inputs
    from .operations import PLAIN, least_bytes
    from .selection import ADD_RELU, SAMPLE

    device = torch.device("cuda")
    wanted = [(PLAIN, *each) for each in product(("bfloat16", "float32"), LAYOUTS, SAMPLE[:4])]
    wanted += [(ADD_RELU, "bfloat16", layout, SAMPLE[1]) for layout in LAYOUTS]
    for operation, dtype, layout, shape in wanted:
        case = Case(shape.name, shape.size(256), dtype, layout, operation)
        inputs = make_inputs(case, device, copies=1)
        for provider in providers:
            if provider == COMPILED and (dtype, shape) != ("bfloat16", SAMPLE[1]):
                continue  # compiling takes its time
            try:
                subject = make_subject(provider, operation, inputs)
                subject.calls["forward+backward"][0]()
            except Exception as error:  # of whatever kind: compilers and libraries have their own
                print(f"{provider}, {case.label}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            for direction in DIRECTIONS if operation == PLAIN else ("forward+backward",):
                about = case.key(direction)._asdict() | {"provider": provider}
                about["bytes_min"] = least_bytes(operation, case.size, DTYPES[dtype].itemsize, direction)
                yield about, subject.calls[direction][0]


def make_calls(providers: list[str], described: Path, seconds: float) -> None:
    """Make every call that is begun in time, marked for `counted`; ncu profiles between start and stop only."""
    import torch
    from torch._functorch import config

    config.donated_buffer = False
    deadline = time.monotonic() + seconds
    buffer = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    made = []
    for about, call in calls(providers):
        if time.monotonic() > deadline:
            break
        make_marked(call, buffer)
        made.append(about)
        described.write_text(json.dumps(made))


def make_marked(call: Any, buffer: Any) -> None:
    """Make a call twice, the second time for ncu, between marks for `kernels_of_calls` and reads of a large buffer."""
    import torch

    call()  # chooses, loads, allocates
    buffer.sum()  # reads only: a write would leave lines for the call to write back
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    torch.cuda._sleep(1)
    call()
    torch.cuda._sleep(1)
    buffer.sum()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


class MarkedCall(NamedTuple):
    """Rows of ncu's table by the names of its columns."""

    kernels: list[dict[str, str]]
    read_behind: list[dict[str, str]]


def kernels_of_calls(text: str) -> list[MarkedCall]:
    """Read what ncu prints: for each call its kernels, and those of the read behind it."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise FileError(f"ncu printed no table; its last words: {' '.join(lines[-3:])[:300] or 'none'}")
    found: list[MarkedCall] = []
    marks = 0
    for row in csv.DictReader(lines[start:]):
        if not (row.get("ID") or "").isdigit():  # the line of units, and what is not of the table
            continue
        if MARK in row["Kernel Name"]:
            marks += 1
            if marks % 3 == 1:
                found.append(MarkedCall([], []))
        elif marks % 3 > 0:
            found[-1][marks % 3 - 1].append(row)
    return found


def counted(text: str) -> list[dict[str, Any]]:
    """For each call its kernels' bytes, added up, and what the read behind it writes back."""
    return [
        {
            "kernels": len(kernels),
            "read": sum(bytes_of(row[READ]) for row in kernels),
            "written": sum(bytes_of(row[WRITTEN]) for row in [*kernels, *read_behind]),
        }
        for kernels, read_behind in kernels_of_calls(text)
    ]


def bytes_of(cell: str) -> int:
    """A number as ncu prints it."""
    return round(float(cell.replace(",", "")))


def ncu_command(metrics: tuple[str, ...]) -> list[str]:
    """Let ncu profile what comes behind these words, between start and stop."""
    command = [find_ncu(), "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(metrics)]
    command += ["--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"]
    return [*command, "--target-processes", "application-only"]  # not those that compile


def profile(providers: list[str], seconds: float) -> list[dict[str, Any]]:
    """Run `make_calls` under ncu, and put together what was called and what was counted."""
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "calls.json"
        described.write_text("[]")
        command = [*ncu_command(METRICS), sys.executable, "-m", "benchmarks.dram", "--calls", str(described)]
        command += ["--providers", *providers, "--budget", str(seconds)]
        text = output_of(command, seconds + GRACE)
        found, made = counted(text), read_json(described)
    if len(found) < len(made):
        raise FileError(f"ncu told of {len(found)} calls, and {len(made)} were made")
    return [about | moved for about, moved in zip(made, found, strict=False)]


def find_ncu() -> str:
    """Look for Nsight Compute on the PATH, then where NVIDIA's installers put it on every machine."""
    places = [*Path("/usr/local/cuda/bin").glob("ncu"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))]
    found = shutil.which("ncu") or next(map(str, reversed(places)), None)
    if found is None:
        raise FileError("there is no ncu, neither on the PATH nor in /usr/local/cuda or /opt/nvidia/nsight-compute")
    return found


def output_of(command: list[str], seconds: float) -> str:
    """Run a command with all that it starts, and end all of it after so long; its errors are passed on."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent, start_new_session=True
    )
    try:
        text, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise FileError(f"ncu did not end within {seconds:.0f} seconds") from error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(errors, end="", file=sys.stderr)
    return text


def report(path: Path, markdown: bool) -> str:
    """Make the table: bytes as multiples of the tensor's, and of the least that must move."""
    content = read_json(path)
    rows = []
    for each in content["calls"]:
        total = each["read"] + each["written"]
        words = (each["provider"], each["operation"], each["dtype"], each["layout"], each["direction"], each["case"])
        rows.append(
            [
                " ".join(words),
                str(each["kernels"]),
                f"{each['read'] / 1e6:.0f}",
                f"{each['written'] / 1e6:.0f}",
                f"{each['bytes_min'] / 1e6:.0f}",
                f"{total / each['bytes_min']:.2f}",
            ]
        )
    header = ["call, N = 256", "kernels", "read MB", "written MB", "least MB", "of least"]
    about = content["run"]
    return "\n".join([*versions(about, about["date"]), "", *table(header, rows, markdown)])


def main(arguments: list[str] | None = None) -> int:
    """Profile, unless only a report is wanted, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dram", description="Bytes to and from a GPU's memory.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/dram.json")
    parser.add_argument("--providers", nargs="+", default=[RIVAL, COMPILED, OURS], metavar="NAME")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="begin no call after so long")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="run nothing: the table of an earlier run's JSON")
    parser.add_argument("--calls", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.calls:
        make_calls(options.providers, options.calls, options.budget)
        return 0
    try:
        path = options.markdown or run(options)
        print(report(path, bool(options.markdown)))
    except FileError as error:
        print(f"benchmarks.dram: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> Path:
    """Profile and write the JSON."""
    from . import machine

    device = machine.best_device()
    if device.type != "cuda":
        raise FileError("only a GPU's memory can be counted, and there is none, or bn_ext was not built for it")
    path: Path = options.json or machine.RESULTS / machine.device_slug(device) / "dram.json"
    found = profile(options.providers, options.budget)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": machine.describe(device), "calls": found}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
