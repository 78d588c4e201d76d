"""Trouble on a GPU: other work that holds it, many processes, no memory left. Results are right, and nothing hangs.

All runs in processes that are ended after a while, with word of where they were: a kernel that waits for ever would
take the test run with it, and a limit of memory the tests that come next.
"""

import copy
import hashlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pytest
import torch
from helpers.processes import Workers
from helpers.steps import FORMATS, SHAPES, inputs, step
from torch import Tensor, distributed, nn

import bn_ext
from bn_ext import testing

if "cuda" not in testing.devices():
    pytest.skip("needs a GPU, and a build of bn_ext with CUDA kernels", allow_module_level=True)

pytestmark = pytest.mark.processes

LIMIT = 40.0
"""Seconds for a job, which takes a few."""

MIB = 2**20


@pytest.fixture(params=["cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Of all tests here; conftest.py chooses by it."""
    return str(request.param)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One process, anew after a job that failed."""
    one = Workers(tmp_path_factory.mktemp("process"), count=1)
    yield one
    one.stop()


def equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit by bit; waits for the GPU."""
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


HOLD = r"""
extern "C" __global__ void __launch_bounds__(1024) hold(const volatile int* released, int longest) {
  const long long begin = clock64();
  while (*released == 0 && (clock64() - begin) / 1000000 < longest) __nanosleep(1000);
}
"""


class Hold:
    """A kernel that keeps so many blocks of 1024 threads on each multiprocessor until it is released.

    Two are all threads that there are. After a few seconds it ends by itself.
    """

    def __init__(self, blocks: int) -> None:
        self._kernel = torch.cuda._compile_kernel(HOLD, "hold")
        self._blocks = blocks * torch.cuda.get_device_properties(0).multi_processor_count
        self._released = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.stream = torch.cuda.Stream()

    def __enter__(self) -> "Hold":
        self._released.zero_()
        longest = 5000  # million cycles
        with torch.cuda.stream(self.stream):
            self._kernel((self._blocks, 1, 1), (1024, 1, 1), [self._released, longest])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.fill_(1)


class Step:
    """A training step on tensors of its own, the same each time; kernels and memory for it are there."""

    def __init__(self, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
        torch.manual_seed(0)
        self.x, self.dy = inputs(shape, torch.bfloat16, memory_format)
        self.module = bn_ext.BatchNorm2d(shape[1], device="cuda")
        self._start = copy.deepcopy(self.module.state_dict())
        self.expected = self()
        for _ in range(2):
            self()

    def __call__(self) -> list[Tensor]:
        """Output, gradients, and statistics after it."""
        for name, value in self.module.state_dict().items():
            value.copy_(self._start[name])
        return step(self.module, self.x, self.dy)


def job_beside_a_kernel(_: int, blocks: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """The kernel is there before the step, and goes after it has been asked for."""
    one, hold = Step(shape, memory_format), Hold(blocks)
    torch.cuda.synchronize()
    with hold:
        results, done = one(), torch.cuda.Event()
        done.record()
        was_held = not done.query()
    assert was_held or blocks < 2  # no thread was free for it
    assert equal(results, one.expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_beside_a_kernel_that_stays(
    device: str, process: Workers, blocks: int, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """Teams that cannot be resident as a whole, because half of each multiprocessor or all of it is taken, wait."""
    process.run(job_beside_a_kernel, blocks, shape, memory_format, limit=LIMIT)


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
    process.run(job_two_grids, memory_format, limit=LIMIT)


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


def job_in_a_part(_: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> str | None:
    """Both passes where CUDA gives a stream some multiprocessors only; why not, where it cannot."""
    from torch.cuda import green_contexts

    if not green_contexts.SUPPORTED:
        return "this torch has no green contexts"
    x, dy = inputs(shape, torch.bfloat16, memory_format)
    x = x.detach()
    weight = torch.rand(shape[1], device="cuda") + 0.5
    mean, var, count = torch.zeros_like(weight), torch.ones_like(weight), torch.tensor(7, device="cuda")
    operators = torch.ops.bn_ext

    def both() -> list[Tensor]:
        # Not by autograd, whose threads would be in the other context.
        running = (mean.clone(), var.clone(), count.clone())
        momentum_to_skip = (0.1, 1e-5, None, 0.0, False, False, False)
        y, saved, _ = operators.batch_norm_forward(x, weight, None, *running, None, *momentum_to_skip)
        rest = (None, None, True, None, 0.0, (True, True, True, False))
        gradients = operators.batch_norm_backward(dy, x, weight, saved, *rest)[:3]
        return [y, saved, *gradients, *running]

    expected = both()
    torch.cuda.synchronize()
    try:
        part = green_contexts.GreenContext.create(num_sms=16, device_id=0)
    except RuntimeError as error:
        return f"no green context: {str(error).splitlines()[0]}"
    part.set_context()
    try:
        actual = both()
        torch.cuda.synchronize()
    finally:
        part.pop_context()
    for a, e in zip(actual, expected, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm()
        assert error <= (4e-3 if a.dtype == torch.bfloat16 else 1e-5)
    return None


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_in_a_part_of_the_gpu(
    device: str, process: Workers, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """Teams that were planned for all multiprocessors are more than there is room for."""
    (reason,) = process.run(job_in_a_part, shape, memory_format, limit=LIMIT)
    if reason is not None:
        pytest.skip(reason)


def limit_memory(spare: int) -> None:
    """Let torch have so many bytes of the GPU besides those that tensors take."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)


def until_there_is_memory(call: Any, check: Any) -> tuple[Any, int]:
    """What the call gives when there is memory enough, and the MiB with which it failed last."""
    torch.cuda.synchronize()
    for spare in range(0, 512, 2):
        limit_memory(spare * MIB)
        try:
            result = call()
        except torch.OutOfMemoryError:
            check()
            continue
        torch.cuda.set_per_process_memory_fraction(1.0)
        return result, spare - 2
    raise AssertionError("512 MiB are not enough")


def job_out_of_memory(_: int, activation: str | None, memory_format: torch.memory_format) -> None:
    """y, dx and dresidual take 32 MiB each; torch takes memory for less in pieces of 2 MiB or 20."""
    norm = bn_ext.BatchNorm2d(32, device="cuda")
    x, dy, z = (torch.randn(16, 32, 128, 128, device="cuda").contiguous(memory_format=memory_format) for _ in range(3))
    leaves = [x.requires_grad_(), norm.weight, norm.bias]
    if activation is not None:  # else dresidual is dy, of which torch makes a copy when other gradients are there
        leaves.append(z.requires_grad_())

    def forward() -> Tensor:
        state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        options = {"num_batches_tracked": norm.num_batches_tracked, "activation": activation}
        return bn_ext.batch_norm(x, *state, training=True, residual=z, **options)

    start = copy.deepcopy(norm.state_dict())
    y = forward()
    y.backward(dy)
    expected = [y.detach(), *(leaf.grad for leaf in leaves), *(buffer.clone() for buffer in norm.buffers())]
    y = None
    norm.load_state_dict(start)
    for leaf in leaves:
        leaf.grad = None

    def unchanged(state: dict[str, Tensor]) -> None:
        assert equal(list(norm.state_dict().values()), list(state.values()))
        assert all(leaf.grad is None for leaf in leaves)

    y, failed_with = until_there_is_memory(forward, lambda: unchanged(start))
    assert failed_with >= 30
    after = copy.deepcopy(norm.state_dict())
    _, failed_with = until_there_is_memory(lambda: y.backward(dy), lambda: unchanged(after))
    assert failed_with >= 30
    assert equal([y.detach(), *(leaf.grad for leaf in leaves), *norm.buffers()], expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_out_of_memory(
    device: str, process: Workers, activation: str | None, memory_format: torch.memory_format
) -> None:
    """An error of torch's kind, statistics and gradients as before; later the same call works."""
    process.run(job_out_of_memory, activation, memory_format, limit=LIMIT)


def job_out_of_memory_in_a_model(_: int) -> None:
    """Of two layers each has updated its statistics, or has not; a smaller batch then trains as if nothing had been."""
    model = nn.Sequential(bn_ext.BatchNorm2d(32), nn.ReLU(), bn_ext.BatchNorm2d(32)).cuda()
    x, dy = (torch.randn(16, 32, 128, 128, device="cuda") for _ in range(2))
    start = copy.deepcopy(model.state_dict())

    def train(size: int) -> None:
        model.zero_grad()
        model(x[:size]).backward(dy[:size])

    def state() -> list[Tensor]:
        return [*(buffer.clone() for buffer in model.buffers()), *(p.grad.clone() for p in model.parameters())]

    train(16)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    train(4)
    expected = state()
    model.load_state_dict(start)
    model.zero_grad()

    def check() -> None:
        for layer in ("0", "2"):
            names = [f"{layer}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
            now = model.state_dict()
            assert any(equal([now[n] for n in names], [of[n] for n in names]) for of in (start, after))
        model.load_state_dict(start)
        model.zero_grad()

    _, failed_with = until_there_is_memory(lambda: train(16), check)
    assert failed_with >= 62  # which do for a forward pass
    model.load_state_dict(start)
    limit_memory(64 * MIB)  # too little for all, enough for a quarter
    with pytest.raises(torch.OutOfMemoryError):
        train(16)
    model.load_state_dict(start)
    train(4)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert equal(state(), expected)


def test_out_of_memory_in_a_model(device: str, process: Workers) -> None:
    process.run(job_out_of_memory_in_a_model, limit=LIMIT)


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
