"""A GPU without memory left in the middle of a training step, as torch says it: nothing is lost.

In a process of its own, whose limit of memory no other test meets. test_out_of_memory.py lets each allocation fail.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.processes import Workers
from helpers.steps import FORMATS, equal
from torch import Tensor, nn

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


def limit_memory(spare: int) -> None:
    """Let torch have so many bytes of the GPU besides those that tensors take."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)


def until_there_is_memory(call: Callable[[], Any], check: Callable[[], None]) -> tuple[Any, int]:
    """What the call gives when there is memory enough, and the MiB with which it failed last."""
    torch.cuda.synchronize()
    for spare in range(0, 512, 2):
        limit_memory(spare * MIB)
        try:
            return call(), spare - 2
        except torch.OutOfMemoryError:
            pass
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        check()
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
