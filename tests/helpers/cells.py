"""A run of the benchmarks and its cells, made by hand."""

from benchmarks.cells import Cell, Key, Timing

ABOUT = {
    "date": "2000-01-01",
    "device": "cpu",
    "name": "A",
    "threads": 1,
    "torch": "2",
    "bn_ext": "1",
    "sources": "0",
    "instruction_set": "baseline",
    "allocator": "default",
    "quick": True,
}


def cell(key: Key, seconds: dict[str, float], **more: object) -> Cell:
    sides = {name: Timing(each, each, each, each, 11, 1, 0.0) for name, each in seconds.items()}
    return Cell(key, 1_000_000, sides, 4.0, **more)
