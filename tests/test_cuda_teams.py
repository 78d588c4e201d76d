"""Teams of blocks that keep values on chip, on a GPU: what the simulated device cannot tell of them."""

import pytest
import torch
from helpers.steps import FORMATS, SHAPES, inputs, step
from torch import nn

import bn_ext
from bn_ext import testing

if "cuda" not in testing.devices():
    pytest.skip("needs a GPU, and a build of bn_ext with CUDA kernels", allow_module_level=True)


@pytest.fixture(params=["cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Of all tests here; conftest.py chooses by it."""
    return str(request.param)


def modules(channels: int) -> tuple[nn.Module, nn.Module]:
    """Ours, and torch's in float64 with the same parameters."""
    ours = bn_ext.BatchNorm2d(channels, device="cuda")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(0.5, 1.5)
    theirs = nn.BatchNorm2d(channels, device="cuda", dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_results(device: str, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """As float64 says, and the same bits each time, also while other work holds a part of the GPU."""
    x, dy = inputs(shape, dtype, memory_format)
    ours, theirs = modules(shape[1])
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    actual = step(ours, x, dy)
    expected = step(theirs, x.detach().double().requires_grad_(), dy.double())
    for a, e in zip(actual, expected, strict=True):
        error = (a.double() - e).norm() / e.double().norm()
        assert error <= (4e-3 if a.dtype == torch.bfloat16 else 1e-5)

    other, work = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        ours.load_state_dict(start)
        with torch.cuda.stream(other):
            for _ in range(4):
                work = torch.mm(work, work).clamp_(-1, 1)
        assert all(torch.equal(a, b) for a, b in zip(actual, step(ours, x, dy), strict=True))
    torch.cuda.current_stream().wait_stream(other)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_graphs(device: str, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """Captured once, replayed on other values: the bits that a call gives."""
    x, dy = inputs(shape, torch.bfloat16, memory_format)
    captured, eager = (bn_ext.BatchNorm2d(shape[1], device="cuda") for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as torch's documentation of graphs has it
        step(captured, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(eager.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured, x, dy)
    for _ in range(3):
        with torch.no_grad():
            x.normal_(1, 2), dy.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(eager, x, dy), strict=True))
