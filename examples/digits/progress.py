"""A progress bar on stderr: redrawn in place on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

REDRAW_SECONDS = 0.1
LINE_SECONDS = 5.0
WIDEST_BAR = 40


class Progress:
    """Shows how far a task of `total` steps has come, as a context manager.

    On a terminal the bar is redrawn at most ten times a second. In a file or a pipe (a log of CI)
    there is a line every few seconds, and one when the task ends. `is_timed` adds the elapsed time, which is
    comparable only between tasks that run interleaved.
    """

    def __init__(self, title: str, total: int, is_timed: bool = True, stream: TextIO | None = None) -> None:
        self.title = title
        self.total = total
        self.is_timed = is_timed
        self.done = 0
        self.stream = stream if stream is not None else sys.stderr
        self.redraws = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.started = time.perf_counter()
        self.drawn_at = float("-inf") if self.redraws else self.started

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.redraws:
            self.drawn_at = float("-inf")
            self._draw()
            self.stream.write("\n")
        else:
            self._write_line()
        self.stream.flush()

    def advance(self) -> None:
        """Count one more step as done."""
        self.done += 1
        self._draw()

    def _time(self) -> str:
        return f", {time.perf_counter() - self.started:.1f} s" if self.is_timed else ""

    def _write_line(self) -> None:
        self.stream.write(f"{self.title}: {self.done} of {self.total} steps{self._time()}\n")
        self.stream.flush()

    def _draw(self) -> None:
        now = time.perf_counter()
        if now - self.drawn_at < (REDRAW_SECONDS if self.redraws else LINE_SECONDS):
            return
        self.drawn_at = now
        if not self.redraws:
            self._write_line()
            return
        share = self.done / self.total
        text = f" {self.done}/{self.total} steps{self._time()}"
        columns = shutil.get_terminal_size().columns - 1
        # Wider than the terminal, a line would wrap, and the next redraw would not cover it.
        width = min(WIDEST_BAR, columns - len(self.title) - len(text) - 3)
        bar = f" [{'#' * round(share * width):{width}}]" if width > 0 else ""
        self.stream.write("\r" + f"{self.title}{bar}{text}"[:columns])
        self.stream.flush()
