"""Whether training ends as well: a small residual network on handwritten digits, stock against fused, three seeds.

`python -m benchmarks.convergence [--quick] [--budget SECONDS] [--dtypes NAME ...] [--json FILE]` trains, prints, and
draws the curves beside the JSON; `python -m benchmarks.convergence.report FILE [--plot PNG]` does so of an earlier run.

Both begin with the same weights and see the same batches, in turns. The network and the data are the demo's
(examples/digits); a bfloat16 run is under autocast, with parameters in float32.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bn_ext
from examples.digits import data, residual
from examples.digits.machine import SetupError, check_packages, cpu_threads

from .. import machine
from ..cells import FileError
from ..training.run_file import write_json
from . import report

SEEDS = (0, 1, 2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FULL = residual.Plan(steps=400, measure_every=10)
QUICK = residual.Plan(steps=20, measure_every=5)
CPU_THREADS = 1  # the layers are small: where another program holds a core, several would wait for each other
STOCK, FUSED = "stock", "fused"


def build(variant: str, seed: int, device: torch.device) -> nn.Module:
    """Make the network; the seed decides its weights."""
    model = residual.build_network(nn.BatchNorm2d, seed)
    if variant == FUSED:
        model, report = bn_ext.fuse(model, report=True)
        # All but the one of the shortcut, which another one adds.
        if len(report.fused) != len(report.rows) - 1:
            raise RuntimeError(f"the network is not fused as it should be:\n{report}")
    return model.to(device)


def train(dtype: str, seed: int, plan: residual.Plan, digits: data.Digits) -> dict[str, Any]:
    """Train both variants in turns: at each measured step the test accuracy, and the mean loss since the last one."""
    device = digits.train_images.device
    trainees = [
        residual.Trainee(variant, build(variant, seed, device), plan.steps, DTYPES[dtype]) for variant in (STOCK, FUSED)
    ]
    steps = []
    for step, (images, labels) in enumerate(data.batches(digits, residual.BATCH_SIZE, plan.steps, seed), start=1):
        for each in trainees:
            each.step(images, labels)
        trainees.reverse()
        if step % plan.measure_every == 0:
            steps.append(step)
            for each in trainees:
                each.measure(digits)
    trainees.sort(key=lambda each: each.name != STOCK)
    return {
        "dtype": dtype,
        "seed": seed,
        "steps": steps,
        "variants": {
            each.name: {
                "accuracy": each.accuracy,
                "loss": torch.tensor(each.losses).view(-1, plan.measure_every).mean(1).tolist(),
                "finite": each.finite,
            }
            for each in trainees
        },
    }


def default_json(quick: bool, device: torch.device) -> Path:
    """Name a file per device."""
    name = "convergence-quick.json" if quick else "convergence.json"
    return machine.RESULTS / machine.device_slug(device) / name


def train_all(dtypes: list[str], path: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Train with every dtype and seed for which there is time, and write the JSON after each."""
    start, longest = time.perf_counter(), 0.0
    digits = data.load(device)
    about = machine.describe(device) | {"quick": options.quick, "test_images": data.TEST_IMAGES}
    result: dict[str, Any] = {"run": about, "trainings": [], "left_out": []}
    for dtype in dtypes:
        for seed in SEEDS:
            began = time.perf_counter()
            if options.budget is not None and began + longest > start + options.budget:
                result["left_out"].append({"dtype": dtype, "seed": seed})
            else:
                print(f"{dtype}, seed {seed} ...", file=sys.stderr, flush=True)
                result["trainings"].append(train(dtype, seed, QUICK if options.quick else FULL, digits))
                longest = max(longest, time.perf_counter() - began)
            write_json(path, result)


def run(options: argparse.Namespace) -> Path:
    """Train on the best device; give the file."""
    device = machine.best_device()
    path = options.json or default_json(options.quick, device)
    dtypes = options.dtypes or (list(DTYPES) if device.type == "cuda" else ["float32"])
    with cpu_threads(CPU_THREADS):
        train_all(dtypes, path, options, device)
    return Path(path)


def main(arguments: list[str]) -> int:
    """Train, print what came of it and draw it; exit status 1 if it is not within noise, 2 if there cannot be a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 steps: does everything run?")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no training that is not expected to fit")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="NAME", help="default: float32, on a GPU both")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/convergence.json"
    )
    options = parser.parse_args(arguments)
    try:
        check_packages()
        path = run(options)
        return report.show(path, path.with_suffix(".png"))
    except (SetupError, FileError) as error:
        print(f"benchmarks.convergence: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
