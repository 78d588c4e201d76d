"""Small calls for compute-sanitizer: every dtype and layout, both modes, forward and backward, compared with float64;
and activations of each kind, with residuals and masks.

Everything but the calls themselves happens on the CPU, so that the tool has few other kernels to look at. Run it with
PYTORCH_NO_CUDA_MEMORY_CACHING=1: each tensor is then an allocation of its own, and a read past its end is seen.
"""

import itertools
import sys

import torch

import bn_ext
from bn_ext import testing

# Narrow planes, wide ones, odd ones with no vector access, fewer and more channels than a block is wide, 3D; at the end
# what takes a cluster, and what takes a grid.
SHAPES = (
    (5, 3),
    (48, 130),
    (3, 7, 5),
    (4, 16, 7, 7),
    (2, 3, 33, 35),
    (3, 24, 24, 24),
    (2, 8, 3, 4, 5),
    (8, 2, 40, 40),
    (64, 2, 40, 40),
)

# One of each kind of kernel: relu's kind with a mask and without one, the others with a residual and without.
FUSED = (("relu", True), ("leaky_relu", False), (None, True), ("silu", True), ("gelu", False))


def on_the_gpu(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
    """The operator, called with copies on the GPU; results come back to the CPU."""
    mean_there, var_there = mean.cuda(), var.cuda()
    others = [value.cuda() if isinstance(value, torch.Tensor) else value for value in rest]
    named = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in more.items()}
    y = bn_ext.batch_norm(x.cuda(), mean_there, var_there, *others, **named).cpu()
    mean.copy_(mean_there), var.copy_(var_there)
    return y


def fused_cases() -> list[testing.Case]:
    """Activations and residuals over shapes, dtypes and layouts, each mode for some of them."""
    cases = []
    dtypes = (torch.float32, torch.bfloat16)
    for shape, dtype, layout, (activation, residual) in itertools.product(
        SHAPES, dtypes, ("contiguous", "channels_last"), FUSED
    ):
        if layout == "contiguous" or len(shape) > 3:
            training = len(cases) % 3 > 0
            cases.append(testing.Case(shape, dtype, layout, training, activation=activation, residual=residual))
    return cases


def main() -> int:
    """Print one line if all is right; return 1 and name what is not."""
    wrong = [case for case in fused_cases() if max(testing.check(on_the_gpu, case).values()) > 1]
    for case in wrong:
        print(f"wrong: {case}")
    rows = list(testing.verify(on_the_gpu, on=["cpu"], shapes=SHAPES))
    for row in rows:
        if not row.passed:
            print(f"wrong: {row}")
    print(f"{sum(row.passed for row in rows)} of {len(rows)} within tolerance")
    return 0 if all(row.passed for row in rows) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
