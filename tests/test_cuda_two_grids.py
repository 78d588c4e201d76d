"""Two cooperative grids at a time on a GPU: each waits for room, and neither for the other.

CUDA documents that the blocks of one grid are resident together, not how two such grids share the multiprocessors. If
half of each were resident, both would wait for ever; so all runs in a process that is ended after a while, and
scripts/gpu_check.sh runs this file before all other tests.
"""

import itertools

import pytest
import torch
from helpers.holding import Hold
from helpers.processes import Workers
from helpers.steps import FORMATS, SHAPES, Step, equal, inputs, step
from torch import Tensor

import bn_ext
from bn_ext import testing

if "cuda" not in testing.devices():
    pytest.skip("needs a GPU, and a build of bn_ext with CUDA kernels", allow_module_level=True)

pytestmark = pytest.mark.processes

LIMIT = 40.0
"""Seconds for a job, which takes a few."""


@pytest.fixture(params=["cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Of all tests here; conftest.py chooses by it."""
    return str(request.param)


def skip_unless_one_waits(memory_format: torch.memory_format) -> None:
    """Skip unless a grid of SHAPES[2] takes more than half of the places for blocks that hold slices."""
    told = bn_ext.explain(SHAPES[2], torch.bfloat16, memory_format=memory_format)
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    if any(plan.team != "grid" or plan.blocks <= multiprocessors for plan in (told.forward, told.backward)):
        pytest.skip(f"on this GPU, {SHAPES[2]} has no grids of which one waits for the other")


def job_two_streams(_: int, memory_format: torch.memory_format) -> None:
    """Nothing else is on the GPU."""
    x, dy = inputs(SHAPES[2], torch.bfloat16, memory_format)
    module = bn_ext.BatchNorm2d(SHAPES[2][1], track_running_stats=False, device="cuda")
    expected = step(module, x, dy)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results = []
    for _, stream in itertools.product(range(10), streams):
        with torch.cuda.stream(stream):
            results.append(step(module, x, dy))
    torch.cuda.synchronize()
    assert all(equal(result, expected) for result in results)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_two_streams(device: str, process: Workers, memory_format: torch.memory_format) -> None:
    skip_unless_one_waits(memory_format)
    process.run(job_two_streams, memory_format, limit=LIMIT)


def job_two_grids(_: int, memory_format: torch.memory_format) -> None:
    """On two streams at once, behind a kernel that holds half of the GPU, and beside matrix products."""
    steps, streams = [], [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        with torch.cuda.stream(stream):
            steps.append(Step(SHAPES[2], memory_format))
    work, others = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16), torch.cuda.Stream()
    hold = Hold(1)
    torch.cuda.synchronize()
    results: list[list[list[Tensor]]] = [[], []]
    with hold:
        for _ in range(5):
            with torch.cuda.stream(others):
                work = torch.mm(work, work).clamp_(-1, 1)
            for stream, one, of_stream in zip(streams, steps, results, strict=True):
                with torch.cuda.stream(stream):
                    of_stream.append(one())
    torch.cuda.synchronize()
    for one, of_stream in zip(steps, results, strict=True):
        assert all(equal(result, one.expected) for result in of_stream)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_two_grids_beside_other_work(device: str, process: Workers, memory_format: torch.memory_format) -> None:
    skip_unless_one_waits(memory_format)
    process.run(job_two_grids, memory_format, limit=LIMIT)
