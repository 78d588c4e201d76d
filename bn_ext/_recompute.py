"""`recompute`: outputs of batch norms are computed again in backward, instead of being kept for it."""

import threading
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef


class recompute:  # noqa: N801, as torch's context managers are named
    """Keep for backward how a batch norm's output is made, not the output.

    A layer behind a batch norm, as a convolution, keeps its input for its own backward. That input is cheap to compute
    again from what the batch norm keeps anyway: its own input and a few numbers per channel. Within ::

        with bn_ext.recompute():
            loss = model(images).mean()
        loss.backward()

    a layer that saves an output of this package's batch norms saves the recipe instead, and backward brings the output
    back, bit-equal and once, however many layers ask for it. Nothing else changes: not the weights' meaning, not a bit
    of the result. It pays where the activation is inside the batch norm (see :func:`bn_ext.fuse`); an output that a
    separate activation changes in place, or whose result is what later layers save, is kept as ever.

    Kept as ever, too: an output that was changed in place; a view of one; one with a residual that nobody keeps; what
    is saved inside torch.utils.checkpoint or other saved-tensor hooks; and all within compiled code.

    Uses :class:`torch.autograd.graph.saved_tensors_hooks`, and like these it holds for the thread that enters it. It
    may be entered within itself, and again after it was left.

    Raises:
        RuntimeError: In backward, where the batch norm's input or residual was changed in place since.
    """

    def __init__(self) -> None:
        self._entered: list[tuple[torch.autograd.graph.saved_tensors_hooks, _Outputs | None]] = []

    def __enter__(self) -> "recompute":
        if not is_compiling():
            outer = current()
            _local.outputs = outer or _Outputs()
            hooks = torch.autograd.graph.saved_tensors_hooks(_local.outputs.pack, _unpack)
            self._entered.append((hooks, outer))
            hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not is_compiling():
            hooks, _local.outputs = self._entered.pop()
            hooks.__exit__(kind, error, traceback)


class Recipe:
    """How one output is made again."""

    def __init__(
        self, input: Tensor, residual: Tensor | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        self._arguments = (input, saved, residual, *activation)
        self._sources = [(tensor, tensor._version) for tensor in (input, residual) if tensor is not None]
        self._output: Tensor | None = None
        self._asked = 0
        self.savers = 0
        """How many times it was saved: as often it is asked for in a backward pass."""

    def output(self) -> Tensor:
        """The output; it is held until all who saved it have asked."""
        if self._output is None:
            for tensor, version in self._sources:
                if tensor._version != version:
                    raise RuntimeError(
                        "one of the variables needed for gradient computation has been modified by an inplace "
                        f"operation: bn_ext.recompute needs a batch norm's input or residual of shape "
                        f"{tuple(tensor.shape)} as it was, at version {version}, but it is at version "
                        f"{tensor._version}; leave it alone until backward, or compute this part outside of recompute()"
                    )
            with torch.no_grad():
                self._output = torch.ops.bn_ext.batch_norm_repeat(*self._arguments)
        output = self._output
        self._asked += 1
        if self._asked % self.savers == 0:
            self._output = None
        return output


class _Output:
    """What is known of one output while the forward pass goes on; keeps no tensor of its size alive."""

    def __init__(
        self, y: Tensor, input: Tensor, residual: Tensor | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        self.storage = StorageWeakRef(y.untyped_storage())
        self.state = _state(y)
        self.input = weakref.ref(input)
        self.residual = None if residual is None else weakref.ref(residual)
        self.saved = saved
        self.activation = activation
        self.recipe: weakref.ref[Recipe] | None = None


class _Outputs:
    """The outputs of a forward pass, and the tensors that are kept for backward as they are."""

    def __init__(self) -> None:
        self._known: dict[int, _Output] = {}
        self._kept: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._limit = 64

    def add(
        self, y: Tensor, input: Tensor, residual: Tensor | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        """Learn of an output."""
        if len(self._known) >= self._limit:
            self._known = {key: known for key, known in self._known.items() if not known.storage.expired()}
            self._limit = 2 * len(self._known) + 64
        known = _Output(y, input, residual, saved, activation)
        self._known[known.storage.cdata] = known

    def pack(self, tensor: Tensor) -> Any:
        """What is to be kept for backward in the place of a tensor."""
        recipe = self._recipe(tensor)
        if recipe is not None:
            recipe.savers += 1
            return recipe
        self._kept[id(tensor)] = tensor
        return tensor

    def _recipe(self, tensor: Tensor) -> Recipe | None:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return None
        # While a weak reference is held, no other storage has its address.
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None or known.storage.expired() or _state(tensor) != known.state:
            return None
        recipe = None if known.recipe is None else known.recipe()
        if recipe is None:
            recipe = self._new_recipe(known)
            known.recipe = None if recipe is None else weakref.ref(recipe)
        return recipe

    def _new_recipe(self, known: "_Output") -> Recipe | None:
        """None where a tensor that it needs is not kept anyway."""
        input = self._if_kept(known.input)
        if input is None:
            return None
        residual = None if known.residual is None else self._if_kept(known.residual)
        if known.residual is not None and residual is None:
            return None
        return Recipe(input, residual, known.saved, known.activation)

    def _if_kept(self, reference: "weakref.ref[Tensor]") -> Tensor | None:
        tensor = reference()
        return tensor if tensor is not None and self._kept.get(id(tensor)) is tensor else None


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """The version, and where in its storage a tensor lies."""
    return tensor._version, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _unpack(kept: Any) -> Any:
    return kept.output() if isinstance(kept, Recipe) else kept


class _Local(threading.local):
    outputs: _Outputs | None = None


_local = _Local()


def current() -> _Outputs | None:
    """Where this thread's outputs are noted; None outside of :class:`recompute`."""
    return _local.outputs
