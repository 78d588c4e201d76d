"""Build bn_ext with its CUDA kernels and check what came of it; a GPU is neither needed nor used.

In an environment of its own with the oldest torch that is supported, kept in the user's cache folder, and in a copy of
the sources, so that the build in this folder stays as it is: builds for the default architectures, looks at
build_info() and at the machine code in the extension, has ptxas report every kernel's registers, and runs the tests.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from cuda_toolkit import find_nvcc
from make_env import BUILD_REQUIREMENTS, ROOT

TORCH = "torch==2.11.0"
ARCHITECTURES = ("80", "90")  # with PTX of the last: the default of setup.py
# As torch passes them to nvcc; what setup.py adds is -O3.
NVCC_FLAGS = (
    "-O3",
    "--expt-relaxed-constexpr",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
)
# Of the checkout, not copied: what git ignores, and git itself.
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


def fail(sentence: str) -> NoReturn:
    """Stop with one sentence."""
    sys.exit(f"cuda_build_check: {sentence}")


@contextlib.contextmanager
def part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say what begins, and note how long it took."""
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def run(what: str, *command: str | Path, cwd: Path) -> None:
    """Run a command; stop with a sentence if it fails."""
    print("+", *command, flush=True)
    status = subprocess.run([str(c) for c in command], cwd=cwd, check=False).returncode
    if status != 0:
        fail(f"{what} failed with status {status}, see above")


