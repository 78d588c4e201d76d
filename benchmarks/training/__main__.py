"""Whole models: time, memory and share of batch norm of a training step, stock, converted, fused, compiled.

`python -m benchmarks.training [--quick] [--budget SECONDS] [--models NAME ...] [--dtypes NAME ...]
[--layouts NAME ...] [--variants NAME ...] [--batch N] [--size N] [--json FILE] [--resume]` runs and prints; with
--resume it measures what a run into the same file has not. `python -m benchmarks.training.report FILE` prints the
tables of an earlier run, and draws them.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import allocator, machine
from ..cells import FileError
from ..measure import Effort
from ..words import first_line, positive
from . import report
from .agreement import DisagreementError
from .budget import Budget
from .group import NO_TIME, Setting, measure
from .run_file import Group, OtherRunError, RunFile
from .trainee import STOCK, VARIANTS

# Most telling first: a run that has to stop early has the most important groups.
MODELS_IN_ORDER = ("resnet50", "densenet121", "efficientnet_b0", "mobilenet_v3_large", "resnet18")
DTYPES_IN_ORDER = ("bfloat16", "float32")
LAYOUTS_IN_ORDER = ("channels_last", "contiguous")
# What is compiled whether or not there is time for all groups: what to compare with first of all.
COMPILED_FIRST = (MODELS_IN_ORDER[0], DTYPES_IN_ORDER[0])
ON_A_GPU = {
    "models": MODELS_IN_ORDER[:4],
    "dtypes": DTYPES_IN_ORDER,
    "layouts": LAYOUTS_IN_ORDER,
    "variants": tuple(VARIANTS),
    "batch": 256,
    "size": 224,
}
ON_A_CPU = {
    "models": MODELS_IN_ORDER,
    "dtypes": ("float32",),
    "layouts": ("contiguous",),
    "variants": tuple(name for name, variant in VARIANTS.items() if not variant.compiled),
    "batch": 8,
    "size": 160,
}
QUICK = {"models": ("mobilenet_v3_large", "resnet18"), "batch": 2, "size": 64}
# On a CPU a step is long enough to be a round of its own; on a GPU a few are, which the end of a step weighs less in.
CPU_EFFORT = Effort(seconds=60.0, min_rounds=5, max_rounds=31, round_seconds=0.0)
GPU_EFFORT = Effort(seconds=8.0, min_rounds=7, max_rounds=31, round_seconds=0.15)
QUICK_EFFORT = Effort(seconds=0.0, min_rounds=3, max_rounds=3, round_seconds=0.0)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description="Training steps of whole models."
    )

    def choice(name: str, of: tuple[str, ...], words: str) -> None:
        parser.add_argument(f"--{name}", nargs="+", choices=of, metavar="NAME", help=f"{', '.join(of)}{words}")

    parser.add_argument("--quick", action="store_true", help="small images, few rounds, two models: does all run?")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing that is not expected to fit")
    parser.add_argument("--resume", action="store_true", help="measure what an earlier run into the file has not")
    choice("models", MODELS_IN_ORDER, "; default: all, on a GPU the first four")
    choice("dtypes", DTYPES_IN_ORDER, "; bfloat16 is under autocast; default: float32, on a GPU both")
    choice("layouts", LAYOUTS_IN_ORDER, "; default: contiguous, on a GPU both")
    choice("variants", tuple(VARIANTS), "; default: all that is not compiled, on a GPU all")
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="default 8; 256 on a GPU, or what fits; 2 with --quick"
    )
    parser.add_argument(
        "--size", type=positive, metavar="N", help="of the images; default 160; 224 on a GPU; 64 with --quick"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/training...")
    return parser.parse_args(arguments)


def default_json(options: argparse.Namespace, device: torch.device) -> Path:
    """Name a file per device and kind of run: a partial or quick one never gets mixed up with a full one."""
    name = ["training"]
    name += [f"n{options.batch}"] if options.batch else []
    name += [f"{options.size}x{options.size}"] if options.size else []
    name += ["quick"] if options.quick else []
    name += ["part"] if options.variants else []
    return machine.RESULTS / machine.device_slug(device) / ("-".join(name) + ".json")


@contextmanager
def searched_convolutions() -> Iterator[None]:
    """Let cuDNN search for the fastest convolutions, for all variants alike, and then be as before."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def describe(device: torch.device, setting: Setting, quick: bool) -> dict[str, Any]:
    """Collect what the figures depend on."""
    about = machine.describe(device)
    if device.type == "cuda":
        about |= {
            "cudnn": torch.backends.cudnn.version(),
            "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
        }
    return about | {"batch": setting.batch, "size": setting.size, "variants": setting.variants, "quick": quick}


