"""A run's time: how much is left, how long the next group and the next compilation are expected to take."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Until something has been measured.
FIRST_GROUP = 20.0  # s, without what is compiled
FIRST_COMPILATION = 90.0  # s, of one model
LONGEST_COMPILATION = 240.0  # s, then it is broken off


class TimeUpError(BaseException):
    """Passes through code that catches every Exception."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUpError in what runs longer, as soon as Python is at work.

    Only in the main thread, which is the one that gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def time_up(number: int, frame: FrameType | None) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, time_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Seconds to spend, from now on, and what the groups so far have cost."""

    def __init__(self, seconds: float | None, done: list[dict[str, Any]]):
        self.end = math.inf if seconds is None else time.perf_counter() + seconds
        self.done = done  # the JSON's groups; the list grows

    def left(self) -> float:
        """Give the seconds that are left."""
        return self.end - time.perf_counter()

    def group(self) -> float:
        """Expect the longest group so far again, without what was compiled."""
        costs = (group["cost_seconds"] for group in self.done)
        return max((cost["whole"] - sum(cost["compiled"].values()) for cost in costs), default=FIRST_GROUP)

    def compilation(self) -> float:
        """Expect the longest first step of a compiled model so far again."""
        compiled = [seconds for group in self.done for seconds in group["cost_seconds"]["compiled"].values()]
        return max(compiled, default=FIRST_COMPILATION)

    def has_time_for_group(self) -> bool:
        """Tell whether one more group is expected to fit; the very first one has nothing to be judged by."""
        left = self.left()
        return left > 0 and (not self.done or self.group() <= left)

    def compile_limit(self, groups: int) -> float:
        """Give the seconds that compiling one more model may take, 0 if it should not be tried.

        What it takes must leave the time that so many groups are expected to need without it.
        """
        spare = self.left() - groups * self.group()
        return min(spare, LONGEST_COMPILATION) if spare >= self.compilation() else 0.0
