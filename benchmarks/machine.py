"""The machine a run is made on: its device, a name for it, and the speed of a plain copy."""

import datetime
import platform
import re
from pathlib import Path
from typing import Any

import torch

import bn_ext

from . import allocator, origin
from .measure import Wall

COPY_ROUNDS = 15
RESULTS = Path(__file__).parent / "results"


def best_device() -> torch.device:
    """Choose the GPU if torch sees one and bn_ext was built for it, else the CPU."""
    if torch.cuda.is_available() and bn_ext.build_info().cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Give the maker's name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def device_slug(device: torch.device, threads: int | None = None) -> str:
    """Make a folder name for results: cpu-<model>-2-threads, by torch's number unless one is given; h200 of a GPU."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b", " ", device_name(device), flags=re.IGNORECASE)
    if device.type == "cuda":
        words = name.replace("NVIDIA", "")
    else:
        words = f"{device.type} {name} {threads or torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """Collect what the figures of a run depend on."""
    build = bn_ext.build_info()
    gpu = {"cuda": torch.version.cuda, "driver": origin.driver()} if device.type == "cuda" else {}
    return gpu | {
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bn_ext": build.version,
        "sources": origin.sources(),
        "instruction_set": build.instruction_set,
        "allocator": allocator.mode(device),
    }


def last_level_cache_bytes(device: torch.device) -> int:
    """Give the size of a GPU's L2 or of the first core's largest cache; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def copy_gb_per_s(device: torch.device) -> float:
    """Time copy_ between tensors too large for any cache: bytes read + written per second, best of some rounds."""
    size = max(256 << 20, 4 * last_level_cache_bytes(device))
    source = torch.randn(size // 4, device=device)
    target = torch.zeros(size // 4, device=device)
    wall = Wall([lambda: target.copy_(source)], device)
    repeats = 20 if device.type == "cuda" else 1  # beside which a launch is nothing
    wall.round(repeats)
    return 2 * size / min(wall.round(repeats) for _ in range(COPY_ROUNDS)) / 1e9
