"""The build says what it decided about CUDA and why, and fails with a sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what setup.py reads and writes."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("bn_ext", "csrc"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build_config.py", "__pycache__")
        )
    return tmp_path


def setup(sources: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py as far as it decides, without compiling."""
    code = f"{before}\nimport sys; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    environment = {"BN_EXT_CUDA": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'\n{code}"],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        ("0", 0, "CUDA kernels: no: it was built with BN_EXT_CUDA=0"),
        ("2", 1, "BN_EXT_CUDA must be 0 or 1, got '2'"),
        ("yes", 1, "BN_EXT_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_override(sources: Path, value: str, status: int, words: str) -> None:
    result = setup(sources, BN_EXT_CUDA=value)
    assert result.returncode == status
    assert words in result.stdout + result.stderr


WITHOUT_CUDA = "import torch; torch.version.cuda = None"
WITH_CUDA = "import torch; torch.version.cuda = '13.0'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "words"),
    [(WITHOUT_CUDA, "was built without CUDA"), (WITH_CUDA, "no CUDA toolkit was found at build time")],
)
def test_reason_without_cuda(sources: Path, before: str, words: str) -> None:
    no_toolkit = str(sources)
    result = setup(sources, before, CUDA_HOME=no_toolkit)
    assert result.returncode == 0
    assert "CUDA kernels: no: " in result.stdout
    assert words in result.stdout
    assert not (sources / "bn_ext" / "_build_config.py").exists()  # nothing was built
    insisting = setup(sources, before, BN_EXT_CUDA="1", CUDA_HOME=no_toolkit)
    assert insisting.returncode == 1
    assert "BN_EXT_CUDA=1, but " in insisting.stderr
    assert words in insisting.stderr


def fake_toolkit(folder: Path) -> Path:
    """What setup.py takes for a CUDA toolkit."""
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    return folder


@pytest.mark.slow
def test_toolkit_is_where_its_headers_are(sources: Path, tmp_path: Path) -> None:
    """The nvcc that torch finds on PATH may be a script beside no headers."""
    result = setup(sources, WITH_CUDA, CUDA_HOME=str(fake_toolkit(tmp_path / "toolkit")))
    assert "CUDA kernels: yes: torch has CUDA 13.0" in result.stdout
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").unlink()
    result = setup(sources, WITH_CUDA, CUDA_HOME=str(tmp_path / "toolkit"))
    assert "CUDA kernels: no: no CUDA toolkit was found" in result.stdout


SHOW_SOURCES = """
import setuptools
setuptools.setup = lambda ext_modules, **_: print("sources:", *ext_modules[0].sources)
"""


@pytest.mark.slow
def test_sources_are_built_once_and_the_planner_always(sources: Path, tmp_path: Path) -> None:
    """What bn_ext.explain asks is in every build; the host's side of CUDA or what stands in for it, never both."""
    toolkit = str(fake_toolkit(tmp_path / "toolkit"))
    for cuda, environment in ((False, {"BN_EXT_CUDA": "0"}), (True, {"CUDA_HOME": toolkit})):
        result = setup(sources, f"{WITH_CUDA}\n{SHOW_SOURCES}", **environment)
        assert result.returncode == 0, result.stderr
        built = result.stdout.split("sources:")[1].split()
        assert len(set(built)) == len(built)
        assert {f"csrc/cuda/{name}.cpp" for name in ("plan", "traffic")} <= set(built)
        assert ("csrc/cuda/batch_norm_cuda.cpp" in built, "csrc/cuda/unavailable.cpp" in built) == (cuda, not cuda)
        assert ("csrc/cuda/instantiations/forward_float32.cu" in built) == cuda


@pytest.mark.slow
def test_phase_clock_is_a_build_of_its_own(sources: Path, tmp_path: Path) -> None:
    """A macro for all sources and a line of the build config, only if asked for and only with CUDA kernels."""
    show = SHOW_SOURCES.replace("sources:", "macros:").replace("sources)", "define_macros)")
    with_cuda = f"{WITH_CUDA}\n{show}"
    toolkit = str(fake_toolkit(tmp_path / "toolkit"))
    for value, has_clock in (("", False), ("0", False), ("1", True)):
        result = setup(sources, with_cuda, CUDA_HOME=toolkit, BN_EXT_PHASE_CLOCK=value)
        assert result.returncode == 0, result.stderr
        assert ("BN_EXT_PHASE_CLOCK" in result.stdout.split("macros:")[1]) == has_clock
    for environment, words in (
        ({"BN_EXT_PHASE_CLOCK": "yes"}, "BN_EXT_PHASE_CLOCK must be 0 or 1, got 'yes'"),
        ({"BN_EXT_PHASE_CLOCK": "1", "BN_EXT_CUDA": "0"}, "BN_EXT_PHASE_CLOCK=1 requires CUDA kernels"),
    ):
        result = setup(sources, with_cuda, CUDA_HOME=toolkit, **environment)
        assert result.returncode == 1
        assert words in result.stderr


def test_without_torch(sources: Path) -> None:
    result = setup(sources, "import sys; sys.modules['torch'] = None")
    assert result.returncode == 1
    assert "torch cannot be imported" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr


def test_version_is_one() -> None:
    """The package's metadata and the changelog's newest release or the next one."""
    project = (ROOT / "pyproject.toml").read_text()
    version = project.split('version = "')[1].split('"')[0]
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
