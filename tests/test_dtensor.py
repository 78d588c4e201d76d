"""Batch norms of distributed tensors, without FSDP: in two processes, the same as on the whole tensors in one."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.derivatives import leaf, loss
from helpers.parallel import RANKS, batch, copied, whole
from helpers.processes import Workers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

import bn_ext

pytestmark = pytest.mark.processes

PLACES = {"replicated": None, "batch": 0, "channels": 1, "height": 2}
LIBRARIES = {"torch.nn": nn, "bn_ext": bn_ext}


def build(library: str, training: bool, **options: Any) -> Any:
    torch.manual_seed(1)
    norm = LIBRARIES[library].BatchNorm2d(3, dtype=torch.float64, **options)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm.train(training)


def step(norm: Any, inputs: list[Tensor]) -> dict[str, Any]:
    y = norm(*inputs)
    loss(y.full_tensor() if hasattr(y, "full_tensor") else y).backward()
    gradients = [whole(tensor.grad) for tensor in (*inputs, norm.weight, norm.bias)]
    return {"y": whole(y), "gradients": gradients, "state": copied(norm.state_dict())}


def inputs(count: int = 1) -> list[Tensor]:
    return [batch(0, 0, part) for part in range(count)]


def distributed(rank: int, library: str, place: str, training: bool, fused: bool = False) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (RANKS,))
    placement = Replicate() if PLACES[place] is None else Shard(PLACES[place])
    norm = distribute_module(build(library, training, **({"activation": "silu"} if fused else {})), mesh)
    return step(norm, [leaf(distribute_tensor(x, mesh, [placement])) for x in inputs(1 + fused)])


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_distributed_tensors(workers: Workers, library: str, place: str, training: bool) -> None:
    if library == "torch.nn" and torch.__version__ < (2, 13):
        pytest.skip("this torch has no strategy for its batch norm")
    if library == "torch.nn" and place == "channels" and training:
        pytest.skip("torch.nn loses the running statistics of channels in shards")
    expected = step(build("torch.nn", training), [leaf(x) for x in inputs()])
    for found in workers.run(distributed, library, place, training):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_activation_and_residual(workers: Workers, place: str, training: bool) -> None:
    expected = step(build("bn_ext", training, activation="silu"), [leaf(x) for x in inputs(2)])
    for found in workers.run(distributed, "bn_ext", place, training, True):
        torch.testing.assert_close(found, expected)


AROUND: dict[str, Any] = {"compiled": contextlib.nullcontext(), "default device": torch.device("cpu")}


def first_call(rank: int, around: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1,))
    norm = distribute_module(build("bn_ext", True), mesh)
    if around == "compiled":
        norm.compile(backend="aot_eager")
    with AROUND[around]:
        return step(norm, [leaf(distribute_tensor(batch(0, 0, 0), mesh, [Shard(0)]))])


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
def test_first_call_of_a_process(tmp_path: Path, around: str) -> None:
    """There, too, torch knows what to do with the operators."""
    alone = Workers(tmp_path, 1)
    try:
        (found,) = alone.run(first_call, around)
    finally:
        alone.stop()
    torch.testing.assert_close(found, step(build("bn_ext", True), [leaf(batch(0, 0, 0))]))