def resolve(options: argparse.Namespace, device: torch.device) -> tuple[Setting, list[Group]]:
    """Fill in the defaults: how to measure, and the groups in their order."""
    defaults = (ON_A_GPU if device.type == "cuda" else ON_A_CPU) | (QUICK if options.quick else {})
    chosen = {key: getattr(options, key) or value for key, value in defaults.items()}
    # Stock is what the others are compared with; what is compiled comes last, when it is known what the rest takes.
    variants = [name for name in VARIANTS if name == STOCK or name in chosen["variants"]]
    effort = QUICK_EFFORT if options.quick else GPU_EFFORT if device.type == "cuda" else CPU_EFFORT
    groups = [
        Group(model, dtype, layout)
        for dtype in DTYPES_IN_ORDER
        for model in MODELS_IN_ORDER
        for layout in LAYOUTS_IN_ORDER
        if model in chosen["models"] and dtype in chosen["dtypes"] and layout in chosen["layouts"]
    ]
    return Setting(device, variants, chosen["batch"], chosen["size"], effort), groups


def measure_all(groups: list[Group], file: RunFile, setting: Setting, budget: Budget) -> list[Group]:
    """Measure groups as far as the budget goes, and write the file after each; give those that failed."""
    left_out = dict.fromkeys(groups, "left out, the run ended before")
    failed = []
    file.write(left_out)
    for index, group in enumerate(groups):
        if not budget.has_time_for_group():
            left_out |= dict.fromkeys(groups[index:], NO_TIME)
            break
        print(f"{group} ...", file=sys.stderr, flush=True)
        later = len(groups) - index - 1

        def compile_limit(variant: str, group: Group = group, later: int = later) -> float:
            first = (group.model, group.dtype) == COMPILED_FIRST
            return budget.compile_limit(1 if first else 1 + later)

        try:
            file.groups.append(measure(group, setting, compile_limit))
            del left_out[group]
        except Exception as error:  # whatever it is, the other groups are worth having
            if not isinstance(error, (DisagreementError, torch.OutOfMemoryError)):
                traceback.print_exc()
            failed.append(group)
            left_out[group] = f"failed: {first_line(error, DisagreementError)}"
            print(f"benchmarks.training: {group} {left_out[group]}", file=sys.stderr, flush=True)
        file.write(left_out)
    file.write(left_out)
    file.end()
    return failed


def run(options: argparse.Namespace) -> tuple[Path, list[Group]]:
    """Measure what is not in the file yet; give the file, and the groups that failed."""
    device = machine.best_device()
    setting, groups = resolve(options, device)
    path = options.json or default_json(options, device)
    file = RunFile(path, describe(device, setting, options.quick), options.resume)
    budget = Budget(options.budget, file.groups)
    with searched_convolutions():
        failed = measure_all([group for group in groups if not file.has(group)], file, setting, budget)
    return path, failed


def main(arguments: list[str]) -> int:
    """Run, and print the report; exit status 2 if a group failed, or if there cannot be a run or a report."""
    options = parse(arguments)
    try:
        path, failed = run(options)
        print(report.report(path, markdown=False))
    except (OtherRunError, FileError) as error:
        print(f"benchmarks.training: {error}", file=sys.stderr)
        return 2
    return 2 if failed else 0


if __name__ == "__main__":
    # glibc reads them at its start; and the profiler would tell on stderr whenever it starts and stops.
    environment = allocator.KEEP | {"KINETO_LOG_LEVEL": "99"}
    if any(os.environ.get(name) != value for name, value in environment.items()):
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | environment)
    sys.exit(main(sys.argv[1:]))
