"""Rows on their way to the tile of csrc/cuda/tile.cuh while others are awaited, told from how many there are."""

GROUPS = 8
"""Tile's kGroups."""


def stages(rows: int, kept: int, group_rows: int) -> list[int]:
    """Rows of each of a thread's stages: one and none if all are kept; otherwise two for each `kept` rows."""
    if rows <= kept:
        return [rows, 0]
    part = -(-(kept // 2) // group_rows) * group_rows
    of_two = [(rows - 1) % kept + 1, *[kept] * ((rows - 1) // kept)]
    return [n for both in of_two for n in (min(both, part), max(0, both - part))]


def awaited_later(rows: int, kept: int, group_rows: int, goes_back: bool = True) -> int:
    """Rows of a thread that are on their way still after a wait for others, added up over its waits."""
    sizes = stages(rows, kept, group_rows)
    groups: list[int] = []  # of rows, committed
    rest = 0  # rows that are in no group yet
    left_by_waits = 0

    def commit(more: int) -> None:
        nonlocal rest
        groups.append(rest + more)
        rest = 0

    def fetch(i: int) -> None:
        nonlocal rest
        left = sizes[i] if i < len(sizes) else 0
        for _ in range(max(GROUPS, left // group_rows)):
            commit(min(left, group_rows))
            left -= min(left, group_rows)
        rest = left

    def wait(groups_left: int) -> None:
        nonlocal left_by_waits
        del groups[: max(0, len(groups) - groups_left)]
        left_by_waits += sum(groups) + rest

    fetch(0)
    fetch(1)
    for i, size in enumerate(sizes):
        for _ in range(0, size, group_rows):
            wait(2 * GROUPS - 1)
            commit(0)
        fetch(i + 2)
    for i in reversed(range(len(sizes) if goes_back else 0)):
        wait(1)
        commit(sizes[i - 2] if i >= 2 else 0)
    return left_by_waits
