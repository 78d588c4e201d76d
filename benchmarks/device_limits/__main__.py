"""Measure what this machine's GPU can do, or print an earlier file's tables."""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..cells import FileError
from . import report, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_limits",
        description="Measure what a GPU can do at most, in the ways that bn_ext uses it. Needs nvcc.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/...")
    parser.add_argument(
        "--budget", type=float, default=60, metavar="SECONDS", help="for all, compilation included (default 60)"
    )
    parser.add_argument("--parts", nargs="+", choices=run.PARTS, default=run.PARTS, help="only these")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing, print this file's tables")
    return parser.parse_args(arguments)


def default_json(parts: list[str]) -> Path:
    """Name the file by the device; a part of the parts never replaces all."""
    whole = set(parts) == set(run.PARTS)
    name = "device_limits.json" if whole else "device_limits-part.json"
    try:
        import torch

        from .. import machine  # here, because it imports torch and pytest-benchmark, which the rest can do without

        return machine.RESULTS / machine.device_slug(torch.device("cuda", 0)) / name
    except (ImportError, RuntimeError, AssertionError) as error:  # the last where torch is one without CUDA
        raise run.LimitsError(f"the device's folder of results cannot be named ({error}): give --json FILE") from error


def measure(options: argparse.Namespace) -> int:
    """Compile, run, write, print; the exit status is 1 if a part is missing or came to grief."""
    end = time.monotonic() + options.budget
    gpu = run.find_gpu()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        compiled = pool.submit(run.compile_program, gpu.architecture, Path(folder))
        path = (options.json or default_json(options.parts)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        program, nvcc = compiled.result()
        found = run.measure(gpu, program, nvcc, list(options.parts), end, Path(folder))
    if not any(part["figures"] for part in found["parts"].values()):
        reasons = "; ".join(sorted({part.get("error", "") for part in found["parts"].values()}))
        raise run.LimitsError(f"nothing was measured, and {path} not written: {reasons}")
    path.write_text(run.as_text(found))
    print(report.report(path, markdown=False))
    print(f"\n{path}")
    return 0 if all(part["complete"] for part in found["parts"].values()) else 1


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or on stderr why there are none (exit status 2)."""
    options = parse(arguments)
    try:
        if options.markdown is None:
            return measure(options)
        print(report.report(options.markdown, markdown=True))
    except (run.LimitsError, FileError) as error:
        print(f"benchmarks.device_limits: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
