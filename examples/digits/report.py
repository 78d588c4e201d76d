"""The tables at the end of the demo, and the check that torch.nn and bn_ext agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from . import covariate_shift, residual
from .covariate_shift import Curve
from .residual import Comparison, Trainee

MILESTONES = (90.0, 95.0)  # test accuracies in percent
# Rounding differs between the two, and training doubles small differences again and again; so the
# weights may end apart, but not what they are worth. 2 points are 9 of the 450 test images.
ACCURACY_BOUND = 2.0  # percentage points
# At a high learning rate an accuracy may dip for a moment, which their median does not show.
LAST_MEASUREMENTS = 5
# The first steps come before that growth. They hold one forward, one backward and one update at
# least, and losses near 2.3 then differ by some 1e-6; a wrong formula moves them by far more.
FIRST_STEPS = 3
LOSS_BOUND = 1e-3


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table: the first column aligned left, all others right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        first = line[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  " + "   ".join([first, *others]).rstrip()

    rule = "  " + "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([aligned(header), rule, *map(aligned, rows)])


def settled(accuracy: Sequence[float]) -> float:
    """Return the median of the last measured accuracies, in percent."""
    return statistics.median(accuracy[-LAST_MEASUREMENTS:])


def covariate_shift_table(curves: Sequence[Curve]) -> str:
    """Return the results of experiment a."""
    header = ["network", *(f"steps to {goal:.0f} %" for goal in MILESTONES)]
    header += ["test accuracy", "wander", "spread"]
    rows = []
    for curve in curves:
        reached = [curve.steps_to(goal) for goal in MILESTONES]
        rows.append([
            curve.name,
            *("not reached" if steps is None else str(steps) for steps in reached),
            f"{settled(curve.accuracy):.1f} %",
            f"{curve.wander().mean().item():.2f}",
            f"{curve.spread(0):.2f} to {curve.spread(-1):.2f}",
        ])  # fmt: skip
    return "\n".join([
        f"(a) Sigmoid network, 3 x {covariate_shift.UNITS} units, plain SGD with learning rate"
        f" {covariate_shift.LEARNING_RATE},",
        f"    mini-batches of {covariate_shift.BATCH_SIZE}, {curves[0].steps[-1]} steps",
        "",
        table(header, rows),
        "",
        "  wander: highest minus lowest median of a last hidden sigmoid's input during training;",
        "  spread: its 85th minus its 15th percentile, at first and at last; both averaged",
        "  over the units.",
    ])  # fmt: skip


def residual_table(outcome: Comparison) -> str:
    """Return the results of experiment b."""
    rows = []
    for trainee in (outcome.torch_nn, outcome.bn_ext, outcome.nudged):
        apart = residual.largest_difference(outcome.torch_nn, trainee)
        rows.append([
            trainee.name,
            f"{settled(trainee.accuracy):.1f} %",
            f"{trainee.step_milliseconds()[1]:.2f} ms",
            "-" if trainee is outcome.torch_nn else f"{apart:.1e}",
        ])  # fmt: skip
    header = ["network", "test accuracy", "median step time", "weights, largest difference"]
    return "\n".join([
        f"(b) Residual network, 8 convolutions, mini-batches of {residual.BATCH_SIZE},"
        f" {len(outcome.torch_nn.losses)} steps",
        "",
        table(header, rows),
        "",
        "  step: forward, backward, update; the networks take turns, so noise hits all alike;",
        "  difference: from torch.nn after training; nudged: the first layer's weights began one",
        "  rounding higher, which shows how far rounding alone drives two trainings apart.",
    ])  # fmt: skip


def machine_table(facts: Sequence[tuple[str, str]]) -> str:
    """Return what the results depend on, one fact a line."""
    width = max(len(what) for what, _ in facts)
    return "\n".join(["Machine", "", *(f"  {what:{width}}   {value}" for what, value in facts)])


def disagreements(curves: Sequence[Curve], outcome: Comparison) -> list[str]:
    """Return a sentence for each way in which torch.nn and bn_ext disagree; none if they agree."""
    by_name = {curve.name: curve for curve in curves}
    found = _compare("(a)", by_name["torch.nn BN"], by_name["bn_ext BN"])
    return found + _compare("(b)", outcome.torch_nn, outcome.bn_ext)


def _compare(experiment: str, expected: Curve | Trainee, actual: Curve | Trainee) -> list[str]:
    found = []
    for each in (expected, actual):
        if not each.finite:
            found.append(f"{experiment} {each.name} ends with a weight that is not finite.")
    firsts = zip(expected.losses[:FIRST_STEPS], actual.losses[:FIRST_STEPS], strict=True)
    apart = max(abs(left - right) for left, right in firsts)
    if not apart <= LOSS_BOUND:  # so that NaN is a disagreement, too
        found.append(
            f"{experiment} The losses of the first {FIRST_STEPS} steps differ by {apart:.1e};"
            f" rounding explains at most {LOSS_BOUND:.0e}."
        )
    points = abs(settled(expected.accuracy) - settled(actual.accuracy))
    if not points <= ACCURACY_BOUND:
        found.append(
            f"{experiment} The test accuracies differ by {points:.1f} points;"
            f" at most {ACCURACY_BOUND:.0f} are expected."
        )
    return found
