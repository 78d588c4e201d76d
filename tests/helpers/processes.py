"""Several processes that work together: they run functions of the tests by name, and send back results or errors."""

import faulthandler
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

COLLECTIVE = timedelta(seconds=60)
"""After which a process gives up waiting for the others."""

LIMIT = 120.0
"""Seconds after which a job is taken to hang."""

STARTS = 120.0
"""Seconds that processes may take to start."""


class Workers:
    """Processes in one gloo group, on this machine alone: started at the first job, and anew after one that failed.

    A job is a function at the top of a file that can be imported, called with its process's rank and the arguments.
    One that hangs is ended with its process, which leaves word of where it was.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self._folder, self._count, self._starts = folder, count, 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._known: dict[Any, list[Any]] = {}

    def run(self, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """What the function returns in each process, by rank.

        Raises:
            RuntimeError: It failed in one at least: the errors of all that failed, with their tracebacks.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((function, args, limit)))
        answers: dict[int, tuple[bool, Any]] = {}
        patience = STARTS + limit
        while len(answers) < self._count:
            ready = wait([c for rank, c in enumerate(self._connections) if rank not in answers], patience)
            for rank, connection in enumerate(self._connections):
                if connection in ready:
                    answers[rank] = self._answer(rank)
            if not ready:
                break
            if not all(succeeded for succeeded, _ in answers.values()):
                patience = 2.0  # the others fail too, or wait for this one
        unanswered = (False, "no answer: ended, because it waited for another, or time was up")
        results = [answers.get(rank, unanswered) for rank in range(self._count)]
        if all(succeeded for succeeded, _ in results):
            return [result for _, result in results]
        self.stop(by_force=True)
        errors = [f"process {rank}: {error}" for rank, (succeeded, error) in enumerate(results) if not succeeded]
        raise RuntimeError(f"{function.__name__}{args} failed in {self._count} processes\n" + "\n".join(errors))

    def run_once(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The same, or what came of it the first time."""
        if (function, args) not in self._known:
            self._known[function, args] = self.run(function, *args)
        return self._known[function, args]

    def stop(self, by_force: bool = False) -> None:
        """End the processes."""
        for process in self._processes if by_force else ():
            process.kill()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=20)
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        self._starts += 1
        context = multiprocessing.get_context("spawn")
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            arguments = (rank, self._count, self._folder / f"store{self._starts}", self._words(rank), theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _words(self, rank: int) -> Path:
        return self._folder / f"words{self._starts}.{rank}"

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(timeout=20)
            words = self._words(rank)
            last = words.read_text() if words.exists() else ""
            return False, f"ended with exit status {self._processes[rank].exitcode}\n{last}"
        return answer


def _work(rank: int, count: int, store: Path, words: Path, connection: Connection) -> None:
    """What a process does: one job after another, until the other end is closed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with words.open("w") as file:
        faulthandler.enable(file)
        while True:
            try:
                job = connection.recv_bytes()
            except (EOFError, ConnectionError):
                break
            try:
                if not distributed.is_initialized():
                    distributed.init_process_group("gloo", f"file://{store}", COLLECTIVE, count, rank)
                function, args, limit = pickle.loads(job)
                faulthandler.dump_traceback_later(limit, exit=True, file=file)
                torch.manual_seed(0)
                answer = pickle.dumps((True, function(rank, *args)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            finally:
                faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(answer)
        if distributed.is_initialized():
            distributed.destroy_process_group()
