"""The processes that other tests run in: what comes back from them, and what is told of those that fail or hang."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import Workers
from torch import Tensor, distributed

pytestmark = pytest.mark.processes


def together(rank: int, factor: int) -> tuple[Tensor, int, str, Any]:
    total = torch.tensor(factor * (rank + 1))
    distributed.all_reduce(total)
    return total, torch.get_num_threads(), distributed.get_backend(), torch.rand(1).item()


def fails(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("only here")
    distributed.barrier()


def hangs(rank: int) -> None:
    if rank == 0:
        threading.Event().wait()


@pytest.mark.slow
def test_failures_are_told_and_the_next_job_runs(tmp_path: Path) -> None:
    workers = Workers(tmp_path)
    try:
        for job, limit, words in (
            (fails, 60, r"(?s)^fails\(\) failed in 2 processes\n.*process 1: Traceback.*in fails\n.*: only here"),
            (hangs, 3, r"(?s)^hangs.*\nprocess 0: ended with exit status 1\nTimeout.*threading.py.* in hangs\n"),
        ):
            with pytest.raises(RuntimeError, match=words):
                workers.run(job, limit=limit)
        first, second = workers.run(together, 5)
        assert first == second
        assert first[:3] == (torch.tensor(15), 1, "gloo")
    finally:
        workers.stop()
