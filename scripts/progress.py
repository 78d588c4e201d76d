"""A command's progress: which step of how many, how long it has taken, and its last line while it runs."""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

BEAT = 5.0  # seconds between two signs of life


def summary_of(line: str) -> str:
    """A line of pip's or ninja's output in a few words."""
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

    def say(self, words: str) -> None:
        """Print a line that begins with the step and the time since the first."""
        seconds = int(time.monotonic() - self.begin)
        print(f"[step {self.number} of {self.count}, {seconds // 60}:{seconds % 60:02}] {words}", flush=True)

    def run(self, words: str, command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str]) -> int:
        """Run the next step; its output is shown if it fails. Returns its status."""
        self.number += 1
        self.say(words)
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
        """Collect all lines; print the newest every few seconds, and warnings and decisions of setup.py at once."""
        said = time.monotonic()
        while True:
            try:
                line = lines.get(timeout=max(0.0, said + BEAT - time.monotonic()))
            except queue.Empty:
                self.say("  " + (summary_of(output[-1]) if output else "..."))
                said = time.monotonic()
                continue
            if line is None:
                return
            output.append(line)
            is_news = line.strip().startswith("bn_ext: ") or ": warning: " in line
            if is_news or time.monotonic() >= said + BEAT:
                self.say("  " + summary_of(line))
                said = time.monotonic()
