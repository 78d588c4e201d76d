"""A model in one of its variants, with its optimizer and a batch: what is checked, counted, profiled and timed."""

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bn_ext

from ..inputs import LAYOUTS, SEED
from .memory import LiveBytes, storage_bytes, tensors
from .models import CLASSES, MODELS

STOCK = "stock"


class Variant(NamedTuple):
    """What becomes of a stock model."""

    prepare: Callable[[nn.Module], nn.Module]
    compiled: bool = False  # by torch.compile in its default mode, which makes no CUDA graphs


VARIANTS = {
    STOCK: Variant(lambda model: model),
    "converted": Variant(lambda model: bn_ext.convert(model)),
    "fused": Variant(lambda model: bn_ext.fuse(model)),
    "fused+recompute": Variant(lambda model: bn_ext.fuse(model, recompute=True)),
    "stock+compile": Variant(lambda model: torch.compile(model), compiled=True),
    "fused+compile": Variant(lambda model: torch.compile(bn_ext.fuse(model)), compiled=True),
}


class Batch(NamedTuple):
    """What a step is made on."""

    images: Tensor  # (N, 3, H, W)
    labels: Tensor  # (N,), int64


def draw(count: int, size: int, device: torch.device, layout: str, dtype: torch.dtype = torch.float32) -> Batch:
    """Draw images and their labels, the same ones on every call."""
    random = torch.Generator(device).manual_seed(SEED)
    images = torch.randn(count, 3, size, size, generator=random, device=device, dtype=dtype)
    labels = torch.randint(CLASSES, (count,), generator=random, device=device)
    return Batch(images.contiguous(memory_format=LAYOUTS[layout]), labels)


class Trainee:
    """A model in one variant, in training."""

    def __init__(self, model: str, variant: str, batch: Batch, layout: str, dtype: torch.dtype):
        device = batch.images.device
        self.model_name, self.variant, self.layout = model, variant, layout
        torch.manual_seed(SEED)  # the same parameters for all variants
        with device:
            stock = MODELS[model]()
        stock = stock.to(dtype=batch.images.dtype, memory_format=LAYOUTS[layout])
        self.model = VARIANTS[variant].prepare(stock)
        self.compiled = VARIANTS[variant].compiled
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.batch, self.dtype, self.device = batch, dtype, device

    def forward(self) -> Tensor:
        """Give the loss, with its graph."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            return nn.functional.cross_entropy(self.model(self.batch.images), self.batch.labels)

    def step(self) -> Tensor:
        """Make a training step; the gradients stay until the next one."""
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def resident_bytes(self) -> int:
        """Count what is there between two steps: parameters, buffers, momentum and the batch."""
        state = tensors(self.optimizer.state_dict()["state"])
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *state, *self.batch])

    def step_in_bytes(self) -> dict[str, int]:
        """Make a step, not the first, and count what forward leaves for backward and what there is at most.

        On a GPU the allocator counts; on a CPU every operator is looked at, which compiled code does not let happen.
        """
        self.optimizer.zero_grad()
        resident = self.resident_bytes()
        if self.device.type == "cuda":
            saved, added = self._allocated()
        elif not self.compiled:
            saved, added = self._live()
        else:
            return {"resident_bytes": resident}
        return {"saved_bytes": saved, "peak_bytes": resident + added, "resident_bytes": resident}

    def _allocated(self) -> tuple[int, int]:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        loss = self.forward()
        gc.collect()
        saved = torch.cuda.memory_allocated(self.device) - before - loss.nbytes
        loss.backward()
        self.optimizer.step()
        return saved, torch.cuda.max_memory_allocated(self.device) - before

    def _live(self) -> tuple[int, int]:
        with LiveBytes() as memory:
            loss = self.forward()
            saved = memory.alive() - loss.nbytes
            loss.backward()
            self.optimizer.step()
        return saved, memory.peak
