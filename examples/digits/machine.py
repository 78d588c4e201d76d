"""Where the demo runs and writes: checks before any training, and the words for the report."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import bn_ext

NEEDED_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}  # import name: pip name


class SetupError(Exception):
    """Something is missing that the demo needs; the message is one sentence for the user."""


def check_packages() -> None:
    """Raise SetupError unless bn_ext is built and the packages are there that only the demo needs."""
    info = bn_ext.build_info()
    if not info.loaded:
        raise SetupError(f"{info.reason}.")
    missing = [pip for name, pip in NEEDED_PACKAGES.items() if not importlib.util.find_spec(name)]
    if missing:
        names = " ".join(missing)
        raise SetupError(f"The demo needs more packages: pip install {names}.")


def prepare_folder(folder: Path) -> None:
    """Create the folder for the plots; raise SetupError where no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SetupError(f"Cannot write plots to {folder}: {error.strerror}.") from error


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`, or the best one: CUDA where torch and bn_ext both have it.

    Raises SetupError for a name that is no device of this machine, or none of bn_ext's.
    """
    has_kernels = bn_ext.build_info().cuda
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and has_kernels else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SetupError(f"Unknown device '{name}': choose cpu, cuda or cuda:<index>.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise SetupError(f"No device '{name}': torch finds {count} CUDA devices here.")
        if not has_kernels:
            raise SetupError(f"Cannot use '{name}': bn_ext was built without CUDA kernels.")
    return device


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch and bn_ext use `count` threads on the CPU meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(device: torch.device) -> list[tuple[str, str]]:
    """Return what the results depend on, as (what, value)."""
    info = bn_ext.build_info()
    kernels = "CPU and CUDA" if info.cuda else "CPU"
    return [
        ("device", f"{device}, {_device_name(device)}"),
        ("threads", str(torch.get_num_threads())),
        ("torch", torch.__version__),
        ("bn_ext", f"{info.version}, kernels for {kernels}, {info.instruction_set}"),
        ("python", f"{platform.python_version()}, {platform.system()}"),
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
