"""The demo: train on handwritten digits with torch.nn's BN and with bn_ext's, and compare.

Run from the root of the repository: python -m examples.digits [--short] [--output FOLDER]

Exit status: 0 if torch.nn and bn_ext agree, 1 if they do not, 2 if the demo cannot start or save.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import covariate_shift, data, machine, report, residual

MOST_THREADS = 1024


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train small networks on scikit-learn's handwritten digits with torch.nn's "
        "BatchNorm and with bn_ext's, and compare accuracy, speed and weights. Needs no network.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="FOLDER",
        help="where the plots go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="train for fewer steps: seconds, not a minute")
    parser.add_argument("--device", help="cpu, cuda or cuda:<index> (default: cuda where bn_ext has it, else cpu)")
    # On idle cores two threads save a third of the time. But where another program holds a core, they
    # wait for each other after each small layer, many times longer than they compute.
    parser.add_argument("--threads", type=threads, default=1, metavar="N", help="on the CPU (default: %(default)s)")
    return parser.parse_args(arguments)


def seed(text: str) -> int:
    """Read a seed of torch's generators."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer from 0 to 2^63 - 1")
    return int(text)


def threads(text: str) -> int:
    """Read a number of threads."""
    if not (text.isdecimal() and 0 < int(text) <= MOST_THREADS):
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer from 1 to {MOST_THREADS}")
    return int(text)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Run both experiments, print the tables, save the plots; return the exit status."""
    from . import plots

    digits = data.load(device)
    plan_a = covariate_shift.SHORT if options.short else covariate_shift.FULL
    plan_b = residual.SHORT if options.short else residual.FULL
    curves = covariate_shift.run(digits, plan_a, options.seed)
    outcome = residual.run(digits, plan_b, options.seed)

    print()
    print(report.covariate_shift_table(curves), end="\n\n")
    print(report.residual_table(outcome), end="\n\n")
    print(report.machine_table(machine.describe(device)), end="\n\n", flush=True)
    disagreements = report.disagreements(curves, outcome)
    for sentence in disagreements:
        print(sentence, file=sys.stderr)
    try:
        plots.save_covariate_shift(curves, options.output / "covariate_shift.png")
        plots.save_residual(outcome, options.output / "residual.png")
    except OSError as error:
        print(f"Cannot write {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    print(f"Plots: {options.output / 'covariate_shift.png'}, {options.output / 'residual.png'}")
    return 1 if disagreements else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the demo needs, then run it; return the exit status."""
    options = parse_arguments(arguments)
    try:
        machine.check_packages()
        device = machine.choose_device(options.device)
        machine.prepare_folder(options.output)
    except machine.SetupError as reason:
        print(reason, file=sys.stderr)
        return 2
    try:
        with machine.cpu_threads(options.threads):
            return run(options, device)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
