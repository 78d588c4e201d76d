"""Compiles every kernel alone, and checks what the compiler made of it: registers, local memory, and its first wait."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from commands import ROOT, fail, output_of

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
# In machine code: the wait for the kernels before (griddepcontrol.wait), and what reads or writes global memory.
WAIT = "ACQBULK"
ACCESSES = re.compile(r"^(LD|LDG|LDGSTS|LDGMC|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UTMALDG|UTMASTG|UBLKPF|CCTL)$")


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


def check_kernels(nvcc: Path, cuobjdump: Path | None, sources: Path) -> None:
    """No kernel may spill registers, use local memory, or touch memory too early; prints their registers."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((sources / "csrc" / "cuda").glob("*.cu"))
        kernels = [kernel for file in files for kernel in compile_kernels(nvcc, file, Path(folder))]
        if cuobjdump is None:
            print("NOT CHECKED: that kernels wait first, as there is no cuobjdump in the toolkit or in triton")
        else:
            names_of_90 = {kernel.name for kernel in kernels if kernel.architecture == "90"}
            check_waits(cuobjdump, sorted(Path(folder).glob("*_90.cubin")), names_of_90)
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


def check_waits(cuobjdump: Path, cubins: list[Path], names: set[str]) -> None:
    """A kernel that may start early waits before its first access to global memory.

    The compiler may move a load through ``__ldg`` ahead of the wait: it takes the memory for one that nobody writes.
    """
    found = {}
    for cubin in cubins:
        found |= first_accesses(output_of("cuobjdump", cuobjdump, "-sass", cubin))
    if set(found) != names:
        fail("cuobjdump tells of other kernels than ptxas: has the form of its report changed?")
    for name, instruction in sorted(found.items()):
        if instruction != WAIT:
            fail(f"{readable([name])[0]} must begin with {WAIT}, but {instruction} is before it on sm_90")
    print(f"{len(found)} kernels wait for what is before them, and only then touch memory")


def first_accesses(text: str) -> dict[str, str]:
    """Of each kernel that ``cuobjdump -sass`` lists, the first instruction that waits or touches global memory."""
    found = {}
    for kernel in text.split("Function : ")[1:]:
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(\w+)", kernel)
        found[kernel.split(maxsplit=1)[0]] = next(
            (i for i in instructions if i == WAIT or ACCESSES.match(i)), "nothing of the kind"
        )
    return found
