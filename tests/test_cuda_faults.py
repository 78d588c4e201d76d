"""A GPU that is shared: other work that holds it, a part of it, many processes. Results are right, and nothing hangs.

All runs in processes that are ended after a while, with word of where they were: a kernel that waits for ever would
take the test run with it.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.holding import Hold
from helpers.processes import Workers
from helpers.steps import FORMATS, SHAPES, Step, equal, inputs, step
from torch import Tensor, distributed

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


def job_beside_a_kernel(_: int, halves: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """The kernel is there before the step, and goes after it has been asked for."""
    one, hold = Step(shape, memory_format), Hold(halves)
    torch.cuda.synchronize()
    with hold:
        results, done = one(), torch.cuda.Event()
        done.record()
        was_held = not done.query()
    assert was_held or halves < 2  # no thread was free for it
    assert equal(results, one.expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halves", [1, 2])
def test_beside_a_kernel_that_stays(
    device: str, process: Workers, halves: int, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """Teams that cannot be resident as a whole, because half of each multiprocessor or all of it is taken, wait."""
    process.run(job_beside_a_kernel, halves, shape, memory_format, limit=LIMIT)


def job_capture(_: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """Grids of another stream are under way while a step is captured, and while it is replayed."""
    captured, other, side = Step(shape, memory_format), Step(SHAPES[2], memory_format), torch.cuda.Stream()
    graph, hold = torch.cuda.CUDAGraph(), Hold(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):  # the other stream asks for memory meanwhile
        with torch.cuda.stream(side):
            hold.__enter__()
            side.wait_stream(hold.stream)
            before = other()
        results = captured()
        with torch.cuda.stream(side):
            after = other()
    hold.__exit__(None, None, None)
    torch.cuda.synchronize()
    assert equal(before, other.expected)
    assert equal(after, other.expected)
    for _ in range(3):
        with torch.cuda.stream(side):
            beside = other()
        for result in results:
            result.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(results, captured.expected)
        assert equal(beside, other.expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_capture_while_grids_run(
    device: str, process: Workers, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    process.run(job_capture, shape, memory_format, limit=LIMIT)


def job_in_a_part(_: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[str, list[str]]:
    """Both passes where CUDA gives a stream some multiprocessors only. Why not, where it cannot; warnings."""
    from torch.cuda import green_contexts

    if not green_contexts.SUPPORTED:
        return "this torch has no green contexts", []
    x, dy = inputs(shape, torch.bfloat16, memory_format)
    x = x.detach()
    weight = torch.rand(shape[1], device="cuda") + 0.5
    mean, var, count = torch.zeros_like(weight), torch.ones_like(weight), torch.tensor(7, device="cuda")
    operators = torch.ops.bn_ext

    def both() -> list[Tensor]:
        # Not by autograd, whose threads would be in the other context.
        running = (mean.clone(), var.clone(), count.clone())
        momentum_to_skip = (0.1, 1e-5, None, 0.0, None, False, False)
        y, saved, _ = operators.batch_norm_forward(x, weight, None, *running, None, *momentum_to_skip)
        rest = (None, None, None, True, None, 0.0, (True, True, True, False))
        gradients = operators.batch_norm_backward(dy, x, weight, saved, *rest)[:3]
        return [y, saved, *gradients, *running]

    expected = both()
    torch.cuda.synchronize()
    try:
        part = green_contexts.GreenContext.create(num_sms=16, device_id=0)
    except (RuntimeError, TypeError) as error:
        return f"no green context: {str(error).splitlines()[0]}", []
    part.set_context()
    try:
        with warnings.catch_warnings(record=True) as caught:
            actual = both()
        torch.cuda.synchronize()
    finally:
        part.pop_context()
    torch.cuda.synchronize()
    for a, e in zip(actual, expected, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm()
        assert error <= (4e-3 if a.dtype == torch.bfloat16 else 1e-5)
    return "", [str(warning.message) for warning in caught]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_in_a_part_of_the_gpu(
    device: str,
    process: Workers,
    record_property: Callable[[str, object], None],
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
) -> None:
    """Teams that were planned for all multiprocessors are more than there is room for."""
    ((reason, said),) = process.run(job_in_a_part, shape, memory_format, limit=LIMIT)
    record_property("warnings", said)  # the first refusal is told
    if reason:
        pytest.skip(reason)


TEAMS = [None, None, None, "grid", "grid", "cluster", "block", "none"]
"""BN_EXT_CUDA_TEAMS of each process; None: as it is."""


def train(memory_format: torch.memory_format) -> tuple[str, list[Tensor]]:
    """Two steps of layers of all kinds of teams: a digest of all bits, and the vectors after it."""
    torch.manual_seed(0)
    digest, vectors = hashlib.sha256(), []
    for shape in SHAPES[:3]:
        x, dy = inputs(shape, torch.bfloat16, memory_format)
        module = bn_ext.BatchNorm2d(shape[1], device="cuda")
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        for _ in range(2):
            y, dx, *gradients = step(module, x, dy)
            for parameter, gradient in zip(module.parameters(), gradients, strict=False):
                parameter.grad = gradient
            optimizer.step()
            for tensor in (y, dx):
                digest.update(tensor.contiguous().cpu().view(torch.int16).numpy().tobytes())
        vectors += [value.cpu() for value in module.state_dict().values()]
    for vector in vectors:
        digest.update(vector.numpy().tobytes())
    return digest.hexdigest(), vectors


def job_train(rank: int, memory_format: torch.memory_format) -> tuple[str, list[Tensor]]:
    """All at once, then each alone while the others wait, then all at once again: always the same bits."""
    if (teams := TEAMS[rank]) is not None:
        os.environ["BN_EXT_CUDA_TEAMS"] = teams  # which the first call looks at
    digests = [train(memory_format)[0]]
    for turn in range(len(TEAMS)):
        distributed.barrier()
        if turn == rank:
            alone, vectors = train(memory_format)
    distributed.barrier()
    digests += [train(memory_format)[0] for _ in range(2)]
    assert digests == [alone] * 3
    return alone, vectors


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Eight, which keep to what BN_EXT_CUDA_TEAMS was at their first call."""
    several = Workers(tmp_path_factory.mktemp("processes"), count=len(TEAMS))
    yield several
    several.stop()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_many_processes(device: str, processes: Workers, memory_format: torch.memory_format) -> None:
    """Eight that train on one GPU: each gets the bits that it gets alone, and those of its teams' kind agree."""
    results = processes.run(job_train, memory_format, limit=2 * LIMIT)
    here, vectors = train(memory_format)
    of_teams: dict[str | None, str] = {}
    for teams, (digest, of_process) in zip(TEAMS, results, strict=True):
        assert of_teams.setdefault(teams, digest) == digest
        for a, e in zip(of_process, vectors, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert of_teams[None] == here
