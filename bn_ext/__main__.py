"""Command line: print facts about the build, check results, and print the launch plan for a shape.

python -m bn_ext; python -m bn_ext verify; python -m bn_ext explain 32 64 56 56 --dtype bfloat16 --channels-last
"""

import argparse
import sys

import torch

from bn_ext import activations, build_info, explain, testing

_DTYPES = ("float32", "float64", "float16", "bfloat16")


def _verify(device: str | None) -> int:
    """Print one line per device, dtype, layout and mode; return 1 if any error exceeds its tolerance, else 0."""
    info = build_info()
    if not info.loaded:
        print(f"bn_ext verify: {info.reason}", file=sys.stderr)
        return 1
    if device is not None and device not in testing.devices():
        reason = "torch sees no GPU" if info.cuda else info.cuda_reason
        print(f"bn_ext verify: --device {device}: bn_ext cannot run on it: {reason}", file=sys.stderr)
        return 1
    print("Worst error against float64, as a share of its tolerance (bn_ext.testing.TOLERANCE):\n")
    header = ("device", "dtype", "layout", "mode", *testing.QUANTITIES)
    widths = [max(len(name), width) for name, width in zip(header, (6, 8, 13, 8, *[7] * 6), strict=True)]
    print("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)))
    failures = count = 0
    for row in testing.verify(on=None if device is None else [device]):
        count += 1
        failures += not row.passed
        mode = "training" if row.training else "eval"
        cells = [row.device, str(row.dtype).removeprefix("torch."), row.layout, mode]
        cells += [f"{share:.3f}" for share in row.shares.values()]
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line + ("  ok" if row.passed else "  FAILED"), flush=True)
    print(f"\n{count - failures} of {count} within tolerance")
    return 1 if failures else 0


def _explain(options: argparse.Namespace) -> int:
    """Print the launch plan and return 0, or print why there is none and return 1."""
    shape = tuple(options.input_shape)
    memory_format = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    try:
        explanation = explain(
            shape,
            getattr(torch, options.dtype),
            memory_format if options.channels_last else torch.contiguous_format,
            training=not options.eval,
            activation=options.activation,
            residual=options.residual,
            device=options.device,
        )
    except (ValueError, RuntimeError) as error:
        print(f"bn_ext explain: {error}", file=sys.stderr)
        return 1
    print(explanation)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bn_ext")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("info", help="print versions, CUDA, instruction set and threads (the default)")
    verifying = commands.add_parser("verify", help="compare results with float64 formulas")
    verifying.add_argument("--device", choices=("cpu", "cuda"), help="check only this device; default: all devices")
    explaining = commands.add_parser("explain", help="print the launch plan of the CUDA kernels for a shape")
    explaining.add_argument("input_shape", nargs="+", type=int, metavar="size", help="sizes of the input: N C H W")
    explaining.add_argument("--dtype", choices=_DTYPES, default="float32")
    explaining.add_argument("--channels-last", action="store_true")
    explaining.add_argument("--eval", action="store_true")
    explaining.add_argument("--activation", choices=activations.NAMES)
    explaining.add_argument("--residual", action="store_true")
    explaining.add_argument("--device", help="a CUDA device such as cuda:0, or a GPU's name such as H200")
    options = parser.parse_args(arguments)
    if options.command == "verify":
        try:
            return _verify(options.device)
        except RuntimeError as error:  # for example an invalid value of an environment variable
            print(f"bn_ext verify: {error}", file=sys.stderr)
            return 1
    if options.command == "explain":
        return _explain(options)
    print(build_info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
