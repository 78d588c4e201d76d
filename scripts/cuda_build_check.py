"""Build bn_ext with its CUDA kernels and check the build; a GPU is neither needed nor used.

The script uses its own environment with the oldest supported torch, in the user's cache folder, and a copy of the
sources, so that the build in this folder does not change. It builds for the default architectures, checks build_info(),
the extension's machine code and the registers of its kernels, and runs the tests.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT, fail, output_of, run
from cuda_toolkit import find_nvcc
from kernels_check import ARCHITECTURES, check_kernels
from make_env import BUILD_REQUIREMENTS, requirements_of

TORCH = "torch==2.11.0"
# Not copied from the checkout: files that git ignores, and git's own.
NOT_SOURCES = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "_build_config.py",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "gpu-check",
)


@contextlib.contextmanager
def part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print the name of a part, and record its time in `seconds`."""
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def required_nvcc() -> Path:
    """Return the CUDA compiler; stop if there is none."""
    return find_nvcc() or fail(
        "no nvcc was found; install the CUDA toolkit of torch's version or set CUDA_HOME to it "
        "(with CHECK_CUDA_BUILD=0, .ci/run skips this check)"
    )


def requirements() -> list[str]:
    """Return the environment's requirements: torch, those of a build, and those of the tests."""
    return [TORCH, *BUILD_REQUIREMENTS, *requirements_of("test")]


