"""Whole models: saved bytes, peak memory and time of a training step, stock, converted, fused, fused with recompute.

`python -m benchmarks.training [--quick] [--models NAME ...] [--batch N] [--size N] [--dtype bfloat16] [--json FILE]`
runs and prints; `python -m benchmarks.training --markdown FILE` prints the table of an earlier run.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import bn_ext

from . import allocator, machine, training_report
from .cells import FileError
from .inputs import DTYPES, SEED
from .measure import Effort, Side, Wall, in_turns
from .memory import LiveBytes, storage_bytes, tensors
from .models import CLASSES, MODELS

STOCK = "stock"
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    STOCK: lambda model: model,
    "converted": lambda model: bn_ext.convert(model),
    "fused": lambda model: bn_ext.fuse(model),
    "fused+recompute": lambda model: bn_ext.fuse(model, recompute=True),
}
QUICK_MODELS = ("resnet18", "mobilenet_v3_large")
# A step is long enough to be a round of its own.
EFFORT = Effort(seconds=60.0, min_rounds=5, max_rounds=31, round_seconds=0.0)
QUICK_EFFORT = Effort(seconds=0.0, min_rounds=3, max_rounds=3, round_seconds=0.0)

# How far a variant's first step may be from stock's, as a share of stock's.
# In float64, all parameters' gradients as one vector: what finds a wrong fusion or a wrong gradient. Deep networks at
# their initial values enlarge rounding ten thousandfold and more, from 1e-16 still to far less than this.
GRADIENTS = 1e-8
# In the dtype that is timed, the loss alone, which averages over the batch: rounding enlarged like that is seen in the
# gradients already in float32, and in bfloat16 it can outweigh them. Ten times and more what converting changes.
LOSS = {"float32": 1e-4, "bfloat16": 2e-2}


class DisagreementError(Exception):
    """A variant does not compute what stock does; it must not be timed."""


class Trainee:
    """A model in one variant, with its optimizer and a batch."""

    def __init__(self, model: str, variant: str, images: Tensor, labels: Tensor, dtype: torch.dtype):
        torch.manual_seed(SEED)  # the same parameters for all variants
        self.model = VARIANTS[variant](MODELS[model]().to(images.device, images.dtype))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images, self.labels, self.dtype = images, labels, dtype

    def forward(self) -> Tensor:
        """Give the loss, with its graph."""
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            return nn.functional.cross_entropy(self.model(self.images), self.labels)

    def step(self) -> Tensor:
        """Make a training step; the gradients stay until the next one."""
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def resident_bytes(self) -> int:
        """Count what is there between two steps: parameters, buffers, momentum and the batch."""
        state = tensors(self.optimizer.state_dict()["state"])
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *state, self.images, self.labels])

    def step_in_bytes(self) -> dict[str, int]:
        """Make a step, not the first, and count what forward leaves for backward and what there is at most."""
        self.optimizer.zero_grad()
        resident = self.resident_bytes()
        device = self.images.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with LiveBytes() as memory:
            loss = self.forward()
            saved = memory.alive() - loss.nbytes
            loss.backward()
            self.optimizer.step()
        made = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else memory.peak
        return {"saved_bytes": saved, "peak_bytes": resident + made, "resident_bytes": resident}


def batch(count: int, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Draw images and their labels, the same ones on every call."""
    random = torch.Generator(device).manual_seed(SEED)
    images = torch.randn(count, 3, size, size, generator=random, device=device, dtype=dtype)
    return images, torch.randint(CLASSES, (count,), generator=random, device=device)


def require_close(what: str, got: Tensor, right: Tensor, allowed: float) -> float:
    """Give the distance as a share of `right`, or raise DisagreementError if it is more than allowed."""
    end = "; nothing of this model was timed"
    if got.shape != right.shape:
        raise DisagreementError(f"{what}: {got.numel()} values, stock has {right.numel()}{end}")
    off = float((got - right).norm() / right.norm())
    if not off <= allowed:  # so written that NaN is wrong
        raise DisagreementError(f"{what}: {off:.2g} of stock's away from it, allowed: {allowed:.2g}{end}")
    return off


def exact_gradients(model: str, variant: str, device: torch.device) -> Tensor:
    """Make a small first step in float64 and give the gradients of all parameters, one after the other."""
    trainee = Trainee(model, variant, *batch(2, 64, device, torch.float64), torch.float64)
    trainee.step()
    return torch.cat(
        [parameter.grad.flatten() for parameter in trainee.model.parameters() if parameter.grad is not None]
    )


