"""The exchange of a grid's teams as a Promela model: Spin finds no error in it, and the right one in broken variants.

The model is models/exchange.pml; docs/exchange.md describes it and its limits.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "models" / "exchange.pml"
pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None, reason="needs spin (a package of Debian's) and gcc"
)

# As Spin words them.
WRONG_SUMS = "assertion violated (sums["
WRONG_COEFFICIENTS = "assertion violated (coefficients["
COUNTERS_LEFT = "assertion violated ((arrivals==0)&&(leavers==0))"
HANG = "invalid end state"


def explore(folder: Path, *switches: str) -> str:
    """Visit every state of the model with these switches, past errors too; what Spin reports."""

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout

    run("spin", "-a", *(f"-D{switch}" for switch in switches), str(MODEL))
    # NOREDUCE: no interleaving is left out because another one stands for it. MEMLIM is in MiB.
    run("gcc", "-O1", "-w", "-DSAFETY", "-DNOREDUCE", "-DCOLLAPSE", "-DMEMLIM=1000", "-o", "pan", "pan.c")
    report = run("./pan", "-c0", "-m10000", "-w22")
    assert "Full statespace search" in report
    assert re.search(r"assertion violations\s+\+", report)
    assert re.search(r"invalid end states\s+\+", report)
    assert "max search depth too small" not in report
    assert "Search not completed" not in report
    return report


def errors(report: str) -> list[str]:
    """Each kind of error once; Spin goes on behind an error."""
    found = re.findall(r"^pan:\d+: (.*) \(at depth \d+\)$", report, re.MULTILINE)
    count = int(re.findall(r"errors: (\d+)", report)[0])
    assert (count > 0) == (found != [])
    return sorted(set(found))


@pytest.mark.parametrize("blocks", [3, 4])
@pytest.mark.parametrize(
    "switches",
    [
        ["ONE_BARRIER"],
        [],
        # With two barriers per slice the second buffer is not needed: nobody stores sums while others read them.
        ["FAULT_SINGLE_BUFFER"],
    ],
    ids=lambda switches: "-".join(switches) or "two-barriers",
)
def test_every_interleaving_is_right(tmp_path: Path, switches: list[str], blocks: int) -> None:
    report = explore(tmp_path, *switches, f"BLOCKS={blocks}")
    assert errors(report) == []
    assert re.findall(r"\((\d+) of \d+ states\)", report) == ["0", "0"], "part of the model is never reached"


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        (["ONE_BARRIER", "FAULT_SINGLE_BUFFER"], [WRONG_SUMS]),
        (["ONE_BARRIER", "FAULT_EARLY_RESET"], [HANG]),
        (["FAULT_EARLY_RESET"], [HANG]),
        (["ONE_BARRIER", "FAULT_NO_RESET"], [COUNTERS_LEFT, WRONG_SUMS]),
        (["FAULT_NO_RESET"], [COUNTERS_LEFT, WRONG_COEFFICIENTS, WRONG_SUMS]),
        (["ONE_BARRIER", "FAULT_EARLY_ARRIVAL"], [WRONG_SUMS]),
        (["FAULT_EARLY_ARRIVAL"], [WRONG_SUMS]),
        (["FAULT_UNAWAITED_COEFFICIENTS"], [WRONG_COEFFICIENTS]),
    ],
    ids=lambda value: "-".join(value) if "FAULT" in value[-1] else "",
)
def test_fault_is_found(tmp_path: Path, switches: list[str], expected: list[str]) -> None:
    found = errors(explore(tmp_path, *switches))
    assert len(found) == len(expected), found
    assert all(error.startswith(words) for error, words in zip(found, expected, strict=True)), found
