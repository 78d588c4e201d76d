"""Count the memory of tensors by looking at every operator's results: how much is alive, how much was at most."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Add up the storages that are made while this is on: each once, until it is freed.

    A storage counts from the end of the operator that gives it; what an operator allocates and frees inside is not
    seen. Storages that were there before are left out, also when an operator returns a view of them or writes to them.
    Backward counts too on a CPU, where it runs in the thread that calls it.

    Nothing is kept alive. This sees what saved-tensor hooks hold as well, which hooks around it would not: only the
    innermost ones are called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._live: dict[int, int] = {}  # bytes of each storage, by its address in C++

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at its results."""
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for tensor in tensors(results):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and storage._cdata not in given:
                self._live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                # Called as soon as no tensor uses the storage: C++ keeps its Python object as long as itself.
                weakref.finalize(storage, self._freed, storage._cdata).atexit = False
        self.peak = max(self.peak, self.now)
        return results

    def _freed(self, address: int) -> None:
        self.now -= self._live.pop(address)

    def alive(self) -> int:
        """Give the bytes that are alive now, garbage in cycles aside."""
        gc.collect()
        return self.now


def tensors(tree: Any) -> list[Tensor]:
    """List the tensors with a storage in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def storage_bytes(these: Iterable[Tensor]) -> int:
    """Add up the storages of some tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in these}
    return sum(storages.values())
