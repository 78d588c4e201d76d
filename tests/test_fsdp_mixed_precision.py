"""Models sharded over two processes that compute in bfloat16: each batch norm beside its formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.derivatives import leaf, loss
from helpers.parallel import GROUPS, RANKS, Block, batch, build, copied, disturb, gradients_of, norms, parts, whole
from helpers.processes import Workers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import bn_ext

pytestmark = pytest.mark.processes

BF16, F32 = torch.bfloat16, torch.float32
KINDS = ["torch.nn", "bn_ext"]
POLICIES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "reduced in float32": {"reduce_dtype": F32},
    "float32 output": {"output_dtype": F32},
    "input not cast": {"cast_forward_inputs": False},
}
VECTORS = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "mixed": (BF16, F32)}
"""Dtypes of weight and bias, and of the running statistics. torch.nn refuses the last one on the CPU."""


def record(model: nn.Module, run: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """What each batch norm of a model sees and makes in one forward and backward."""
    seen: dict[str, dict[str, Any]] = {}

    def before(norm: Any, args: Any) -> Any:
        kept[norm] |= {"weight": whole(norm.weight), "bias": whole(norm.bias)}
        kept[norm]["before"] = [buffer.clone() for buffer in norm.buffers()]
        return (args[0].view_as(args[0]),)  # whose gradient is that of the batch norm alone

    def after(norm: Any, args: Any, y: Tensor) -> None:
        mine = kept[norm]
        mine |= {"x": args[0].detach().clone(), "y": y.detach().clone(), "after": [b.clone() for b in norm.buffers()]}
        args[0].register_hook(lambda dx: mine.update(dx=dx.clone()))
        y.register_hook(lambda dy: mine.update(dy=dy.clone()))

    kept, handles = {}, []
    for name, norm in norms(model).items():
        kept[norm] = seen[name] = {"training": norm.training, "eps": norm.eps, "momentum": norm.momentum}
        handles += [norm.register_forward_pre_hook(before), norm.register_forward_hook(after)]
    run()
    for handle in handles:
        handle.remove()
    return seen


def both_modes(rank: int, model: nn.Module, parallel: Any, x: Tensor, gradients: Callable[[], Any]) -> list[Any]:
    """Records and gradients of the batch norms, and dtype of the output, in training and in evaluation."""
    found = []
    if rank == 1:
        disturb(model)

    def run() -> None:
        found.append([parallel(x)])
        loss(found[-1][0].float()).backward()

    for training in (True, False):
        parallel.train(training).zero_grad()
        records = record(model, run)
        found[-1] = [records, gradients(), found[-1][0].dtype]
    return found


def gradients_of_norms(model: nn.Module) -> dict[str, Tensor]:
    return copied({f"{n}.{p}": getattr(m, p).grad for n, m in norms(model).items() for p in ("weight", "bias")})


def exact(kept: dict[str, Any]) -> dict[str, Any]:
    """What a batch norm should have made, in float64."""
    leaves = [kept[name].double().requires_grad_() for name in ("x", "weight", "bias")]
    mean, var, count = (buffer.double() for buffer in kept["before"])
    count += kept["training"]
    momentum = 1 / count.item() if kept["momentum"] is None else kept["momentum"]
    y = F.batch_norm(leaves[0], mean, var, *leaves[1:], kept["training"], momentum, kept["eps"])
    gradients = torch.autograd.grad(y, leaves, kept["dy"].double())
    return dict(zip(("dx", "weight", "bias"), gradients, strict=True)) | {"y": y.detach(), "after": [mean, var, count]}


def assert_right(found: list[list[Any]]) -> None:
    """Batch norms are right but for the last rounding; gradients, but for those before and after they are added."""
    for modes in zip(*found, strict=True):
        truths = [{name: exact(kept) for name, kept in records.items()} for records, *_ in modes]
        for (records, gradients, _), truth in zip(modes, truths, strict=True):
            for name, kept in records.items():
                for actual, expected in (
                    *((kept[what], truth[name][what]) for what in ("y", "dx")),
                    *zip(kept["after"], truth[name]["after"], strict=True),
                ):
                    relative, absolute = {BF16: (2**-8, 1e-5), F32: (1e-5, 1e-5), torch.int64: (0, 0)}[actual.dtype]
                    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=absolute)
            for name, gradient in gradients.items():
                norm, _, parameter = name.rpartition(".")
                each = [of_rank[norm][parameter] for of_rank in truths]
                scale = max(g.abs().max().item() for g in each)
                mean = torch.stack(each).sum(0) / RANKS
                assert gradient.dtype == F32
                torch.testing.assert_close(gradient.double(), mean, rtol=0, atol=2**-7 * scale)


def assert_dtypes(found: list[list[Any]], *expected: torch.dtype) -> None:
    """Of each batch norm's input, weight, running statistics and output."""
    seen = [kept for modes in found for records, *_ in modes for kept in records.values()]
    assert len(seen) == 4 * 2 * RANKS
    assert {(k["x"].dtype, k["weight"].dtype, k["after"][0].dtype, k["y"].dtype) for k in seen} == {expected}


def is_precise(kind: str, vectors: str) -> bool:
    """torch.nn keeps the batch's statistics in bfloat16 beside parameters of it."""
    return not (kind == "torch.nn" and vectors == "bfloat16")


