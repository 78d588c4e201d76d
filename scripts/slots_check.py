"""Count the issue slots of a kernel's loops per row of 16-byte vectors, in its machine code.

If a loop needs more slots than there are during its memory accesses, issue bounds the kernel (docs/tuning.md).
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from commands import ROOT, fail

TYPES = {"__nv_bfloat16, 8": "bfloat16", "float, 4": "float32"}
VARIANTS = ("plain", "relu")  # as in plan.h


class Phase(NamedTuple):
    """How to recognise a loop: by an instruction that occurs `of_row` times per row, and one that does not occur."""

    marks: str
    of_row: int
    without: str


FETCH, LOAD, STORE, TILE = (rf"\b{name}\b.*\.128\b" for name in ("LDGSTS", "LDG", "STG", "LDS"))
PHASES = {
    "single_pass_forward_kernel": [Phase(FETCH, 1, STORE), Phase(TILE, 1, STORE), Phase(STORE, 1, FETCH)],
    "single_pass_backward_kernel": [Phase(FETCH, 2, STORE), Phase(TILE, 2, STORE), Phase(STORE, 1, FETCH)],
    "statistics_kernel": [Phase(LOAD, 1, STORE)],
    "apply_kernel": [Phase(STORE, 1, FETCH)],
    "grad_sums_kernel": [Phase(LOAD, 2, STORE)],
    "grad_input_kernel": [Phase(STORE, 1, FETCH)],
}


def innermost_loops(machine_code: str) -> list[list[str]]:
    """Return the instructions of each innermost loop of a kernel in the output of ``cuobjdump -sass``."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", machine_code)
    indices = {int(address, 16): i for i, (address, _) in enumerate(found)}
    instructions = [instruction for _, instruction in found]
    ranges = {}  # if several branches jump back to the same instruction, the last one ends the loop
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*(0x[0-9a-f]+)", instruction)
        begin = indices[int(target[1], 16)] if target else end
        if begin < end:
            ranges[begin] = end
    return [
        instructions[begin : end + 1]
        for begin, end in ranges.items()
        if not any(begin < b and e <= end for b, e in ranges.items())
    ]


def slots_of_row(loops: Iterable[list[str]], phase: Phase) -> float:
    """Return the slots per row in the loop with the most rows per iteration, the longest of these."""

    def count(loop: list[str], pattern: str) -> int:
        return sum(re.search(pattern, instruction) is not None for instruction in loop)

    # Loops with double-precision arithmetic merge sums and process no rows.
    fitting = [
        (count(loop, phase.marks) / phase.of_row, len(loop))
        for loop in loops
        if not count(loop, phase.without) and not count(loop, r"\bD(ADD|FMA|MUL)\b")
    ]
    rows, slots = max(fitting, default=(0, 0))
    return slots / rows if rows == int(rows) > 0 else 0


def count_slots(machine_code: str, titles: dict[str, str]) -> dict[tuple[str, str, str], float]:
    """Return the slots per row of each kernel in PHASES, type and variant: the maximum over its instances."""
    found: dict[tuple[str, str, str], float] = {}
    for text in machine_code.split("Function : ")[1:]:
        title = titles[text.split(maxsplit=1)[0]]
        match = re.fullmatch(r"(\w+)<([\w ]+, \d+), \w+(?:, (\d))?(?:, (\w+))?>", title)
        # Instances of grad_sums_kernel that also write dx or dz have no limit.
        if not match or match[1] not in PHASES or match[2] not in TYPES or match[4] == "true":
            continue
        variant = int(match[3] or 0)
        if variant >= len(VARIANTS):
            continue
        loops = innermost_loops(text)
        parts = [slots_of_row(loops, phase) for phase in PHASES[match[1]]]
        if not all(parts):
            fail(f"a loop of {title} was not found in its machine code: adapt PHASES in scripts/slots_check.py")
        if re.search(r"\bSTG\.E\.EF\.128\b", text):
            fail(f"{title} must store results with the plan's cache policy, but always stores with evict-first")
        key = match[1], TYPES[match[2]], VARIANTS[variant]
        found[key] = max(found.get(key, 0), sum(parts))
    return found


def check_slots(machine_code: str, titles: dict[str, str]) -> None:
    """Check that no kernel exceeds its limit in csrc/README.md."""
    row = re.compile(r"^\| `(\w+_kernel)`, (\w+) \| (\d+) \| (\d+|-) \|", re.MULTILINE)
    listed = {}
    for name, dtype, plain, relu in row.findall((ROOT / "csrc" / "README.md").read_text()):
        listed |= {(name, dtype, variant): limit for variant, limit in zip(VARIANTS, (plain, relu), strict=True)}
    found = count_slots(machine_code, titles)
    if missing := {key for key, limit in listed.items() if limit != "-"} - set(found):
        fail(f"{' '.join(min(missing))} is in csrc/README.md but not in the machine code: correct the table")
    for key, slots in sorted(found.items()):
        limit = listed.get(key, "0")
        print(f"{' '.join(key):<45}{slots:>7.1f} slots per row, at most {limit}")
        if limit == "-" or slots > int(limit):
            fail(f"{' '.join(key)} takes {slots:.1f} slots per row, csrc/README.md allows {limit}: correct either")
