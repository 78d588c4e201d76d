"""How kernels are launched on a GPU: starts before an earlier kernel has ended, and first uses inside a capture."""

import hashlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.processes import Workers
from helpers.steps import FORMATS, SHAPES, equal, inputs
from torch import Tensor

import bn_ext
from bn_ext import testing

if "cuda" not in testing.devices():
    pytest.skip("needs a GPU, and a build of bn_ext with CUDA kernels", allow_module_level=True)

pytestmark = pytest.mark.processes

LIMIT = 60.0
"""Seconds for a job, which takes a few."""

ROUNDS = 2000
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
STRESSED = [
    ((4, 16, 8, 8), torch.float32),  # 16 KiB
    ((4, 64, 16, 16), torch.bfloat16),  # 128 KiB
    ((16, 64, 16, 16), torch.float32),  # 1 MiB
    ((32, 64, 32, 32), torch.bfloat16),  # 4 MiB
]


@pytest.fixture(params=["cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Of all tests here; conftest.py chooses by it."""
    return str(request.param)


@pytest.fixture(scope="module")
def with_and_without_pdl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two processes; the second one disables PDL."""
    pair = Workers(tmp_path_factory.mktemp("with_and_without_pdl"))
    yield pair
    pair.stop()


def digest_of(results: list[list[Tensor]]) -> str:
    """Of all bits."""
    digest = hashlib.sha256()
    for tensor in (tensor for several in results for tensor in several):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def job_stress(
    rank: int, shape: tuple[int, ...], dtype: torch.dtype, momentum: float | None, side: bool
) -> tuple[int, str]:
    """How many of the results differ from those of calls that run alone, and a digest of all those and the last ones.

    Each round overwrites x while the round before may still run, and clears memory that it then gets for y: both fail
    where a kernel starts before torch's kernel in front of it has ended.
    """
    if rank == 1:
        os.environ["BN_EXT_CUDA_PDL"] = "0"  # which the first call looks at
    x, dy = inputs(shape, dtype, torch.contiguous_format)
    given = [torch.randn(shape, device="cuda").to(dtype) for _ in range(4)]
    module = bn_ext.BatchNorm2d(shape[1], momentum=momentum, device="cuda")

    def both() -> list[Tensor]:
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]

    def compared(results: list[Tensor], expected: list[Tensor]) -> Tensor:
        pairs = [(a.view(BITS[a.dtype]), e.view(BITS[e.dtype])) for a, e in zip(results, expected, strict=True)]
        return torch.stack([(a != e).any() for a, e in pairs]).sum()

    expected = []
    for values in given:
        x.data.copy_(values)
        torch.cuda.synchronize()
        expected.append(both())
        torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrong, results = torch.zeros((), dtype=torch.int32, device="cuda"), both()
        for i in range(ROUNDS):
            x.data.copy_(given[i % len(given)])
            for result in results:
                result.mul_(0)
            del result
            results.clear()  # what the next pass gets for its results
            results = both()
            wrong += compared(results, expected[i % len(given)])
        differing = int(wrong)
    return differing, digest_of([*expected, results, list(module.buffers())])


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("shape", "dtype"), STRESSED)
def test_pdl_changes_no_bits_under_stress(
    device: str,
    with_and_without_pdl: Workers,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    momentum: float | None,
    side: bool,
) -> None:
    """Teams, and with momentum=None the multi-kernel path, between torch's kernels: the same bits without PDL."""
    pdl, usual = with_and_without_pdl.run(job_stress, shape, dtype, momentum, side, limit=LIMIT)
    assert pdl[0] == usual[0] == 0
    assert pdl[1] == usual[1]


def job_first_use(_: int, momentum: float | None) -> None:
    """Kernels are loaded, and asked for their attributes, while a stream captures. No call of them came before."""
    torch.zeros(1, device="cuda").add_(1)  # torch's own are there
    operators = torch.ops.bn_ext
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for memory_format, shape, dtype in ((f, *each) for f in FORMATS for each in zip(SHAPES[:3], dtypes, strict=True)):
        x, dy = inputs(shape, dtype, memory_format)
        x = x.detach()
        weight = torch.rand(shape[1], device="cuda") + 0.5
        before = (torch.zeros_like(weight), torch.ones_like(weight), torch.tensor(7, device="cuda"))
        running = [tensor.clone() for tensor in before]

        def both(
            x: Tensor = x, dy: Tensor = dy, weight: Tensor = weight, running: list[Tensor] = running
        ) -> list[Tensor]:
            # Not by autograd, which has first uses of its own.
            rest = (momentum, 1e-5, None, 0.0, None, False, False)
            y, saved, _ = operators.batch_norm_forward(x, weight, None, *running, None, *rest)
            options = (None, None, None, True, None, 0.0, (True, True, True, False))
            return [y, saved, *operators.batch_norm_backward(dy, x, weight, saved, *options)[:3]]

        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = both()
        graph.replay()
        torch.cuda.synchronize()
        of_graph = [tensor.clone() for tensor in (*captured, *running)]
        for tensor, value in zip(running, before, strict=True):
            tensor.copy_(value)
        expected = [*both(), *running]
        assert equal(of_graph, expected)


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., object]]:
    """Runs a job in a process that has run nothing."""
    one = Workers(tmp_path_factory.mktemp("fresh"), count=1)
    yield one.run
    one.stop()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_first_use_in_a_capture(device: str, fresh: Callable[..., object], momentum: float | None) -> None:
    """Without the warm-up of torch's documentation: the bits of a plain call."""
    fresh(job_first_use, momentum, limit=LIMIT)
