"""Make the environment .venv for the Makefile's targets, with torch, the requested extras and bn_ext built.

A torch that this Python can already import is used and not replaced, unless --torch names a requirement, now or when
the environment was made. Torch and kernels are chosen for this machine: without a GPU, torch's CPU build if pip's index
has one, and no CUDA kernels; with a GPU, kernels for that GPU only.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 (users of an older Python get here)
    sys.exit(f"make_env: needs Python 3.10 or newer, got {sys.version.split()[0]}; set PYTHON to a newer one")
from progress import Steps

ROOT = Path(__file__).resolve().parent.parent
BUILD_REQUIREMENTS = ["setuptools>=77", "wheel", "ninja", "pybind11"]
OLDEST_TORCH = (2, 11)
MARKER = "made_by_make"  # a file in each environment
# Prints the compute capabilities of this machine's GPUs and the architectures that torch was compiled for.
CAPABILITIES = """
import json, torch
gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
print(json.dumps([gpus, torch.cuda.get_arch_list()]))
"""


def say(words: str) -> None:
    """Print a decision and its reason."""
    print(f"make_env: {words}", flush=True)


def run(steps: Steps, words: str, python: Path, *arguments: str, **environment: str) -> None:
    """Run a step of the environment's Python in the source folder; stop with its status if it fails."""
    # torch searches PATH for ninja, which is next to that Python; without ninja, files are compiled one by one.
    path = os.pathsep.join([str(python.parent.absolute()), os.environ.get("PATH", "")])
    status = steps.run(words, [python, *arguments], ROOT, {"PATH": path, **environment})
    if status != 0:
        sys.exit(f"make_env: '{words}' failed with status {status}, see above; docs/install.md lists known causes")


def has_gpu() -> bool:
    """Whether the driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return result.returncode == 0 and "GPU " in result.stdout


def importable_torch() -> Path | None:
    """Return the package folder from which this Python imports torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent.parent


def newest_cpu_build(listing: str) -> str | None:
    """Return the newest version with the label +cpu in the output of `pip index versions torch`."""
    found = re.findall(r"(\d+)\.(\d+)\.(\d+)\+cpu", listing)
    newest = max((tuple(map(int, version)) for version in found), default=(0, 0, 0))
    return "{}.{}.{}+cpu".format(*newest) if newest >= OLDEST_TORCH else None


def choose_torch(python: Path) -> str:
    """Return the requirement to install if no torch can be imported and none is named."""
    wants_cuda = os.environ.get("BN_EXT_CUDA") == "1" or bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    if not has_gpu() and not wants_cuda:
        command = [python, "-m", "pip", "index", "versions", "torch"]
        listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        version = newest_cpu_build(listing)
        if version is not None:
            say(f"no GPU here, so torch {version}, which has no CUDA, is installed (TORCH=torch==... installs another)")
            return f"torch=={version}"
        say(
            "no GPU here, but pip's index lists no CPU build of torch: the newest is installed, which has CUDA and "
            "takes several GB (PIP_EXTRA_INDEX_URL adds an index that has one, TORCH=torch==... installs another torch)"
        )
    else:
        say("the newest torch is installed (TORCH=torch==... installs another)")
    return f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"


def architectures(gpus: list[tuple[int, int]], of_torch: list[str]) -> str:
    """Return the architectures to compile for: for each GPU, the newest of torch's architectures whose code it runs.

    Returns "" if a GPU runs none of them. The toolkit knows all of torch's architectures.
    """
    listed = [(int(major), int(minor)) for major, minor in re.findall(r"\bsm_(\d+)(\d)\b", " ".join(of_torch))]
    chosen = set()
    for major, minor in gpus:
        fitting = [capability for capability in listed if capability[0] == major and capability[1] <= minor]
        if not fitting:
            return ""
        chosen.add(max(fitting))
    return ";".join(f"{major}.{minor}" for major, minor in sorted(chosen))


def build_settings(python: Path) -> dict[str, str]:
    """Return which CUDA kernels to build: those of the user's variables, else those that this machine can run."""
    names = ("BN_EXT_CUDA", "TORCH_CUDA_ARCH_LIST")
    settings = {name: os.environ[name] for name in names if os.environ.get(name)}
    if settings:
        return settings
    if not has_gpu():
        say("no GPU here, so the CUDA kernels are not built (BN_EXT_CUDA=1 builds them, with a torch for CUDA)")
        return {"BN_EXT_CUDA": "0"}
    result = subprocess.run([python, "-c", CAPABILITIES], capture_output=True, text=True, check=False)
    gpus, of_torch = json.loads(result.stdout) if result.returncode == 0 else ([], [])
    if not gpus:
        return {}  # setup.py prints why there are no kernels
    chosen = architectures(gpus, of_torch)
    if not chosen:
        found = ", ".join(f"{major}.{minor}" for major, minor in gpus)
        say(f"this torch has no code for a GPU of compute capability {found}: CUDA kernels are built for 8.0 and 9.0")
        return {}
    say(f"CUDA kernels are built for this machine's GPU only, {chosen} (TORCH_CUDA_ARCH_LIST selects others)")
    return {"TORCH_CUDA_ARCH_LIST": chosen}


