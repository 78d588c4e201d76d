"""Compiles CUDA sources and the harness with g++ into a shared library, once for each state of the inputs."""

import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build" / "cuda_on_cpu"
HARNESS = [
    HERE / f"{name}.cpp"
    for name in ("c_api", "copies", "fibre", "launch", "memory", "ordering", "scheduler", "synchronisation")
]
JOBS = 2
OLDEST_GCC = 11  # the first whose own choice of C++ is 17 or newer
MISSING = f"kernels are run on the CPU by g++ {OLDEST_GCC} or newer, which is not installed (CXX names another one)"

# Kernels look at memory through other types than it was written with, as CUDA allows. Without -fno-gnu-unique two
# loaded variants of one library would share the static variables of their templates.
FLAGS = ["-g", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unused-parameter", "-Wno-unknown-pragmas", f"-I{HERE / 'include'}"]
VARIANTS = {
    # The sanitizers' checks themselves set off warnings, so errors are the plain variant's.
    "plain": (["-O1", "-Werror"], ["-Wl,-z,defs"]),
    "sanitized": (
        ["-O0", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-fsanitize=address,undefined"],
    ),
}


class BuildError(RuntimeError):
    """The compiler's words."""


def compiler() -> list[str] | None:
    """The command $CXX or g++, if there is one that is GCC and new enough."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    version = re.search(r"gcc version (\d+)", _version(*command)) if shutil.which(command[0]) else None
    return command if version and int(version[1]) >= OLDEST_GCC else None


def library(
    sources: Sequence[Path],
    variant: str = "plain",
    defines: Iterable[str] = (),
    defined: Container[Path] | None = None,
) -> Path:
    """The shared library of these sources and the harness.

    ``defines`` are given to the sources only ("FAULT=1"), or to those of them that are in ``defined``. What was built
    before from the same inputs (source, its headers, flags, compiler) is found again, object by object.
    """
    return _linked(sources, variant, defines, ["-shared"], ".so", defined)


def program(sources: Sequence[Path]) -> Path:
    """The same as a program, for sources of which one has a main; functions are at the addresses that nm tells."""
    return _linked(sources, "plain", (), ["-no-pie"], "")


def _linked(
    sources: Sequence[Path],
    variant: str,
    defines: Iterable[str],
    kind: list[str],
    suffix: str,
    defined: Container[Path] | None = None,
) -> Path:
    compile_flags, link_flags = VARIANTS[variant]
    own = FLAGS + compile_flags
    more = [f"-D{name}" for name in defines]
    jobs = [(source, own) for source in HARNESS]
    jobs += [(Path(s), own + (more if defined is None or s in defined else [])) for s in sources]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    target = FOLDER / f"{_key(*(o.name for o in objects), *kind, *link_flags)}{suffix}"
    return _made(target, [*objects, *kind, *link_flags])


def included(file: Path, seen: set[Path]) -> Iterator[tuple[Path, str]]:
    """Every include of a file and of the project's headers that it includes, with the file that it stands in.

    These files are added to ``seen``.
    """
    seen.add(file)
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE):
        yield file, name
        for folder in (file.parent, HERE / "include"):
            header = (folder / name).resolve()
            if header.exists() and header not in seen:
                yield from included(header, seen)


def sanitizer_environment() -> dict[str, str]:
    """What a Python that loads a sanitized library must be started with."""
    # libstdc++ too: AddressSanitizer looks for its __cxa_throw when it starts, and Python has not loaded it.
    names = ("libasan.so", "libstdc++.so")
    paths = [_run([f"-print-file-name={name}"]).strip() for name in names]
    return {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}


def _object(source: Path, flags: list[str]) -> Path:
    key = _key(str(source), source.read_bytes(), _headers(source), *flags)
    return _made(FOLDER / f"{source.stem}-{key}.o", [*flags, "-c", "-x", "c++", source])


def _made(target: Path, arguments: list[str | Path]) -> Path:
    """The file at target, made by the compiler if it is not there; one process makes it, others wait for that."""
    if target.exists():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{target.name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = Path(folder) / target.name
            _run([*arguments, "-o", made])
            made.replace(target)
    return target


def _run(arguments: Sequence[str | Path]) -> str:
    command = [*_required_compiler(), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout


def _required_compiler() -> list[str]:
    command = compiler()
    if command is None:
        raise BuildError(MISSING)
    return command


@functools.cache
def _version(*command: str) -> str:
    result = subprocess.run([*command, "-v"], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def _headers(source: Path) -> str:
    """One digest of all headers that a source includes."""
    files: set[Path] = set()
    for _ in included(source, files):
        pass
    return _key(*(part for file in sorted(files) for part in (str(file), file.read_bytes())))


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256(_version(*_required_compiler()).encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]
