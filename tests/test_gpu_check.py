"""scripts/gpu_check.sh, with a stand-in for a Python that has a GPU: which steps it runs, what it tells of them."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"
# A step whose command has one of the words in $FAIL fails, one that ends in $HANG waits for
# a signal; pytest writes a report, the build the files of $MAKES.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *gpu_summary.py* | *gpu_probe.py*) exec {python} "$@" ;;
esac
echo "$*"
for word in $FAIL; do case "$*" in *"$word"*) exit 1 ;; esac; done
case "$*" in
  *build_info*) find . -type f ;;
  *build_ext*) find . -type f; for file in $MAKES; do mkdir -p "$(dirname "$file")"; touch "$file"; done ;;
  *"${{HANG:-nothing}}")
    exec 3<> <(:) # opened before the trap: bash that is interrupted while it parses a substitution cannot parse a trap
    trap 'echo caught INT; exit 1' INT
    touch "$READY"
    while :; do read -rt 1 -u 3; done
    ;;
esac
report='{report}'
for argument; do
  case $argument in --junitxml=*) echo "${{report:0:${{CUT:-9999}}}}" > "${{argument#*=}}" ;; esac
done
"""
# A machine with two GPUs, or as $FAIL says.
TORCH = """
import os

fail = os.environ["FAIL"]
if fail == "import torch":
    raise ImportError
__version__ = "2.11"

class version:
    cuda = "13.0"

class cuda:
    is_available = staticmethod(lambda: fail != "is_available")
    device_count = staticmethod(lambda: 2)
    get_device_name = staticmethod(lambda: "GPU")
    get_device_capability = staticmethod(lambda device=0: (9 + device, 0))
"""
# Makes empty programs.
NVCC = """#!/bin/sh
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && echo : > "$2" && chmod +x "$2"
  shift
done
"""
SANITIZER = """#!/usr/bin/env bash
echo "$@"
if [ -n "$INCOMPLETE_TOOL" ]; then case "$*" in *"$INCOMPLETE_TOOL"*) exit 3 ;; esac; fi
"""
REPORT = (
    '<testsuites><testsuite><testcase classname="a" name="b"/>'
    '<testcase classname="a" name="c"><failure message="x"/></testcase>'
    '<testcase classname="a" name="d"><skipped message="needs two GPUs"/></testcase></testsuite></testsuites>'
)


class Check:
    """Runs the script, and reads what it leaves."""

    def __init__(self, folder: Path):
        self.script = SCRIPT
        self.folder = folder / "out"
        self.tools = folder / "bin"
        self.tools.mkdir()
        self.tool("python", PYTHON.format(python=sys.executable, report=REPORT))
        self.tool("torch.py", TORCH)
        self.tool("nvcc", NVCC)
        self.tool("compute-sanitizer", SANITIZER)
        self.made: list[str] = []

    def makes(self, file: str) -> None:
        """Let the build make a file."""
        self.made.append(file)

    def tool(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def __call__(self, *steps: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.tools}:{os.environ['PATH']}"
        variables = {"PATH": path, "PYTHON": str(self.tools / "python"), "FAIL": "", "CUDA_HOME": "", "CUT": ""}
        variables |= {
            "PYTHONPATH": str(self.tools),
            "BN_EXT_CUDA_TEAMS": "",
            "MAKES": " ".join(self.made),
            "INCOMPLETE_TOOL": "",
        } | environment
        command = ["bash", str(self.script), str(self.folder), *steps]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | variables
        )
        if "KILL" in environment:
            while not Path(environment["READY"]).exists() and process.poll() is None:
                os.sched_yield()
            process.terminate()
        output, errors = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def summary(self) -> dict[str, object]:
        return json.loads((self.folder / "summary.json").read_text())

    def results(self) -> dict[str, str]:
        return {step["name"]: step["result"] for step in self.summary()["steps"]}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


def test_steps_that_are_asked_for(check: Check) -> None:
    done = check("verify", "benchmark", BENCH_SECONDS="77")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["build", "verify", "verify-none", "verify-block", "verify-cluster", "verify-no-pdl", "benchmark"]
    assert check.results() == dict.fromkeys(names, "passed")
    assert f"benchmarks --resume --budget 77 --json {check.folder}/batch_norm.json" in check.log("benchmark")
    assert "bn_ext verify --device cuda" in check.log("verify")
    summary = check.summary()
    assert summary["passed"] is True
    assert (summary["device"], summary["devices"], summary["capability"]) == ("GPU", 2, [9, 0])


@pytest.mark.slow
def test_two_calls_cover_the_steps_of_a_short_lease(check: Check) -> None:
    """Both keep to their time, and each leaves one archive of its logs and results, without the build."""
    cuda = SCRIPT.parents[1] / "csrc" / "cuda"
    sources = [*cuda.rglob("*.cu"), *(cuda / f"{name}.cpp" for name in ("machine", "plan", "plan_teams"))]
    objects = [path.relative_to(cuda).with_suffix(".o") for path in sources]
    for file in ("bn_ext/_C.so", "bn_ext/_build_config.py", *(f"build/temp.x/csrc/cuda/{name}" for name in objects)):
        check.makes(file)
    verify = ["verify", "verify-none", "verify-block", "verify-cluster", "verify-no-pdl"]
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    names = {
        "first": ["build", *verify, "driver", "kernels", "grids", "tests"],
        "second": ["build", "faults", "large", "limits", "benchmark", "driver", *tools],
    }
    for call, steps in names.items():
        done = check(call)
        assert done.returncode == 0, done.stdout
        assert check.results() == dict.fromkeys(steps, "passed")
        with tarfile.open(check.folder / "results.tar.gz") as archive:
            found = archive.getnames()
        assert {f"./{name}.log" for name in steps} | {"./summary.json"} <= set(found)
        assert not [name for name in found if name.startswith("./built-")]
        assert len(found) == len(set(found))
    assert "bn_ext.build_info()" in check.log("build")
    assert "-x tests/test_cuda_two_grids.py" in check.log("grids")
    assert "--ignore=tests/test_cuda_two_grids.py --ignore=tests/test_cuda_faults.py" in check.log("tests")


