"""Check the machine code of each kernel in an extension: registers, local memory, first wait, issue slots."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from commands import ROOT, fail, output_of
from slots_check import check_slots

ARCHITECTURES = ("80", "90")  # the default of setup.py, which adds PTX of the last
# In machine code: the wait for earlier kernels (griddepcontrol.wait), and instructions that may access global memory.
WAIT = "ACQBULK"
ACCESSES = re.compile(
    r"^(CALL|LD|LDG|LDGSTS|LDGMC|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED|UBLKPF|UTMA\w+|TEX|TLD|SULD|SUST|CCTL)$"
)


class Kernel(NamedTuple):
    """A kernel's resource usage on one architecture, as cuobjdump reports it."""

    name: str
    architecture: str
    registers: int
    local: int  # bytes per thread: the stack and spilled registers


def kernels_of(cuobjdump: Path, extension: Path) -> list[Kernel]:
    """Return the resource usage of every kernel in the extension."""
    kernels = []
    for text in output_of("cuobjdump", cuobjdump, "-res-usage", extension).split("\narch = sm_")[1:]:
        found = re.findall(r"^ Function (\S+):\n +REG:(\d+) STACK:(\d+) .*\bLOCAL:(\d+) ", text, re.MULTILINE)
        if len(found) != text.count(" Function "):
            fail(
                "the output of cuobjdump -res-usage has an unknown format: adapt kernels_of in scripts/kernels_check.py"
            )
        architecture = text.split(maxsplit=1)[0]
        kernels += [Kernel(name, architecture, int(r), int(stack) + int(local)) for name, r, stack, local in found]
    return kernels


def readable(names: list[str]) -> list[str]:
    """Return demangled kernel names without namespaces and parameters."""
    if shutil.which("c++filt"):
        names = output_of("c++filt", "c++filt", *names).splitlines()
    return [
        re.sub(r"^void |\((int|bool|bn_ext::cuda::Variant)\)|bn_ext::cuda::|\(anonymous namespace\)::|\(.*$", "", n)
        for n in names
    ]


def check_kernels(cuobjdump: Path, extension: Path) -> None:
    """Check that no kernel spills registers, uses local memory or accesses memory too early; print their registers."""
    kernels = kernels_of(cuobjdump, extension)
    names = sorted({kernel.name for kernel in kernels})
    titles = dict(zip(names, readable(names), strict=True))
    registers = {(kernel.name, kernel.architecture): str(kernel.registers) for kernel in kernels}
    print(f"registers of {len(names)} kernels" + "".join(f"  sm_{name}" for name in ARCHITECTURES))
    for name, title in sorted(titles.items(), key=lambda pair: pair[1]):
        print(f"{title:<60}" + "".join(f"{registers.get((name, sm), '-'):>7}" for sm in ARCHITECTURES))
    for kernel in kernels:
        if kernel.local:
            fail(
                f"{titles[kernel.name]} must not use local memory, got {kernel.local} bytes of it on "
                f"sm_{kernel.architecture}"
            )
    if not kernels or set(registers) != {(name, sm) for name in names for sm in ARCHITECTURES}:
        fail("every kernel must exist for every architecture, but the table above lacks some")
    check_listed({(titles[k.name].split("<")[0], k.architecture, k.registers) for k in kernels})
    check_inlined(cuobjdump, extension, set(names))
    machine_code = output_of("cuobjdump", cuobjdump, "-sass", "-arch", "sm_90", extension)
    if "GLOBALTIMER" in machine_code:
        fail("a release must not contain the phase clock of lab/, but a kernel reads %globaltimer on sm_90")
    check_waits(machine_code, titles)
    check_slots(machine_code, titles)


def check_inlined(cuobjdump: Path, extension: Path, kernels: set[str]) -> None:
    """Check that all functions but the compiler's own are inlined: check_waits only reads the code of kernels."""
    lines = output_of("cuobjdump", cuobjdump, "-symbols", extension).splitlines()
    functions = {line.split()[-1] for line in lines if line.startswith("STT_FUNC")}
    if not kernels <= functions:
        fail("cuobjdump -symbols and -res-usage list different kernels: has their format changed?")
    for name in sorted(functions - kernels):
        if not name.rpartition("$")[2].startswith("__cuda_"):
            fail(f"{readable([name])[0]} was not inlined: declare it __forceinline__")


def check_listed(registers: set[tuple[str, str, int]]) -> None:
    """Check the registers of each (name, architecture, registers) against the maximum in csrc/README.md."""
    row = re.compile(r"^\| `(\w+_kernel)` \| (?:\d+ to )?(\d+) \| (?:\d+ to )?(\d+) \|", re.MULTILINE)
    listed = {}
    for name, of_90, of_80 in row.findall((ROOT / "csrc" / "README.md").read_text()):
        listed |= {(name, "90"): int(of_90), (name, "80"): int(of_80)}
    for name, architecture, found in sorted(registers):
        limit = listed.get((name, architecture), 0)
        if found > limit:
            fail(f"{name} has {found} registers on sm_{architecture}, csrc/README.md lists at most {limit}: correct it")


def check_waits(machine_code: str, titles: dict[str, str]) -> None:
    """A kernel that may be launched with PDL waits before its first access to global memory.

    The compiler may move a load by ``__ldg`` ahead of the wait, because it assumes that nobody writes the memory.
    """
    found = first_accesses(machine_code)
    if set(found) != set(titles):
        fail("cuobjdump -sass and -res-usage list different kernels: has their format changed?")
    for name, instruction in sorted(found.items()):
        if instruction != WAIT:
            fail(f"{titles[name]} must begin with {WAIT}, but {instruction} comes first on sm_90")
    print(f"{len(found)} kernels wait for earlier kernels before they access memory")


def first_accesses(text: str) -> dict[str, str]:
    """Return each kernel's first instruction in ``cuobjdump -sass`` that waits or may access global memory."""
    found = {}
    for kernel in text.split("Function : ")[1:]:
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/ +(@!?U?P\w+ +)?(\w+)", kernel)
        found[kernel.split(maxsplit=1)[0]] = next(
            (predicate + name for predicate, name in instructions if name == WAIT or ACCESSES.match(name)),
            "no such instruction",
        )
    return found
