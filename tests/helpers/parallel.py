"""For the tests of training in two processes: a model, what both do with it, and the same in one process."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import bn_ext
from helpers.derivatives import loss

RANKS, STEPS = 2, 3
KINDS = ["torch.nn", "bn_ext", "converted", "fused", "recomputed"]
HOWS = ["one", "accumulated", "two forwards"]
"""What a step is: one forward and backward, two of them, or two forwards before one backward."""


class Block(nn.Module):
    """Batch norm and activation, and batch norm, addition and activation."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(5, 5, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = (library.BatchNorm2d(5) for _ in range(2))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Model(nn.Module):
    """A residual network with a branch that need not be used; the shards of two processes are of unequal size."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, bias=False)
        self.branch = library.BatchNorm2d(5)
        self.block = Block(library)
        self.bn = library.BatchNorm1d(5, momentum=None)
        self.head = nn.Linear(5, 5)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.stem(x)
        x = self.block(x + self.branch(x) if branch else x)
        return self.head(self.bn(x.mean((2, 3))))


def build(kind: str, dtype: torch.dtype = torch.float64) -> Model:
    """The model with torch's batch norms or this package's, always with the same values."""
    torch.manual_seed(1)
    model = Model(bn_ext if kind == "bn_ext" else nn)
    for norm in norms(model).values():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    if kind == "converted":
        bn_ext.convert(model)
    elif kind in ("fused", "recomputed"):
        bn_ext.fuse(model)
    return model.to(dtype)


def norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms of a model, by name."""
    return {clean(n): m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def clean(name: str) -> str:
    """A name as if no module were wrapped by FullyShardedDataParallel."""
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")


def batch(rank: int, step: int, part: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images, others for each rank, step and part of a step."""
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + part)
    return torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=generator).to(dtype)


def disturb(model: nn.Module) -> None:
    """Give another rank's buffers values of their own."""
    for buffer in model.buffers():
        buffer.data.copy_(2 * buffer + 1)


def copied(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A state of a model, to stay as it is: whole tensors in the place of sharded ones, names as if none were."""
    return {clean(name): whole(tensor) for name, tensor in tensors.items()}


def whole(tensor: Any) -> Any:
    """A copy of a tensor, of all shards if it is sharded."""
    if tensor is None:
        return None
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def gradients_of(model: nn.Module) -> dict[str, Any]:
    """Those of all parameters; 0 where there is none."""
    return copied({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})


def forward_pass(kind: str) -> Any:
    """The context in which a kind of model runs."""
    return bn_ext.recompute() if kind == "recomputed" else contextlib.nullcontext()


def optimizer_of(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(
    rank: int,
    kind: str,
    model: nn.Module,
    parallel: Any,
    how: str = "one",
    branch: bool = True,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = optimizer_of,
    gradients: Callable[[nn.Module], dict[str, Any]] = gradients_of,
) -> dict[str, Any]:
    """Some steps of one of several processes; all that a user may look at."""
    seen: list[Any] = []
    dtype = next(model.parameters()).dtype
    if rank == 1:
        disturb(model)
    handle = model.register_forward_pre_hook(lambda *_: seen.append(copied(dict(model.named_buffers()))))
    optimizer = make_optimizer(parallel.parameters())
    found: dict[str, Any] = {"buffers at the start": seen, "losses": [], "gradients": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        values = []
        for part in range(1 if how == "one" else 2):
            wait = how == "accumulated" and part == 0
            with parallel.no_sync() if wait else contextlib.nullcontext():
                with forward_pass(kind):
                    values.append(loss(parallel(batch(rank, step, part, dtype), branch)))
                if how != "two forwards":
                    values[-1].backward()
        if how == "two forwards":
            (values[0] + values[1]).backward()
        found["losses"].append([value.detach() for value in values])
        found["gradients"].append(gradients(model))
        optimizer.step()
    handle.remove()
    found["buffers"] = copied(dict(model.named_buffers()))
    return found


@functools.cache
def in_one_process(
    how: str = "one",
    broadcast: bool = True,
    branch: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float64,
) -> list[dict[str, Any]]:
    """What `train` is to find in each process, with torch.nn: gradients are the means of two models' gradients.

    With `broadcast`, the buffers of the first are given to the other before each forward pass of a step's own.
    """
    models = [build("torch.nn", dtype) for _ in range(RANKS)]
    disturb(models[1])
    optimizers = [optimizer_of(model.parameters()) for model in models]
    found: list[dict[str, Any]] = [{"buffers at the start": [], "losses": [], "gradients": []} for _ in models]
    for step in range(STEPS):
        values: list[list[Tensor]] = [[] for _ in models]
        for part in range(1 if how == "one" else 2):
            if broadcast and (part == 0 or how == "two forwards"):
                for ours, theirs in zip(models[0].buffers(), models[1].buffers(), strict=True):
                    theirs.data.copy_(ours)
            for rank, model in enumerate(models):
                found[rank]["buffers at the start"].append(copied(dict(model.named_buffers())))
                values[rank].append(loss(model(batch(rank, step, part, dtype), branch[rank])))
        for rank, model in enumerate(models):
            model.zero_grad()
            sum(values[rank]).backward()
            found[rank]["losses"].append([value.detach() for value in values[rank]])
        each = [gradients_of(model) for model in models]
        mean = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
        for rank, model in enumerate(models):
            found[rank]["gradients"].append(mean)
            for name, parameter in model.named_parameters():
                parameter.grad = mean[name].clone()
            optimizers[rank].step()
    for rank, model in enumerate(models):
        found[rank]["buffers"] = copied(dict(model.named_buffers()))
    return found


GROUPS = ["norms", "blocks", "whole"]
"""What is sharded together: each batch norm by itself, or with its block, or with all."""


def parts(model: nn.Module, groups: str) -> list[nn.Module]:
    """The modules to shard, inner ones first."""
    blocks = [] if groups == "whole" else [m for m in model.modules() if isinstance(m, Block)]
    return [*(norms(model).values() if groups == "norms" else ()), *blocks, model]


def shard(model: nn.Module, groups: str, **options: Any) -> Any:
    """Shard a model in place by fully_shard."""
    for part in parts(model, groups):
        fully_shard(part, mesh=init_device_mesh("cpu", (RANKS,)), **options)
    return model