def check(model: str, trainees: dict[str, Trainee]) -> dict[str, dict[str, float]]:
    """Make first steps and say how far each variant's are from stock's; raise DisagreementError if too far."""
    dtype = str(trainees[STOCK].dtype).removeprefix("torch.")
    device = trainees[STOCK].images.device
    losses = {name: trainee.step() for name, trainee in trainees.items()}
    right = exact_gradients(model, STOCK, device)
    off = {}
    for name in trainees:
        where = f"{model}, {name}"
        gradients = exact_gradients(model, name, device)
        off[name] = {
            "loss": require_close(f"{where}: loss in {dtype}", losses[name], losses[STOCK], LOSS[dtype]),
            "gradients in float64": require_close(f"{where}: gradients in float64", gradients, right, GRADIENTS),
        }
    return off


def measure(model: str, variants: list[str], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Check, count and time one model in its variants."""
    data = batch(options.batch, options.size, device)
    trainees = {name: Trainee(model, name, *data, DTYPES[options.dtype]) for name in variants}
    found: dict[str, dict[str, Any]] = {name: {"off": off} for name, off in check(model, trainees).items()}
    for name, trainee in trainees.items():
        found[name] |= trainee.step_in_bytes()
    sides: dict[str, Side] = {name: Wall([trainee.step], device) for name, trainee in trainees.items()}
    for name, times in in_turns(sides, QUICK_EFFORT if options.quick else EFFORT).items():
        seconds = {"median": median(times.seconds), "min": min(times.seconds), "max": max(times.seconds)}
        found[name] |= {"seconds": seconds | {"rounds": len(times.seconds)}}
    for name in found:
        found[name]["of_stock"] = {
            key: found[name][key] / found[STOCK][key] for key in ("saved_bytes", "peak_bytes")
        } | {"seconds": found[name]["seconds"]["median"] / found[STOCK]["seconds"]["median"]}
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description="Training steps of whole models."
    )
    parser.add_argument("--quick", action="store_true", help="small images, few rounds, two models: does all run?")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="; ".join(VARIANTS))
    parser.add_argument("--batch", type=int, metavar="N", help="default 8; 64 on a GPU; 2 with --quick")
    parser.add_argument(
        "--size", type=int, metavar="N", help="of the images; default 160; 224 on a GPU; 64 with --quick"
    )
    parser.add_argument("--dtype", choices=LOSS, default="float32", help="bfloat16: under autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>/training...")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="run nothing: the table of an earlier run's JSON")
    return parser.parse_args(arguments)


def default_json(options: argparse.Namespace, device: torch.device) -> Path:
    """Name a file per device and kind of run: a partial or quick one never replaces a full one."""
    name = ["training"]
    name += [options.dtype] if options.dtype != "float32" else []
    name += [f"n{options.batch}"] if options.batch else []
    name += [f"{options.size}x{options.size}"] if options.size else []
    name += ["quick"] if options.quick else []
    name += ["part"] if options.models or options.variants else []
    return Path(__file__).parent / "results" / machine.device_slug(device) / ("-".join(name) + ".json")


def run(options: argparse.Namespace) -> Path:
    """Measure the chosen models and write the JSON."""
    device = machine.best_device()
    path = options.json or default_json(options, device)
    cuda = device.type == "cuda"
    options.batch = options.batch or (2 if options.quick else 64 if cuda else 8)
    options.size = options.size or (64 if options.quick else 224 if cuda else 160)
    variants = [name for name in VARIANTS if name == STOCK or not options.variants or name in options.variants]
    models = {}
    for name in options.models or (QUICK_MODELS if options.quick else MODELS):
        print(f"{name} ...", file=sys.stderr, flush=True)
        models[name] = measure(name, variants, options, device)
    about = machine.describe(device) | {
        "batch": options.batch,
        "size": options.size,
        "dtype": options.dtype,
        "quick": options.quick,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": about, "models": models}, indent=1) + "\n")
    return Path(path)


def main(arguments: list[str]) -> int:
    """Run, unless only a report is wanted; print the report, or on stderr why there is none (exit status 2)."""
    options = parse(arguments)
    try:
        print(training_report.report(options.markdown or run(options), bool(options.markdown)))
    except (DisagreementError, FileError) as error:
        print(f"benchmarks.training: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in allocator.KEEP.items()):  # glibc reads them at its start
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | allocator.KEEP)
    sys.exit(main(sys.argv[1:]))
