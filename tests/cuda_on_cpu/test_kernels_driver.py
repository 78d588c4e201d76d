"""tests/kernels_driver, compiled for the simulated device: all is right there, and it reports what is not."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from . import build
from .batch_norm import KERNELS
from .device import POLICIES

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

DRIVER = build.ROOT / "tests" / "kernels_driver"
VARIANT = r"\(bn_ext::cuda::Variant\)"
VARIANTS = ["plain", "relu", "relu_like", "any"]
KERNEL = re.compile(
    r"([0-9a-f]+) \w void bn_ext::cuda::(?:\(anonymous namespace\)::)?"
    rf"(\w+_kernel<(?:[^()<>]|{VARIANT})*>)\([^{{]*\)"
)
"""A line of nm: its address, and what coverage.h calls it."""

RESULTS = ["y", "y recomputed", "mean", "rstd", "scale", "offset", "mask", "running_mean", "running_var"]
RESULTS += ["num_batches_tracked", "dx", "dz", "dweight", "dbias"]


@pytest.fixture(scope="module")
def program() -> Path:
    return build.program([*sorted(DRIVER.glob("*.cpp")), build.HERE / "kernels_driver.cpp", *KERNELS])


def run(program: Path, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [str(program), *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def kernels_at(program: Path) -> dict[int, str]:
    """All kernels that are compiled, by their addresses."""
    lines = subprocess.run(["nm", "--demangle", str(program)], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in lines.splitlines():
        if match := KERNEL.fullmatch(line):
            found[int(match[1], 16)] = re.sub(VARIANT + r"(\d)", lambda m: VARIANTS[int(m[1])], match[2])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "more"), [("ascending", "--unwritten"), ("priorities", "--verbose")])
def test_every_case_is_right_and_every_kernel_is_run(program: Path, policy: str, more: str) -> None:
    """As the driver itself says, which is compared with what was launched and with what is compiled."""
    result = run(program, more, CUDA_ON_CPU_ORDER=f"{POLICIES.index(policy)} 7")
    assert result.returncode == 0, result.stdout[-5000:]
    right, cases = re.findall(r"^(\d+) of (\d+) cases are right$", result.stdout, re.MULTILINE)[0]
    assert right == cases
    assert int(cases) > 400
    compiled = kernels_at(program)
    launched = {compiled[int(address, 16)] for address in result.stderr.split()}
    assert launched == set(compiled.values())
    assert f"{len(compiled)} of {len(compiled)} kernels were run" in result.stdout
    if more == "--verbose":
        assert set(re.findall(r"^    (.*)$", result.stdout, re.MULTILINE)) == launched


@pytest.mark.parametrize("name", RESULTS)
def test_a_wrong_value_of_any_result_is_reported(program: Path, name: str) -> None:
    """By every case that has it; the values next to it are right."""
    chosen = ("--only", "with residual and mask, training", "--only", "float64")
    assert run(program, *chosen).returncode == 0
    result = run(program, *chosen, "--spoil", name)
    assert result.returncode == 1
    count = len(run(program, *chosen, "--list").stdout.splitlines())
    words = {"mask": "the mask's bit ", "num_batches_tracked": "num_batches_tracked is "}.get(name, f"{name}[")
    wrong = re.findall(r"^wrong: .*: (.*)$", result.stdout, re.MULTILINE)
    assert count > 3
    assert len([sentence for sentence in wrong if sentence.startswith(words)]) == len(wrong) == count
    assert name in ("mask", "num_batches_tracked") or all(re.search(r"\(1 of \d+ are wrong\)", s) for s in wrong)
    assert f"0 of {count} cases are right" in result.stdout


def test_what_was_never_run_is_reported(program: Path) -> None:
    """Where the time was too short: kernels and ways, and the cases that were not begun."""
    result = run(program, "--seconds", "1e-9")
    assert result.returncode == 1
    never = set(re.findall(r"^never run: (.*)$", result.stdout, re.MULTILINE))
    assert set(kernels_at(program).values()) < never
    assert {"single_pass_forward_kernel: cluster, spilling, one channel", "grad_input_kernel: one dy"} < never
    assert re.search(r"^\d+ cases were not begun after 1e-09 s$", result.stdout, re.MULTILINE)
    assert "0 of 0 cases are right" in result.stdout


def test_a_path_that_was_not_taken_is_reported(program: Path) -> None:
    """Where the device has no room for teams that wait for each other."""
    for path in ("cluster", "grid"):
        result = run(program, "--only", "float64", "--only", path, CUDA_ON_CPU_MACHINE="1 1")
        assert result.returncode == 1
        assert "forward did not take this path but the multi-kernel path" in result.stdout
        assert "backward did not take this path but the multi-kernel path" in result.stdout


def test_a_refused_launch_is_reported_and_other_cases_are_run(program: Path) -> None:
    """Less than a block on each multiprocessor."""
    result = run(program, "--only", "float64", "--only", "multi-kernel", CUDA_ON_CPU_MACHINE="1 8")
    assert result.returncode == 1
    wrong = re.findall(r"^wrong: .*: forward failed: cluster misconfiguration$", result.stdout, re.MULTILINE)
    assert len(wrong) > 10
    assert f"0 of {len(wrong)} cases are right" in result.stdout


def test_options(program: Path) -> None:
    names = run(program, "--list").stdout.splitlines()
    assert len(names) == len(set(names)) > 400
    chosen = run(program, "--list", "--only", "bfloat16", "--only", "grid, spilling").stdout.splitlines()
    assert chosen == [name for name in names if "bfloat16" in name and "grid, spilling" in name] != []
    assert run(program, "--only", "no such case").returncode == 1
    for options in (["--onyl", "x"], ["--only"]):
        result = run(program, *options)
        assert result.returncode == 2
        assert f"unknown or incomplete option: {options[0]}" in result.stderr
