"""From a label, as "bn+relu 256x56 NCHW N=32", to inputs, calls and the least bytes, by the benchmarks' own means."""

import re

import torch
from torch import Tensor

from benchmarks.check import check, reference
from benchmarks.inputs import Case, make_inputs
from benchmarks.operations import PLAIN, Traffic
from benchmarks.providers import Subject
from benchmarks.shapes import RESNET50

LAYOUTS = {"NCHW": "contiguous", "NHWC": "channels_last"}
DIRECTIONS = ("forward", "backward")
# benchmarks.operations has these of both directions together: z is forward's and dz backward's, bits both's.
LEAST = {
    (PLAIN, "forward"): Traffic(2),
    (PLAIN, "backward"): Traffic(3),
    ("bn+relu", "forward"): Traffic(2),
    ("bn+relu", "backward"): Traffic(3),
    ("bn+add+relu", "forward"): Traffic(3, bits=1),
    ("bn+add+relu", "backward"): Traffic(4, bits=1),
}


def case_of(label: str, operation: str = PLAIN, clock: str = "kernels") -> Case:
    """The case of a label; bfloat16."""
    found = re.fullmatch(r"(\d+)x(\d+) (NCHW|NHWC)(?: N=(\d+))?", label)
    shapes = {(shape.channels, shape.height): shape for shape in RESNET50}
    shape = shapes.get((int(found[1]), int(found[2]))) if found else None
    if found is None or shape is None:
        raise ValueError(f"a label must be as '256x56 NCHW' or '512x7 NHWC N=32', of ResNet-50's shapes, got {label!r}")
    return Case(shape.name, shape.size(int(found[4] or 256)), "bfloat16", LAYOUTS[found[3]], operation, clock)


def least_bytes(case: Case, direction: str) -> float:
    """What must move."""
    tensors, bits = LEAST[case.operation, direction]
    return case.bytes * (tensors + bits / 16)


def subjects(case: Case, device: torch.device, providers: tuple[str, ...]) -> tuple[dict[str, Subject], list[Tensor]]:
    """The calls of each provider, whose results are right, and the copies of x."""
    inputs = make_inputs(case, device)
    expected = reference(case, inputs)
    made = {name: Subject(name, case.operation, inputs) for name in providers}
    for name, subject in made.items():
        check(name, case, inputs, subject, expected)
    return made, list(inputs.x)