@pytest.mark.slow
def test_a_step_that_fails_keeps_no_other_from_running(check: Check) -> None:
    done = check("verify", "limits", "bytes", FAIL="benchmarks.device_limits")
    assert done.returncode == 1
    results = check.results()
    assert results["limits"] == "failed"
    assert results["verify"] == results["bytes"] == "passed"
    assert check.summary()["passed"] is False


@pytest.mark.slow
def test_nothing_without_a_build(check: Check) -> None:
    done = check("verify", FAIL="build_ext")
    assert done.returncode == 1
    assert check.results() == {"build": "failed"}
    assert "bn_ext is not built, so nothing can be checked" in done.stderr


@pytest.mark.slow
def test_what_was_built_before_is_taken(check: Check) -> None:
    """By a later call into the folder, from the same sources; or from the checkout, if that is asked for."""
    for name in ("_C.so", "_build_config.py"):
        check.makes(f"bn_ext/{name}")
    check.makes("build/temp.x/csrc/cuda/kernels.o")
    assert check("build").returncode == 0
    (kept,) = check.folder.glob("built-*.tar")
    assert "build_ext" in check.log("build")
    assert check("build").returncode == 0
    assert "bn_ext.build_info()" in check.log("build")
    assert "build_ext" not in check.log("build")
    kept.unlink()
    assert check("build", USE_BUILT="1").returncode == 0
    assert "bn_ext.build_info()" in check.log("build")
    assert check.results() == {"build": "passed"}


@pytest.mark.slow
def test_build_products_of_the_checkout_are_copied_only_on_request(check: Check) -> None:
    """An old program or object would be taken for one of this build."""
    checkout = check.folder.parent / "checkout"
    scripts = (f"scripts/gpu_{name}" for name in ("check.sh", "probe.py", "summary.py"))
    for file in (*scripts, "benchmarks/__init__.py", "benchmarks/origin.py", "pyproject.toml"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SCRIPT.parents[1] / file, checkout / file)
    products = ["bn_ext/_C.so", "bn_ext/_build_config.py", "build/temp.x/csrc/cuda/kernels.o", "kernels_driver_program"]
    for file in products:
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).touch()
    check.script = checkout / "scripts" / "gpu_check.sh"
    for use_built, expected in (("0", []), ("1", products)):
        assert check("build", USE_BUILT=use_built).returncode == 0
        copied = check.log("build").splitlines()
        assert "./scripts/gpu_check.sh" in copied
        assert [file for file in products if f"./{file}" in copied] == expected
    assert check("build").returncode == 0
    assert "bn_ext.build_info()" in check.log("build"), "a later call takes what USE_BUILT has brought"


@pytest.mark.slow
def test_a_signal_ends_the_step_that_runs(check: Check) -> None:
    """What it has written is there, and the summary too."""
    ready = check.folder.parent / "ready"
    done = check("verify", "bytes", HANG="bn_ext verify --device cuda", READY=str(ready), KILL="1")
    assert done.returncode != 0
    assert check.results() == {"build": "passed", "verify": "cut off by a signal"}
    assert "caught INT" in check.log("verify")
    assert check.summary()["complete"] is False


@pytest.mark.slow
def test_cases_that_there_was_no_time_for(check: Check) -> None:
    check("sanitize", INCOMPLETE_TOOL="racecheck")
    results = check.results()
    assert results["racecheck"] == "passed: not all cases, see the end of racecheck.log"
    assert results["memcheck"] == results["initcheck"] == results["synccheck"] == "passed"
    assert check.summary()["passed"] is True


@pytest.mark.slow
def test_a_report_that_is_cut_off(check: Check) -> None:
    check("tests", CUT="40")
    (told,) = check.summary()["tests"].values()
    assert "tests.xml cannot be read" in told["error"]


@pytest.mark.slow
def test_tests_are_counted(check: Check) -> None:
    check("tests", "large")
    found = {"ran": 2, "failed": ["a::c"], "skipped": 1, "reasons": {"needs two GPUs": 1}}
    assert check.summary()["tests"] == {"tests": found, "large": found}
    assert "-m not large_memory" in check.log("tests")
    assert "-m large_memory" in check.log("large")


@pytest.mark.slow
def test_when_the_time_is_over(check: Check) -> None:
    """What is left is named, and the whole has not passed."""
    assert check("verify", "bytes", GPU_SECONDS="4").returncode == 1
    assert check.results() == {"build": "cut off: time budget of 4 s (GPU_SECONDS) exhausted"}


@pytest.mark.parametrize(
    ("steps", "environment", "sentence"),
    [
        (["verfy"], {}, "unknown step verfy; the steps are: build verify kernels grids"),
        ([], {"PYTHON": "no-such-python"}, "no-such-python was not found"),
        ([], {"FAIL": "import torch"}, "cannot import torch; set PYTHON to one that can"),
        ([], {"FAIL": "is_available"}, "torch sees no GPU on this machine"),
        (["first"], {"GPU_SECONDS": "ten"}, "GPU_SECONDS must be a number of seconds, got ten"),
    ],
)
def test_what_stops_it(check: Check, steps: list[str], environment: dict[str, str], sentence: str) -> None:
    done = check(*steps, **environment)
    assert done.returncode == 2
    assert f"gpu_check: {sentence}" in done.stderr or sentence in done.stderr
    assert not check.folder.exists()
