"""Run the suite and print its report: `python -m benchmarks [--quick] [--json FILE] [-k EXPR]`."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from . import allocator, report, threads
from .names import PROVIDERS
from .words import positive

HERE = Path(__file__).parent
TESTS_FAILED = 1  # some results are wrong, the others are there to be reported on


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare bn_ext with torch.nn.")
    parser.add_argument("--quick", action="store_true", help="small batch and few rounds: does everything run?")
    parser.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        metavar="N",
        help="batch sizes (default 32; on a GPU 256, 32; 2 with --quick)",
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="; ".join(PROVIDERS))
    parser.add_argument("--budget", type=positive, metavar="SECONDS", help="begin no case after so long")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads that torch runs with (default: its own)")
    parser.add_argument("--resume", action="store_true", help="measure what an earlier run into this file did not")
    parser.add_argument("-k", metavar="EXPR", help="only the tests that match, as in pytest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/...")
    parser.add_argument("--default-allocator", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--markdown", action="store_true", help="print the report's tables in Markdown")
    return parser.parse_args(arguments)


def default_json(options: argparse.Namespace) -> Path:
    """Name a file per device and kind of run: a partial or quick one never replaces a full one."""
    from . import machine  # here, because it imports torch, which --help and --json can do without

    device = machine.best_device()
    name = ["batch_norm"]
    name += [f"n{batch}" for batch in options.batch or []]
    # A CPU's folder has the number in its name.
    name += [f"{options.threads}-threads"] if options.threads and device.type == "cuda" else []
    name += ["default-allocator"] if options.default_allocator else []
    name += ["quick"] if options.quick else []
    name += ["part"] if options.k or options.providers else []
    return machine.RESULTS / machine.device_slug(device, options.threads) / ("-".join(name) + ".json")


def written(path: Path) -> int:
    """Say when a file was written, by the file system's clock; 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def main(arguments: list[str] | None = None) -> int:
    """Run pytest in a process that starts with the allocator's settings, then report."""
    options = parse(arguments)
    path = (options.json or default_json(options)).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", str(HERE / "test_batch_norm.py"), "-q", "-p", "no:cacheprovider"]
    # --benchmark-enable: the project's pytest options switch timing off for the tests.
    command += ["--benchmark-enable", "--benchmark-quiet", f"--results={path}"]
    command += ["--quick"] if options.quick else []
    command += ["--resume"] if options.resume else []
    command += [f"--budget={options.budget}"] if options.budget else []
    command += ["--batch", *map(str, options.batch)] if options.batch else []
    command += ["--providers", *options.providers] if options.providers else []
    command += ["-k", options.k] if options.k else []
    environment = {name: value for name, value in os.environ.items() if name not in allocator.KEEP}
    environment |= {} if options.default_allocator else allocator.KEEP
    environment |= threads.environment(options.threads)
    before = written(path)
    status = subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode
    if status not in (0, TESTS_FAILED) or written(path) == before:
        print(
            f"benchmarks: no report, because pytest ended with status {status} (see above); "
            "what was measured is kept, and the same command with --resume goes on with it",
            file=sys.stderr,
        )
        return status or 2
    return report.main([str(path), *(["--markdown"] if options.markdown else [])]) or status


if __name__ == "__main__":
    sys.exit(main())