def output_of(what: str, *command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints, both streams; stop with a sentence if it fails."""
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        print(result.stdout)
        fail(f"{what} failed with status {result.returncode}, see above")
    return result.stdout


def required_nvcc() -> Path:
    """The CUDA compiler; stop with a sentence if there is none."""
    return find_nvcc() or fail(
        "no nvcc was found; install the CUDA toolkit of torch's version or set CUDA_HOME to it "
        "(.ci/run leaves this part out only where CHECK_CUDA_BUILD=0 says so)"
    )


def requirements() -> list[str]:
    """What goes into the environment: torch, what a build needs, and what the tests need."""
    project = (ROOT / "pyproject.toml").read_text()
    (test,) = re.findall(r"^test = (\[.*\])$", project, re.MULTILINE)  # Python 3.10 has no tomllib
    return [TORCH, *BUILD_REQUIREMENTS, *json.loads(test)]


def make_environment(cache: Path) -> Path:
    """Find or make the environment of these requirements and this Python; returns its Python."""
    key = hashlib.sha256("\n".join([sys.version, *requirements()]).encode()).hexdigest()[:8]
    folder = cache / f"{TORCH.replace('==', '-')}-{key}"
    python, complete = folder / "bin" / "python", folder / "complete.txt"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it
        if complete.exists():
            print(f"reusing {folder}")
            return python
        print(f"making {folder} (5.5 GB)", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        # Without pip's cache: it would hold everything a second time.
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir")
        run("installing the environment", *pip, *requirements(), cwd=ROOT)
        complete.write_text("\n".join(requirements()) + "\n")  # last: an interrupted install is made anew
    return python


BUILD_INFO = """
import dataclasses, json, torch, bn_ext
module = bn_ext.BatchNorm2d(3)
module(torch.randn(2, 3, 4, 4)).sum().backward()
assert module.num_batches_tracked == 1
print(json.dumps(dataclasses.asdict(bn_ext.build_info()) | {"torch_cuda": torch.version.cuda}))
"""


def check_build_info(python: Path, sources: Path) -> None:
    """Compare what the package tells of itself with what was asked for; a call on the CPU works."""
    info = json.loads(output_of("a call on the CPU", python, "-c", BUILD_INFO, cwd=sources).splitlines()[-1])
    version = TORCH.removeprefix("torch==")
    expected = {"loaded": True, "cuda": True, "cuda_architectures": "8.0;9.0+PTX"}
    for name, value in expected.items():
        if info[name] != value:
            fail(f"build_info().{name} must be {value!r}, got {info[name]!r}")
    if info["torch_at_build"].split("+")[0] != version or info["torch"] != info["torch_at_build"]:
        fail(f"build_info() must tell torch {version}, got {info['torch_at_build']} at build, now {info['torch']}")
    text = output_of("python -m bn_ext", python, "-m", "bn_ext", cwd=sources)
    print(text, end="")
    if not re.search(r"^CUDA kernels +yes \(torch has CUDA ", text, re.MULTILINE):
        fail("python -m bn_ext must say 'CUDA kernels  yes', see above")


def check_machine_code(python: Path, sources: Path) -> None:
    """The extension holds machine code for every architecture, and PTX of the newest."""
    # No toolkit is sure to have cuobjdump; triton, which torch brings along, has one.
    packages = output_of("python", python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    shipped = next(Path(packages).glob("triton/backends/nvidia/bin/cuobjdump"), None)
    cuobjdump = shutil.which("cuobjdump") or shipped
    if cuobjdump is None:
        print("NOT CHECKED: no cuobjdump in the toolkit or in triton")
        return
    (extension,) = (sources / "bn_ext").glob("_C*.so")
    text = output_of("cuobjdump", cuobjdump, "--list-elf", "--list-ptx", extension)
    found = set(re.findall(r"\bsm_(\d+)\.(cubin|ptx)$", text, re.MULTILINE))
    wanted = {(name, "cubin") for name in ARCHITECTURES} | {(ARCHITECTURES[-1], "ptx")}
    if found != wanted:
        fail(f"the extension must hold {sorted(wanted)}, cuobjdump lists {sorted(found)}")
    print(", ".join(f"sm_{name} {kind}" for name, kind in sorted(found)))


class Kernel(NamedTuple):
    """What ptxas tells of a kernel for one architecture."""

    name: str
    architecture: str
    stack: int  # bytes: local memory
    spill_stores: int
    spill_loads: int
    registers: int


def compile_kernels(nvcc: Path, source: Path, folder: Path) -> list[Kernel]:
    """Compile one file for every architecture, and read what ptxas tells."""
    kernels = []
    for architecture in ARCHITECTURES:
        target = folder / f"{source.stem}_{architecture}.cubin"
        command = (nvcc, *NVCC_FLAGS, "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-o", target, source)
        text = output_of(f"nvcc on {source.name} for sm_{architecture}", *command)
        kernels += parse_ptxas(text)
    if not kernels:
        fail(f"ptxas told of no kernel in {source.name}: has the form of its report changed?")
    return kernels


def parse_ptxas(text: str) -> list[Kernel]:
    """Read `ptxas -v`: an entry function, what it has of local memory, and its registers."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n.*\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers"
    )
    kernels = [Kernel(name, sm, *(int(n) for n in numbers)) for name, sm, *numbers in re.findall(pattern, text)]
    if len(kernels) != text.count("bytes stack frame"):
        fail("ptxas told of a function in a form that is not known here, or of one that is not inlined into its kernel")
    return kernels


def readable(names: list[str]) -> list[str]:
    """Demangled kernel names, without namespaces and parameters."""
    if shutil.which("c++filt"):
        names = output_of("c++filt", "c++filt", *names).splitlines()
    return [re.sub(r"^void |bn_ext::cuda::|\(anonymous namespace\)::|\(.*$|\((int|bool)\)", "", n) for n in names]


