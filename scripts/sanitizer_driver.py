"""Small calls for compute-sanitizer: every dtype and layout, both modes, forward and backward, compared with float64.

Everything but the calls themselves happens on the CPU, so that the tool has few other kernels to look at. Run it with
PYTORCH_NO_CUDA_MEMORY_CACHING=1: each tensor is then an allocation of its own, and a read past its end is seen.
"""

import sys

import torch

import bn_ext
from bn_ext import testing

# Narrow planes, wide ones, odd ones with no vector access, fewer and more channels than a block is wide, 3D.
SHAPES = ((5, 3), (48, 130), (3, 7, 5), (4, 16, 7, 7), (2, 3, 33, 35), (3, 24, 24, 24), (2, 8, 3, 4, 5))


def on_the_gpu(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *rest: object) -> torch.Tensor:
    """The operator, called with copies on the GPU; results come back to the CPU."""
    mean_there, var_there = mean.cuda(), var.cuda()
    others = [value.cuda() if isinstance(value, torch.Tensor) else value for value in rest]
    y = bn_ext.batch_norm(x.cuda(), mean_there, var_there, *others).cpu()
    mean.copy_(mean_there), var.copy_(var_there)
    return y


def main() -> int:
    """Print one line if all is right; return 1 and name what is not."""
    rows = list(testing.verify(on_the_gpu, on=["cpu"], shapes=SHAPES))
    for row in rows:
        if not row.passed:
            print(f"wrong: {row}")
    print(f"{sum(row.passed for row in rows)} of {len(rows)} within tolerance")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
