"""Training in two processes by DistributedDataParallel, and what belongs to it: the same with both libraries."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fusing import calls
from helpers.parallel import KINDS, batch, build, copied, forward_pass, in_one_process, norms, optimizer_of, train
from helpers.processes import Workers
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.processes

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "own buffers": {"broadcast_buffers": False},
    "static graph": {"static_graph": True},
    "gradients in buckets": {"gradient_as_bucket_view": True},
    "branch used by one rank": {"find_unused_parameters": True},
    "accumulated": {},
    "two forwards": {},
    "two forwards, own buffers": {"broadcast_buffers": False},
    "sharded optimizer": {},
}

# torch.nn saves running statistics for backward, and DistributedDataParallel changed them in between: pytorch#175851.
REFUSED = ["two forwards"] if torch.__version__ < (2, 12) else []


def how(case: str) -> str:
    """What a step is."""
    return case.split(",")[0] if case.startswith(("accumulated", "two forwards")) else "one"


def uses_branch(case: str) -> tuple[bool, bool]:
    """Whether each rank does."""
    return (True, case != "branch used by one rank")


def sharded(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1, momentum=0.9)


def steps(rank: int, kind: str, case: str) -> dict[str, Any]:
    model = build(kind)
    parallel = DistributedDataParallel(model, **OPTIONS[case])
    optimizer = sharded if case == "sharded optimizer" else optimizer_of
    return train(rank, kind, model, parallel, how(case), uses_branch(case)[rank], optimizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_steps(workers: Workers, kind: str, case: str) -> None:
    """Buffers at each start, losses and gradients are those of two models in one process, and torch.nn's."""
    if kind == "torch.nn" and case in REFUSED:
        pytest.skip("this torch refuses, as running statistics changed since the first forward: pytorch#175851")
    found = workers.run_once(steps, kind, case)
    broadcast = OPTIONS[case].get("broadcast_buffers", True)
    torch.testing.assert_close(found, in_one_process(how(case), broadcast, uses_branch(case)))
    if case not in REFUSED:
        torch.testing.assert_close(found, workers.run_once(steps, "torch.nn", case))
    torch.testing.assert_close(found[1]["gradients"], found[0]["gradients"], rtol=0, atol=0)


def calls_of_norms(rank: int, kind: str) -> list[Any]:
    parallel = DistributedDataParallel(build(kind))
    with calls() as seen, forward_pass(kind):
        parallel(batch(rank, 0))
    return seen


@pytest.mark.parametrize("kind", ["fused", "recomputed"])
def test_fused_code_runs(workers: Workers, kind: str) -> None:
    """Within DistributedDataParallel too: the branch, the two of the block, the last one."""
    expected = [(None, True), ("relu", False), ("relu", True), (None, False)]
    assert workers.run(calls_of_norms, kind) == [expected, expected]


def compressed(rank: int, kind: str) -> dict[str, Any]:
    parallel = DistributedDataParallel(build(kind))
    parallel.register_comm_hook(None, fp16_compress_hook)
    return train(rank, kind, parallel.module, parallel)


@pytest.mark.parametrize("kind", KINDS)
def test_communication_hook(workers: Workers, kind: str) -> None:
    """Gradients are the means but for three roundings to float16: of each rank's, and of their sum."""
    found = workers.run(compressed, kind)
    expected = in_one_process()[0]["gradients"][0]
    for each in found:
        torch.testing.assert_close(each["gradients"][0], expected, rtol=3 * 2**-11, atol=2**-12)
    torch.testing.assert_close(found[1]["gradients"], found[0]["gradients"], rtol=0, atol=0)


def save(rank: int, kind: str, path: Path) -> tuple[dict[str, Any], Tensor]:
    """Train, save on the first rank, and evaluate there what was saved."""
    model = build(kind)
    parallel = DistributedDataParallel(model)
    train(rank, kind, model, parallel)
    if rank == 0:
        torch.save(parallel.state_dict(), path)
    distributed.barrier()
    return copied(model.state_dict()), model.eval()(batch(0, 0)).detach()


def load(rank: int, kind: str, path: Path) -> tuple[dict[str, Any], Tensor]:
    parallel = DistributedDataParallel(build(kind))
    parallel.load_state_dict(torch.load(path, weights_only=True))
    return copied(parallel.module.state_dict()), parallel.module.eval()(batch(0, 0)).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_by_the_first_and_loaded(workers: Workers, kind: str, tmp_path: Path) -> None:
    """In another library's DistributedDataParallel, and in a module of torch.nn's without it."""
    path = tmp_path / "model.pt"
    saved = workers.run(save, kind, path)[0]
    for other in ("torch.nn", "bn_ext"):
        for loaded in workers.run(load, other, path):
            torch.testing.assert_close(loaded, saved)
    state = torch.load(path, weights_only=True)
    consume_prefix_in_state_dict_if_present(state, "module.")
    stock = build("torch.nn")
    stock.load_state_dict(state)
    torch.testing.assert_close(stock.eval()(batch(0, 0)), saved[1])


def through_checkpoint(rank: int, kind: str, other: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    model = build(kind)
    parallel = DistributedDataParallel(model)
    train(rank, kind, model, parallel)
    for buffer in model.buffers():
        distributed.broadcast(buffer, 0)
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder)
    restored = build(other)
    state = {"model": restored.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    restored.load_state_dict(state["model"])
    return copied(model.state_dict()), copied(restored.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["torch.nn", "bn_ext"])
def test_distributed_checkpoint(workers: Workers, kind: str, other: str, tmp_path: Path) -> None:
    trained = in_one_process()[0]["buffers"]
    for saved, restored in workers.run(through_checkpoint, kind, other, tmp_path):
        torch.testing.assert_close(restored, saved, rtol=0, atol=0)
        torch.testing.assert_close({name: restored[name] for name in trained}, trained)


def synchronised(rank: int, kind: str) -> tuple[list[Any], list[Any], list[Any]]:
    """The batch norms that come of it; state and output before and after."""
    group = distributed.new_group([0, 1])
    model = build(kind).eval()
    before = [copied(model.state_dict()), model(batch(rank, 0)).detach()]
    tensors = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    assert [id(tensor) for tensor in model.state_dict(keep_vars=True).values()] == tensors
    assert all(norm.process_group is group for norm in norms(model).values())
    after = [copied(model.state_dict()), model(batch(rank, 0)).detach()]
    return [(n, type(m).__name__, repr(m), m.training) for n, m in norms(model).items()], before, after


@pytest.mark.parametrize("kind", KINDS)
def test_convert_sync_batchnorm(workers: Workers, kind: str) -> None:
    """To the same as torch.nn's; its forward pass in training needs a GPU, in evaluation it does not."""
    found, stock = (workers.run_once(synchronised, k) for k in (kind, "torch.nn"))
    for (made, before, after), (made_of_stock, _, after_of_stock) in zip(found, stock, strict=True):
        assert made == made_of_stock
        assert [kind for _, kind, *_ in made] == ["SyncBatchNorm"] * 4
        torch.testing.assert_close(after, before)
        torch.testing.assert_close(after, after_of_stock)
