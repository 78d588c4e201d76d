"""A sign of life where a test takes long: which ones run, and for how many seconds."""

import os
import threading
import time
from collections.abc import Callable

import pytest

SECONDS = 8.0  # of silence
COLLECTION = "collecting the tests"


class Heartbeat:
    """A plugin of the process that reports, be it alone or the one that hands tests to workers."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.clock = write, clock
        self.running = {COLLECTION: clock()}
        self.last = clock()
        self.stopped = threading.Event()

    def beat(self) -> None:
        """Write what runs, if nothing was written for so long."""
        now = self.clock()
        running = dict(self.running)
        if running and now - self.last >= SECONDS:
            self.last = now
            self.write(", ".join(f"{name} runs for {now - begin:.0f} s" for name, begin in running.items()))

    def _watch(self) -> None:
        while not self.stopped.wait(1.0):
            self.beat()

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self.stopped.set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.pop(COLLECTION, None)
        self.running[nodeid] = self.clock()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.last = self.clock()


def register(config: pytest.Config) -> None:
    """Add it to the process that has the terminal, past pytest's capture: what is written then is seen then."""
    if hasattr(config, "workerinput"):
        return
    terminal = os.fdopen(os.dup(1), "w")

    def write(line: str) -> None:
        terminal.write(f"\n{line}\n")
        terminal.flush()

    config.pluginmanager.register(Heartbeat(write))
