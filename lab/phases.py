"""The times that a build with BN_EXT_PHASE_CLOCK notes: csrc/cuda/phase_clock.h."""

import ctypes
import itertools
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from types import ModuleType

from .plan import ROOT

PHASES = ("start", "fetch issued", "fetched", "summed", "first barrier", "coefficients", "gathered", "written")
BLOCKS, SLICES = 4, 4
CALLS = 50  # whose medians are taken: %globaltimer may tick more slowly than a nanosecond
FOLDER = ROOT / "build" / "phase_clock"
MAKE = "BN_EXT_CUDA=1 BN_EXT_PHASE_CLOCK=1 python setup.py build --build-base build/phase_clock"
Times = list[list[list[int]]]  # of a block, a slice, a phase


def find_package(folder: Path = FOLDER) -> Path | None:
    """The folder with the bn_ext that has the clock."""
    configs = sorted(folder.glob("lib*/bn_ext/_build_config.py"))
    return next((path.parents[1] for path in configs if "PHASE_CLOCK = True" in path.read_text()), None)


def library_of(package: ModuleType) -> ctypes.CDLL:
    """The extension of a package that is imported."""
    (path,) = Path(str(package.__file__)).parent.glob("_C*.so")
    return ctypes.CDLL(str(path))


class Reader:
    """Reads and clears what the kernels have noted."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def clear(self) -> None:
        """Forget what earlier calls have noted."""
        self._checked(self.library.bn_ext_clear_phase_times())

    def read(self) -> Times:
        """All times, in nanoseconds; 0 where a block has not come to that phase."""
        found = (ctypes.c_uint64 * (BLOCKS * SLICES * len(PHASES)))()
        self._checked(self.library.bn_ext_read_phase_times(found))
        rows = [list(found[i : i + len(PHASES)]) for i in range(0, len(found), len(PHASES))]
        return [rows[i : i + SLICES] for i in range(0, len(rows), SLICES)]

    @staticmethod
    def _checked(error: int) -> None:
        if error != 0:
            raise RuntimeError(f"the phase clock could not be read: CUDA's error {error}")


def steps(noted: Iterable[Times]) -> dict[str, float]:
    """Microseconds from phase to phase, from sums to coefficients, and of a slice; nothing where no time is noted."""
    slices = [phases for times in noted for block in times for phases in block if all(phases)]
    if not slices:
        return {}
    spans = [*itertools.pairwise(PHASES), ("summed", "gathered"), ("start", "written")]
    pairs = {f"{a} -> {b}": (PHASES.index(a), PHASES.index(b)) for a, b in spans}
    return {name: median(of[b] - of[a] for of in slices) / 1e3 for name, (a, b) in pairs.items()}
