"""Make the environment that the Makefile's targets run in: .venv, with torch, what is asked for, and bn_ext built.

A torch that this Python can already import is used and not replaced, unless a requirement is named with --torch, now or
when the environment was made before.
"""

import argparse
import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_REQUIREMENTS = ["setuptools>=77", "wheel", "ninja", "pybind11"]


def run(*command: str | Path) -> None:
    """Run a command in the source folder; stop with its status if it fails."""
    print("+", *command, flush=True)
    status = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if status != 0:
        sys.exit(f"make_env: that command failed with status {status}; docs/install.md lists known causes")


def importable_torch() -> Path | None:
    """The folder of packages from which this Python imports torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent.parent


def create(folder: Path, shared_packages: Path | None) -> Path:
    """A fresh environment, which also sees the packages in `shared_packages`; returns its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    if shared_packages is not None:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        Path(site, "shared_packages.pth").write_text(f"{shared_packages}\n")
    return python


def make(folder: Path, torch: str) -> Path:
    """A fresh environment with everything installed and bn_ext built in it; returns its Python."""
    shared = None if torch else importable_torch()
    if shared is not None:
        print(f"make_env: using the torch in {shared} (name another with TORCH=...)", flush=True)
    python = create(folder, shared)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *BUILD_REQUIREMENTS)
    if shared is None:
        run(*pip, torch or "torch>=2.11")
    run(*pip, "--no-build-isolation", "--editable", ".[test,demo,lint]")
    return python


def newest_source() -> float:
    """When a file that the extension is built from was last changed."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return max(path.stat().st_mtime for path in sources)


def main() -> None:
    """Create, install and build, each only where it is missing or out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", default="", help="requirement to install, as torch==2.13.0; overrides a torch found")
    options = parser.parse_args()

    # What the environment was made for; the file's time is that of the last build.
    made_for = options.folder / "made_for.txt"
    old_torch, _, old_project = made_for.read_text().partition("\n") if made_for.exists() else ("", "", "")
    project = (ROOT / "pyproject.toml").read_text()
    torch = options.torch or old_torch
    if (torch, project) != (old_torch, old_project):
        python = make(options.folder, torch)
        run(python, "-m", "bn_ext")
        made_for.write_text(f"{torch}\n{project}")
    elif made_for.stat().st_mtime < newest_source():
        run(options.folder / "bin" / "python", "setup.py", "--quiet", "build_ext", "--inplace")
        made_for.touch()


if __name__ == "__main__":
    main()