def clear(folder: Path) -> None:
    """Empty and mark a folder that make made; stop if something else made it."""
    if folder.exists():
        entries = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
        if entries and not {MARKER, "made_for.json", "made_for.txt"} & set(
            entries
        ):  # older environments have only a note
            sys.exit(f"make_env: {folder} was not made by make: remove it, or set VENV to another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def create(folder: Path, shared_packages: Path | None) -> Path:
    """Create an environment that also sees the packages in `shared_packages`; return its Python."""
    clear(folder)
    try:
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"make_env: this Python has no pip for a new environment ({error}): install Debian's python3-venv")
    python = folder / "bin" / "python"
    if shared_packages is not None:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        Path(site, "shared_packages.pth").write_text(f"{shared_packages}\n")
    return python


PIP = ("-m", "pip", "install", "--disable-pip-version-check")


def requirements_of(*extras: str) -> list[str]:
    """Return the requirements of these extras in pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    found = [re.search(rf"^{extra} = (\[.*\])$", project, re.MULTILINE) for extra in extras]
    return [requirement for match in found if match for requirement in json.loads(match[1])]  # 3.10 has no tomllib


def make(folder: Path, torch: str) -> dict[str, str]:
    """Make an environment with torch and bn_ext built; return the settings of the build."""
    shared = None if torch else importable_torch()
    steps = Steps(3 if shared is None else 2)
    if shared is not None:
        say(f"the torch in {shared} is used (TORCH=torch==... installs another)")
    say(f"a new environment is made in {folder}")
    python = create(folder, shared)
    run(steps, "install the build tools", python, *PIP, *BUILD_REQUIREMENTS)
    if shared is None:
        requirement = torch or choose_torch(python)
        run(steps, f"install {requirement}", python, *PIP, requirement)
    settings = build_settings(python)
    editable = ["--no-build-isolation", "--verbose", "--editable", "."]
    run(steps, "compile and install bn_ext", python, *PIP, *editable, **settings)
    return settings


def sources() -> list[Path]:
    """Return the files that the extension is built from."""
    return [ROOT / "setup.py", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]


def state_of_sources() -> str:
    """Return a digest of names and contents: copied or renamed files may be older than the build."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def compile_again(python: Path, settings: dict[str, str], built: float) -> None:
    """Compile the files that are newer than `built`; all files if none is, as after a copy or a renaming."""
    if max(path.stat().st_mtime for path in sources()) <= built:
        for folder in (ROOT / "build").glob("temp*"):
            shutil.rmtree(folder)
    run(Steps(1), "compile bn_ext", python, "setup.py", "build_ext", "--inplace", "--force", **settings)


class Note:
    """A file in the environment that records how it was made."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "made_for.json"
        try:
            made = json.loads(self.path.read_text())
        except (OSError, ValueError):  # not made, or not completely
            made = {}
        self.torch: str = made.get("torch", "")
        self.project: str = made.get("project", "")
        self.settings: dict[str, str] = made.get("settings", {})
        self.extras: list[str] = made.get("extras", [])
        self.sources: str = made.get("sources", "")
        self.built: float = made.get("built", 0.0)

    def write(self) -> None:
        """Write atomically, so that the file is always complete."""
        values = {name: value for name, value in vars(self).items() if name != "path"}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(values))
        new.replace(self.path)


def main() -> None:
    """Create, install and build, each only if it is missing or out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", default="", help="requirement to install, such as torch==2.13.0")
    parser.add_argument("--extras", nargs="+", default=["test", "demo", "lint"], help="extras of pyproject.toml")
    options = parser.parse_args()

    folder = options.folder.absolute()
    python = folder / "bin" / "python"
    note = Note(folder)
    project = (ROOT / "pyproject.toml").read_text()
    torch = options.torch or note.torch
    begin, state = time.time(), state_of_sources()  # now, because they may change during compilation
    if (note.project, note.torch) != (project, torch):
        note.path.unlink(missing_ok=True)  # the folder keeps its mark
        note.settings = make(folder, torch)
        note.torch, note.project, note.extras, note.sources, note.built = torch, project, [], state, begin
        note.write()
        run(Steps(1), "python -m bn_ext", python, "-m", "bn_ext")
    else:
        settings = build_settings(python)
        if (note.settings, note.sources) != (settings, state):
            compile_again(python, settings, note.built)
            note.settings, note.sources, note.built = settings, state, begin
            note.write()
    missing = [extra for extra in options.extras if extra not in note.extras]
    if missing:
        words = f"install the requirements of {' and '.join(missing)}"
        run(Steps(1), words, python, *PIP, *requirements_of(*missing))
        note.extras += missing
        note.write()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("make_env: interrupted; the next make continues")