def make_environment(cache: Path) -> Path:
    """Find or make the environment for the requirements and this Python; return its Python."""
    key = hashlib.sha256("\n".join([sys.version, *requirements()]).encode()).hexdigest()[:8]
    folder = cache / f"{TORCH.replace('==', '-')}-{key}"
    python, complete = folder / "bin" / "python", folder / "complete.txt"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making the environment
        if complete.exists():
            print(f"reusing {folder}")
            return python
        print(f"making {folder} (5.5 GB)", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        # pip's cache would store everything a second time.
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir")
        run("installing the environment", *pip, *requirements(), cwd=ROOT)
        complete.write_text("\n".join(requirements()) + "\n")  # last, so that an interrupted install is repeated
    return python


BUILD_INFO = """
import dataclasses, json, torch, bn_ext
module = bn_ext.BatchNorm2d(3)
module(torch.randn(2, 3, 4, 4)).sum().backward()
assert module.num_batches_tracked == 1
print(json.dumps(dataclasses.asdict(bn_ext.build_info()) | {"torch_cuda": torch.version.cuda}))
"""


def check_build_info(python: Path, sources: Path) -> None:
    """Compare build_info() with the requested build, and check a call on the CPU."""
    info = json.loads(output_of("a call on the CPU", python, "-c", BUILD_INFO, cwd=sources).splitlines()[-1])
    version = TORCH.removeprefix("torch==")
    expected = {"loaded": True, "cuda": True, "cuda_architectures": "8.0;9.0+PTX", "phase_clock": False}
    for name, value in expected.items():
        if info[name] != value:
            fail(f"build_info().{name} must be {value!r}, got {info[name]!r}")
    if info["torch_at_build"].split("+")[0] != version or info["torch"] != info["torch_at_build"]:
        fail(f"build_info() must report torch {version}, got {info['torch_at_build']} at build, now {info['torch']}")
    text = output_of("python -m bn_ext", python, "-m", "bn_ext", cwd=sources)
    print(text, end="")
    if not re.search(r"^CUDA kernels +yes \(torch has CUDA ", text, re.MULTILINE):
        fail("python -m bn_ext must print 'CUDA kernels  yes', see above")


def find_cuobjdump(python: Path) -> Path:
    """Return the cuobjdump on PATH, or triton's: not every toolkit has one, but torch installs triton."""
    packages = output_of("python", python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    shipped = next(Path(packages).glob("triton/backends/nvidia/bin/cuobjdump"), None)
    on_path = shutil.which("cuobjdump")
    return Path(on_path) if on_path else shipped or fail("cuobjdump was not found on PATH or in triton; install triton")


def check_machine_code(cuobjdump: Path, extension: Path) -> None:
    """Check that the extension has machine code for every architecture and PTX for the newest."""
    text = output_of("cuobjdump", cuobjdump, "--list-elf", "--list-ptx", extension)
    found = set(re.findall(r"\bsm_(\d+)\.(cubin|ptx)$", text, re.MULTILINE))
    wanted = {(name, "cubin") for name in ARCHITECTURES} | {(ARCHITECTURES[-1], "ptx")}
    if found != wanted:
        fail(f"the extension must contain {sorted(wanted)}, got {sorted(found)} from cuobjdump")
    print(", ".join(f"sm_{name} {kind}" for name, kind in sorted(found)))


def check_programs(nvcc: Path, sources: Path) -> None:
    """Check that the programs that measure a GPU compile, also for a newer architecture than the package's."""
    limits, host_calls = sources / "benchmarks" / "device_limits" / "limits.cu", sources / "lab" / "host_calls.cu"
    for program, architecture in [*((limits, name) for name in (*ARCHITECTURES, "100")), (host_calls, "90")]:
        command = (
            nvcc,
            "-O3",
            "--expt-relaxed-constexpr",
            "-cubin",
            f"-arch=sm_{architecture}",
            "-o",
            os.devnull,
            program,
        )
        output_of(f"nvcc on {program.name} for sm_{architecture}", *command)


def check_driver(nvcc: Path, sources: Path) -> None:
    """Check that the kernels' driver compiles and links with the build's objects; only a GPU can run it."""
    (objects,) = (sources / "build").glob("temp*/csrc/cuda")
    program = sources / "kernels_driver_program"
    home = str(nvcc.resolve().parent.parent)
    output_of("the driver's build", "tests/kernels_driver/build.sh", program, objects, cwd=sources, CUDA_HOME=home)
    print(f"{program.name}: {program.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    """Run all parts in turn; stop at the first failure."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bn_ext"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=cache, help=f"folder for the environment (default {cache})")
    parser.add_argument("--python", type=Path, help="use this Python, which has all requirements; make no environment")
    options = parser.parse_args()

    seconds: dict[str, float] = {}
    nvcc = required_nvcc()
    with part("environment", seconds):
        python = options.python or make_environment(options.cache)
        cuobjdump = find_cuobjdump(python)
    with tempfile.TemporaryDirectory(prefix="bn_ext-cuda-") as folder:
        sources = Path(folder, "bn_ext")
        shutil.copytree(ROOT, sources, ignore=NOT_SOURCES)
        with part("programs that measure a GPU", seconds):
            check_programs(nvcc, sources)
        with part("build", seconds):
            # Require CUDA, and use the default architectures.
            setting = {"BN_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ""}
            command = (python, "setup.py", "--quiet", "build_ext", "--inplace")
            text = output_of("the build", *command, cwd=sources, **setting)
            print(*re.findall(r"^bn_ext: .*", text, re.MULTILINE), sep="\n")
        with part("build_info and a call on the CPU", seconds):
            check_build_info(python, sources)
        with part("machine code", seconds):
            (extension,) = (sources / "bn_ext").glob("_C*.so")
            check_machine_code(cuobjdump, extension)
            check_kernels(cuobjdump, extension)
        with part("kernels' driver", seconds):
            check_driver(nvcc, sources)
        with part("tests on the CPU, with this build", seconds):
            # tests/cuda_on_cpu compiles the kernels without torch, so one run of it with any torch is enough.
            tests = ("-m", "pytest", "-q", "-n", "2", "--device=cpu", "--ignore=tests/cuda_on_cpu")
            tests += ("-p", "no:cacheprovider")
            run("the test suite", python, *tests, cwd=sources)
    print("\n== all passed: " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))


if __name__ == "__main__":
    main()
