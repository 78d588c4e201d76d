"""Models sharded over two processes, by fully_shard and by FullyShardedDataParallel: the same with both libraries."""

import math
from typing import Any

import pytest
import torch
from helpers.fusing import calls
from helpers.parallel import (
    GROUPS,
    KINDS,
    Block,
    batch,
    build,
    copied,
    forward_pass,
    gradients_of,
    in_one_process,
    shard,
    train,
)
from helpers.processes import Workers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

pytestmark = pytest.mark.processes

FULL = StateDictOptions(full_state_dict=True)


def finish(model: nn.Module) -> tuple[dict[str, Any], Tensor]:
    """The whole state, and an evaluation."""
    dtype = next(model.parameters()).dtype
    return copied(get_model_state_dict(model, options=FULL)), model.eval()(batch(0, 0, dtype=dtype)).detach()


def assert_taken_over(found: list[Any], dtype: torch.dtype, **tolerance: float) -> None:
    """A module of torch.nn's, not sharded, does the same with the state."""
    for _, (state, output) in found:
        stock = build("torch.nn", dtype)
        stock.load_state_dict(state)
        torch.testing.assert_close(stock.eval()(batch(0, 0, dtype=dtype)), output, **tolerance)


def steps(rank: int, kind: str, groups: str, reshard: bool, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    model = shard(build(kind, dtype), groups, reshard_after_forward=reshard)
    return train(rank, kind, model, model), finish(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("reshard", [True, False])
def test_steps(workers: Workers, kind: str, groups: str, reshard: bool) -> None:
    """What two models in one process do, and torch.nn's."""
    found = workers.run_once(steps, kind, groups, reshard, torch.float64)
    torch.testing.assert_close([trained for trained, _ in found], in_one_process(broadcast=False))
    torch.testing.assert_close(found, workers.run_once(steps, "torch.nn", groups, reshard, torch.float64))
    assert_taken_over(found, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_step(workers: Workers, kind: str) -> None:
    """The first one: rounding errors of a few sums behind each other."""
    found = workers.run_once(steps, kind, "norms", True, torch.float32)
    for (trained, _), exact in zip(found, in_one_process(broadcast=False), strict=True):
        for name in ("losses", "gradients"):
            torch.testing.assert_close(trained[name][0], exact[name][0], rtol=1e-4, atol=1e-4, check_dtype=False)
        after, exact_after = trained["buffers at the start"][1], exact["buffers at the start"][1]
        torch.testing.assert_close(after, exact_after, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert_taken_over(found, torch.float32, rtol=1e-5, atol=1e-5)


def calls_of_norms(rank: int, kind: str, groups: str) -> list[Any]:
    model = shard(build(kind), groups)
    with calls() as seen, forward_pass(kind):
        model(batch(rank, 0))
    return seen


@pytest.mark.parametrize("kind", ["fused", "recomputed"])
def test_fused_code_runs(workers: Workers, kind: str) -> None:
    """Where batch norms are sharded with their block; one that is sharded by itself is another module."""
    fused = [(None, True), ("relu", False), ("relu", True), (None, False)]
    for groups, expected in {"blocks": fused, "whole": fused, "norms": [(None, False)] * 4}.items():
        assert workers.run(calls_of_norms, kind, groups) == [expected, expected]


def from_meta(rank: int, kind: str, groups: str) -> Any:
    with torch.device("meta"):
        model = build(kind)
    shard(model, groups).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 7)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = copied(get_model_state_dict(model, options=FULL))
    state = build("torch.nn").state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    return fresh, train(rank, kind, model, model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", GROUPS)
def test_from_the_meta_device(workers: Workers, kind: str, groups: str) -> None:
    """Sharded, made and initialised; then with a state of torch.nn's."""
    found, stock = (workers.run_once(from_meta, k, groups) for k in (kind, "torch.nn"))
    torch.testing.assert_close(found, stock)
    constants = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    for fresh, _ in found:
        for name, value in constants.items():
            assert (fresh[f"block.bn1.{name}"] == value).all(), name
    torch.testing.assert_close([trained for _, trained in found], in_one_process(broadcast=False))


def flat_steps(rank: int, kind: str, blocks: bool) -> tuple[dict[str, Any], Any]:
    model = build(kind)
    policy = ModuleWrapPolicy({Block}) if blocks else None
    device = torch.device("cpu")
    parallel = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)

    def gradients(model: nn.Module) -> dict[str, Any]:
        with FullyShardedDataParallel.summon_full_params(parallel, with_grads=True):
            return gradients_of(model)

    return train(rank, kind, model, parallel, gradients=gradients), finish(parallel)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [True, False])
def test_steps_of_fully_sharded_data_parallel(workers: Workers, kind: str, blocks: bool) -> None:
    """FSDP's first version."""
    found = workers.run_once(flat_steps, kind, blocks)
    torch.testing.assert_close([trained for trained, _ in found], in_one_process(broadcast=False))
    torch.testing.assert_close(found, workers.run_once(flat_steps, "torch.nn", blocks))
    assert_taken_over(found, torch.float64)
