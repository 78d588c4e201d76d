"""Keep the page faults of large CPU tensors out of the times, and tell how many are left.

glibc maps every block above 32 MiB anew and gives it back when it is freed, so each call that
returns a large tensor pays a page fault per 4 KiB, which can cost more than the operation itself.
KEEP makes glibc take large blocks from the heap and never shrink it; grow_heap() then touches the
heap's pages once. glibc reads the variables at start-up, so they have to be in the environment
before Python starts: `python -m benchmarks` sees to it.
"""

import os
import resource

import torch

# Not by a higher MALLOC_MMAP_THRESHOLD_: older glibc refuses thresholds above 32 MiB.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
PROBE_BYTES = 64 << 20


def page_faults() -> int:
    """Count the pages that this process had to be given so far (minor faults, all threads)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def grow_heap(size_in_bytes: int) -> None:
    """Touch that much memory and free it again; with KEEP it stays with the process."""
    torch.ones(size_in_bytes, dtype=torch.uint8)


def faults_per_probe() -> int:
    """Count the page faults of writing a new 64 MiB tensor, after one of that size was freed."""
    grow_heap(PROBE_BYTES)
    before = page_faults()
    grow_heap(PROBE_BYTES)
    return page_faults() - before


def mode(device: torch.device) -> str:
    """Name the allocator of `device`: "heap kept", "default" or "cuda caching"."""
    if device.type == "cuda":
        return "cuda caching"
    return "heap kept" if all(os.environ.get(name) == value for name, value in KEEP.items()) else "default"
