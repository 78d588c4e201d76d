"""Command line: `python -m bn_ext` tells what was built, `python -m bn_ext verify` checks that it computes right."""

import argparse
import sys

from bn_ext import build_info, testing


def _verify() -> int:
    """Print one line per device, dtype, layout and mode; 1 if any error exceeds its tolerance."""
    if not build_info().loaded:
        print(f"bn_ext verify: {build_info().reason}", file=sys.stderr)
        return 1
    print("Worst error against float64, as a share of its tolerance (bn_ext.testing.TOLERANCE):\n")
    header = ("device", "dtype", "layout", "mode", *testing.QUANTITIES)
    widths = [max(len(name), width) for name, width in zip(header, (6, 8, 13, 8, *[7] * 6), strict=True)]
    print("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)))
    failures = count = 0
    for row in testing.verify():
        count += 1
        failures += not row.passed
        mode = "training" if row.training else "eval"
        cells = [row.device, str(row.dtype).removeprefix("torch."), row.layout, mode]
        cells += [f"{share:.3f}" for share in row.shares.values()]
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line + ("  ok" if row.passed else "  FAILED"), flush=True)
    print(f"\n{count - failures} of {count} within tolerance")
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bn_ext", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=("info", "verify"),
        default="info",
        help="info (default): versions, CUDA, instruction set, threads; verify: compare with float64 formulas",
    )
    if parser.parse_args(arguments).command == "verify":
        return _verify()
    print(build_info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
