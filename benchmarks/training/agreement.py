"""Whether a model in a variant computes what stock does: what does not is not timed."""

import torch
from torch import Tensor

from .trainee import Trainee, draw

LOSS, GRADIENTS = "loss", "gradients in float64"
# How far a variant's first step may be from stock's, as a share of stock's.
ALLOWED = {
    # All parameters' gradients as one vector: what finds a wrong fusion or a wrong gradient. Deep networks at their
    # initial values enlarge rounding ten thousandfold and more, from 1e-16 still to far less than this.
    GRADIENTS: 1e-8,
    # In the dtype that is timed, the loss alone, which averages over the batch: rounding enlarged like that is seen in
    # the gradients already in float32, and in bfloat16 it can outweigh them. Ten times and more what converting
    # changes.
    "float32": 1e-4,
    "bfloat16": 2e-2,
    # What torch computes float32 convolutions in on a GPU: three bits more than bfloat16 has.
    "TF32": 2.5e-3,
}


class DisagreementError(Exception):
    """A variant does not compute what stock does; it must not be timed."""


def require_close(what: str, got: Tensor, right: Tensor, allowed: float) -> float:
    """Give the distance as a share of `right`, or raise DisagreementError if it is more than allowed."""
    if got.shape != right.shape:
        raise DisagreementError(f"{what}: {got.numel()} values, stock has {right.numel()}")
    off = float((got - right).norm() / right.norm())
    if not off <= allowed:  # so written that NaN is wrong
        raise DisagreementError(f"{what}: {off:.2g} of stock's away from it, allowed: {allowed:.2g}")
    return off


def exact_gradients(model: str, variant: str, layout: str, device: torch.device) -> Tensor:
    """Make a small first step in float64 and give the gradients of all parameters, one after the other."""
    batch = draw(2, 64, device, layout, torch.float64)
    trainee = Trainee(model, variant, batch, layout, torch.float64)
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # a search for the fastest convolutions is not worth it for one step
    try:
        trainee.step()
    finally:
        torch.backends.cudnn.benchmark = searching
    return torch.cat([each.grad.flatten() for each in trainee.model.parameters() if each.grad is not None])


def first_step(trainee: Trainee) -> dict[str, Tensor]:
    """Make the first step of a trainee, and give what is compared with stock's.

    Of compiled models the loss alone: to compile each once more in float64 would take too long.
    """
    results = {LOSS: trainee.step()}
    if not trainee.compiled:
        results[GRADIENTS] = exact_gradients(trainee.model_name, trainee.variant, trainee.layout, trainee.device)
    return results


def distances(where: str, results: dict[str, Tensor], right: dict[str, Tensor], dtype: str) -> dict[str, float]:
    """Compare two first steps in `dtype`; raise DisagreementError where they are too far from each other."""
    off = {}
    for what, got in results.items():
        rough = dtype == "float32" and got.is_cuda and torch.backends.cudnn.allow_tf32
        allowed = ALLOWED[GRADIENTS] if what == GRADIENTS else ALLOWED["TF32" if rough else dtype]
        off[what] = require_close(f"{where}: {what}", got, right[what], allowed)
    return off
