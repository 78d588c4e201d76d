"""Print the progress of commands: the step, the number of steps, the time, and the last line of output."""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

INTERVAL = 5.0  # seconds between two lines of progress


def summary_of(line: str) -> str:
    """Shorten a line of pip's or ninja's output."""
    compiled = re.match(r"\[(\d+)/(\d+)\] (.*)", line.strip())
    if compiled:
        source = re.search(r"(\S+\.(?:cpp|cu))(?=\s)", compiled[3])
        return f"file {compiled[1]} of {compiled[2]}" + (f", {Path(source[1]).name}" if source else "")
    words = " ".join(line.split())
    return words if words.startswith("bn_ext: ") or ": warning: " in words else words[:80]


class Steps:
    """Runs a number of commands and prints their progress."""

    def __init__(self, count: int) -> None:
        self.count, self.number, self.begin = count, 0, time.monotonic()

    def print(self, words: str) -> None:
        """Print `words` after the step's number and the time since the first step."""
        seconds = int(time.monotonic() - self.begin)
        print(f"[step {self.number} of {self.count}, {seconds // 60}:{seconds % 60:02}] {words}", flush=True)

    def run(self, words: str, command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str]) -> int:
        """Run the next step and return its status; print its output if it fails."""
        self.number += 1
        self.print(words)
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        output: list[str] = []
        try:
            self._follow(lines, output)
            status = process.wait()
        except BaseException:  # Ctrl-C
            process.kill()
            sys.stdout.write("".join(output))
            raise
        if status != 0:
            sys.stdout.write("".join(output))
        return status

    def _follow(self, lines: "queue.SimpleQueue[str | None]", output: list[str]) -> None:
        """Collect all lines; print the newest every few seconds, and warnings and setup.py's messages at once."""
        printed = time.monotonic()
        while True:
            try:
                line = lines.get(timeout=max(0.0, printed + INTERVAL - time.monotonic()))
            except queue.Empty:
                self.print("  " + (summary_of(output[-1]) if output else "..."))
                printed = time.monotonic()
                continue
            if line is None:
                return
            output.append(line)
            is_news = line.strip().startswith("bn_ext: ") or ": warning: " in line
            if is_news or time.monotonic() >= printed + INTERVAL:
                self.print("  " + summary_of(line))
                printed = time.monotonic()