def check_kernels(nvcc: Path, sources: Path) -> None:
    """No kernel may spill registers or use local memory; prints their registers."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((sources / "csrc" / "cuda").glob("*.cu"))
        kernels = [kernel for file in files for kernel in compile_kernels(nvcc, file, Path(folder))]
    names = sorted({kernel.name for kernel in kernels})
    registers = {(kernel.name, kernel.architecture): str(kernel.registers) for kernel in kernels}
    print(f"registers of {len(names)} kernels" + "".join(f"  sm_{name}" for name in ARCHITECTURES))
    for name, title in sorted(zip(names, readable(names), strict=True), key=lambda pair: pair[1]):
        print(f"{title:<60}" + "".join(f"{registers.get((name, sm), '-'):>7}" for sm in ARCHITECTURES))
    for kernel in kernels:
        if kernel.stack or kernel.spill_stores or kernel.spill_loads:
            fail(
                f"{readable([kernel.name])[0]} must not use local memory, but on sm_{kernel.architecture} it has a "
                f"stack of {kernel.stack} bytes, {kernel.spill_stores} bytes of spill stores and {kernel.spill_loads} "
                "of spill loads"
            )
    if len(kernels) != len(names) * len(ARCHITECTURES):
        fail("some kernel is missing for an architecture, see the table")
    titles = dict(zip(names, readable(names), strict=True))
    check_listed({(titles[k.name].split("<")[0], k.architecture, k.registers) for k in kernels})


def check_device_limits(nvcc: Path, sources: Path) -> None:
    """The program of benchmarks/device_limits compiles, for what is newer than the package's architectures too."""
    program = sources / "benchmarks" / "device_limits" / "limits.cu"
    for architecture in (*ARCHITECTURES, "100"):
        command = (nvcc, *NVCC_FLAGS, "-cubin", f"-arch=sm_{architecture}", "-o", os.devnull, program)
        output_of(f"nvcc on {program.name} for sm_{architecture}", *command)


def check_listed(registers: set[tuple[str, str, int]]) -> None:
    """No kernel has more registers than csrc/README.md says: name, architecture, registers of each."""
    row = re.compile(r"^\| `(\w+_kernel)` \| (?:\d+ to )?(\d+) \| (?:\d+ to )?(\d+) \|", re.MULTILINE)
    listed = {}
    for name, of_90, of_80 in row.findall((ROOT / "csrc" / "README.md").read_text()):
        listed |= {(name, "90"): int(of_90), (name, "80"): int(of_80)}
    for name, architecture, found in sorted(registers):
        said = listed.get((name, architecture), 0)
        if found > said:
            fail(f"{name} has {found} registers on sm_{architecture}, csrc/README.md says {said} at most: correct it")


def check_driver(nvcc: Path, sources: Path) -> None:
    """The kernels' driver compiles, and links with the objects that the build left; only a GPU can run it."""
    (objects,) = (sources / "build").glob("temp*/csrc/cuda")
    program = sources / "kernels_driver_program"
    home = str(nvcc.resolve().parent.parent)
    output_of("the driver's build", "tests/kernels_driver/build.sh", program, objects, cwd=sources, CUDA_HOME=home)
    print(f"{program.name}: {program.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    """All parts in turn; the first that fails ends it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bn_ext"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=cache, help=f"folder for the environment (default {cache})")
    parser.add_argument("--python", type=Path, help="use this Python, with torch and all else, and make no environment")
    options = parser.parse_args()

    seconds: dict[str, float] = {}
    nvcc = required_nvcc()
    with part("environment", seconds):
        python = options.python or make_environment(options.cache)
    with tempfile.TemporaryDirectory(prefix="bn_ext-cuda-") as folder:
        sources = Path(folder, "bn_ext")
        shutil.copytree(ROOT, sources, ignore=NOT_SOURCES)
        with part("kernels: registers and local memory", seconds):
            check_kernels(nvcc, sources)
        with part("benchmarks/device_limits", seconds):
            check_device_limits(nvcc, sources)
        with part("build", seconds):
            # Insist on CUDA, and take the architectures that a user gets who names none.
            setting = {"BN_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ""}
            command = (python, "setup.py", "--quiet", "build_ext", "--inplace")
            text = output_of("the build", *command, cwd=sources, **setting)
            print(*re.findall(r"^bn_ext: .*", text, re.MULTILINE), sep="\n")
        with part("build_info and a call on the CPU", seconds):
            check_build_info(python, sources)
        with part("machine code", seconds):
            check_machine_code(python, sources)
        with part("kernels' driver", seconds):
            check_driver(nvcc, sources)
        with part("tests on the CPU, with this build", seconds):
            # tests/cuda_on_cpu compiles the kernels without torch, so one run of it with any torch is enough.
            tests = ("-m", "pytest", "-q", "--device=cpu", "--ignore=tests/cuda_on_cpu", "-p", "no:cacheprovider")
            run("the test suite", python, *tests, cwd=sources)
    print("\n== all passed: " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))


if __name__ == "__main__":
    main()
