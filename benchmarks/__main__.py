"""Run the suite and print its report: `python -m benchmarks [--quick] [--json FILE] [-k EXPR]`."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from . import allocator, report

HERE = Path(__file__).parent


def positive(text: str) -> int:
    """A number of at least one, or what argparse makes a sentence of."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare bn_ext with torch.nn.")
    parser.add_argument("--quick", action="store_true", help="small batch and few rounds: does everything run?")
    parser.add_argument("--batch", type=positive, metavar="N", help="batch size (default 32; 2 with --quick)")
    parser.add_argument("-k", metavar="EXPR", help="only the tests that match, as in pytest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/...")
    parser.add_argument("--default-allocator", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--markdown", action="store_true", help="print the report's tables in Markdown")
    return parser.parse_args(arguments)


def default_json(options: argparse.Namespace) -> Path:
    """Name a file per device and kind of run: a partial or quick one never replaces a full one."""
    from . import machine  # here, because it imports torch, which --help and --json can do without

    name = ["batch_norm"]
    name += [f"n{options.batch}"] if options.batch else []
    name += ["default-allocator"] if options.default_allocator else []
    name += ["quick"] if options.quick else []
    name += ["part"] if options.k else []
    return HERE / "results" / machine.device_slug(machine.best_device()) / ("-".join(name) + ".json")


def main(arguments: list[str] | None = None) -> int:
    """Run pytest in a process that starts with the allocator's settings, then report."""
    options = parse(arguments)
    path = (options.json or default_json(options)).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider"]
    # --benchmark-enable: the project's pytest options switch timing off for the tests.
    command += ["--benchmark-enable", "--benchmark-quiet", f"--benchmark-json={path}"]
    command += ["--quick"] if options.quick else []
    command += [f"--batch={options.batch}"] if options.batch else []
    command += ["-k", options.k] if options.k else []
    environment = {name: value for name, value in os.environ.items() if name not in allocator.KEEP}
    environment |= {} if options.default_allocator else allocator.KEEP
    status = subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode
    if status:
        print(
            f"benchmarks: no report, because pytest ended with status {status} (see above)",
            file=sys.stderr,
        )
        return status
    return report.main([str(path), *(["--markdown"] if options.markdown else [])])


if __name__ == "__main__":
    sys.exit(main())