def sharded(rank: int, kind: str, groups: str, policy: str, vectors: str) -> Any:
    model = build(kind, F32)
    options = {"param_dtype": BF16, **POLICIES[policy]}
    for norm in norms(model).values():
        if vectors == "bfloat16":
            norm.running_mean, norm.running_var = norm.running_mean.to(BF16), norm.running_var.to(BF16)
    for part in parts(model, groups):
        own = dict(options)
        if part is not model:
            own.pop("output_dtype", None)
        if vectors == "float32" and part in norms(model).values():
            own = {}
        fully_shard(part, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=MixedPrecisionPolicy(**own))
    x = batch(rank, 0, dtype=F32 if options.get("cast_forward_inputs", True) else BF16)
    return both_modes(rank, model, model, x, lambda: gradients_of_norms(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("groups", "vectors"), [("norms", "float32"), ("norms", "bfloat16"), ("whole", "bfloat16")])
def test_fully_shard(workers: Workers, kind: str, policy: str, groups: str, vectors: str) -> None:
    """Batch norms are left in float32, or are in bfloat16 altogether; the first one's results are like torch.nn's."""
    found, stock = (workers.run_once(sharded, k, groups, policy, vectors) for k in (kind, "torch.nn"))
    assert_dtypes(found, BF16, *VECTORS[vectors], BF16)
    assert {modes[0][2] for modes in found} == {F32 if policy == "float32 output" else BF16}
    if is_precise(kind, vectors):
        assert_right(found)
    slack = 1e-5 if is_precise("torch.nn", vectors) else 2**-6
    for modes, modes_of_stock in zip(found, stock, strict=True):
        for (records, *_), (records_of_stock, *_) in zip(modes, modes_of_stock, strict=True):
            ours, theirs = records["branch"], records_of_stock["branch"]
            torch.testing.assert_close(ours["y"], theirs["y"], rtol=2**-7, atol=slack)
            torch.testing.assert_close(ours["after"], theirs["after"], rtol=slack, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("groups", GROUPS)
def test_float32_statistics(workers: Workers, policy: str, groups: str) -> None:
    """fully_shard's own way with a param_dtype: it casts weight and bias, and leaves buffers alone."""
    found = workers.run(sharded, "bn_ext", groups, policy, "mixed")
    assert_dtypes(found, BF16, *VECTORS["mixed"], BF16)
    assert_right(found)


def with_residual(rank: int, vectors: str) -> list[Any]:
    """One batch norm with all that it can do inside."""
    norm = bn_ext.BatchNorm2d(3, activation="relu")
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    if vectors == "bfloat16":
        norm.running_mean, norm.running_var = norm.running_mean.to(BF16), norm.running_var.to(BF16)
    policy = MixedPrecisionPolicy(param_dtype=None if vectors == "float32" else BF16)
    weight = norm.weight.detach().to(policy.param_dtype or F32)
    fully_shard(norm, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy)
    x, z = (leaf(batch(0, 0, part, BF16)) for part in range(2))
    y = norm(x, z)
    loss(y.float()).backward()
    return [weight, x.detach(), z.detach(), y.detach(), x.grad, z.grad, *gradients_of(norm).values()]


@pytest.mark.parametrize("vectors", VECTORS)
def test_activation_and_residual(workers: Workers, vectors: str) -> None:
    """The same batch in both processes: gradients are those of one."""
    for weight, x, z, y, dx, dz, dweight, dbias in workers.run(with_residual, vectors):
        leaves = [t.double().requires_grad_() for t in (x, z, weight, torch.zeros(3))]
        truth = (F.batch_norm(leaves[0], None, None, *leaves[2:], training=True) + leaves[1]).relu()
        torch.testing.assert_close(y.double(), truth.detach(), rtol=2**-8, atol=1e-5)
        rounded = leaf(y.float())
        (dy,) = torch.autograd.grad(loss(rounded), rounded)
        expected = torch.autograd.grad(truth, leaves, dy.to(BF16).double())
        for actual, gradient in zip((dx, dz, dweight, dbias), expected, strict=True):
            torch.testing.assert_close(actual.double(), gradient, rtol=2**-8, atol=1e-4)


def flat(rank: int, kind: str, blocks: bool, buffer_dtype: torch.dtype | None) -> Any:
    """FSDP's first version."""
    model = build(kind, F32)
    parallel = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}) if blocks else None,
        mixed_precision=MixedPrecision(param_dtype=BF16, reduce_dtype=BF16, buffer_dtype=buffer_dtype),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )

    def gradients() -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(parallel, with_grads=True):
            return gradients_of_norms(model)

    wrapped = [name for name, module in parallel.named_modules() if isinstance(module, FullyShardedDataParallel)]
    return wrapped, both_modes(rank, model, parallel, batch(rank, 0, dtype=F32), gradients)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [True, False])
def test_fully_sharded_data_parallel(workers: Workers, kind: str, blocks: bool) -> None:
    """With a policy for wrapping it keeps batch norms in float32, which it knows by their class; else nothing."""
    found, stock = (workers.run_once(flat, k, blocks, BF16) for k in (kind, "torch.nn"))
    assert [wrapped for wrapped, _ in found] == [wrapped for wrapped, _ in stock]
    assert len(found[0][0]) == (6 if blocks else 1)
    modes = [modes for _, modes in found]
    assert_dtypes(modes, *((F32, F32, F32, BF16) if blocks else (BF16, BF16, BF16, BF16)))
    if is_precise(kind, "float32" if blocks else "bfloat16"):
        assert_right(modes)


def test_fully_sharded_data_parallel_with_float32_statistics(workers: Workers) -> None:
    """Without a policy for wrapping, and with buffers left alone."""
    modes = [modes for _, modes in workers.run(flat, "bn_ext", False, None)]
    assert_dtypes(modes, BF16, BF16, F32, BF16)
    assert_right(modes)
