"""`recompute`: outputs of batch norms are computed again in backward, instead of being kept for it."""

import contextlib
import threading
import weakref
from collections.abc import Callable
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
    is saved inside torch.utils.checkpoint or other saved-tensor hooks, also where these are around it; and all within
    compiled or traced code and under a TorchFunctionMode, as torch.set_default_device makes it.

    Uses :class:`torch.autograd.graph.saved_tensors_hooks`, and like these it holds for the thread that enters it. It
    may be entered within itself, and again after it was left.

    Raises:
        RuntimeError: In backward, where a tensor that is kept was changed in place since, as ever.
    """

    def __init__(self) -> None:
        self._entered: list[tuple[torch.autograd.graph.saved_tensors_hooks | None, _Outputs | None]] = []

    def __enter__(self) -> "recompute":
        if is_compiling():
            return self
        outer, hooks = current(), None
        if _may_hook(outer):
            outputs = outer or _Outputs()
            hooks = torch.autograd.graph.saved_tensors_hooks(outputs.pack, _unpack)
            hooks.__enter__()
            _local.outputs = outputs
        self._entered.append((hooks, outer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if is_compiling():
            return
        hooks, _local.outputs = self._entered.pop()
        if hooks is not None:
            hooks.__exit__(kind, error, traceback)


def _may_hook(outer: "_Outputs | None") -> bool:
    """Whether hooks can be set, and would not switch off those of somebody else, as of a checkpoint."""
    autograd: Any = torch._C._autograd
    if torch._C._is_tracing() or not autograd._saved_tensors_hooks_is_enabled():
        return False
    on_top = autograd._top_saved_tensors_default_hooks(True)
    return on_top is None or (outer is not None and on_top[0] == outer.pack)


class _Kept:
    """A tensor that is kept as it is. Detached: one that holds its own graph would never be freed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = _version(tensor)

    def unchanged(self) -> Tensor:
        """The tensor; in the place of torch's own check, which hooks switch off."""
        version = _version(self.tensor)
        if version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(self.tensor.shape)} is at version {version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class Recipe:
    """How one output is made again."""

    def __init__(
        self, input: _Kept, residual: _Kept | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        self._input, self._residual, self._saved, self._activation = input, residual, saved, activation
        self._output: Tensor | None = None
        self._asked = 0
        self._lock = threading.Lock()
        self.savers = 0
        """How many times it was saved: as often it is asked for in a backward pass."""

    def output(self) -> Tensor:
        """The output; it is held until all who saved it have asked, or backward is over."""
        with self._lock:
            output = self._output
            if output is None:
                output = self._output = self._repeat()
                _after_backward(self._release)
            self._asked += 1
            if self._asked >= self.savers:
                self._forget()
            return output

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        kept = [self._input, *([] if self._residual is None else [self._residual])]
        return [*(k.tensor for k in kept), self._saved]

    def _repeat(self) -> Tensor:
        input = self._input.unchanged()
        residual = None if self._residual is None else self._residual.unchanged()
        with torch.no_grad():
            y: Tensor = torch.ops.bn_ext.batch_norm_repeat(input, self._saved, residual, *self._activation)
        return y

    def _forget(self) -> None:
        self._output, self._asked = None, 0

    def _release(self) -> None:
        with self._lock:
            self._forget()


def _after_backward(call: Callable[[], None]) -> None:
    """Call at the end of the running backward pass; not at all outside of one."""
    with contextlib.suppress(RuntimeError):
        torch.autograd.Variable._execution_engine.queue_callback(call)


class _Output:
    """What is known of one output while the forward pass goes on; keeps no tensor of its size alive."""

    def __init__(
        self, y: Tensor, input: Tensor, residual: Tensor | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        self.storage = StorageWeakRef(y.untyped_storage())
        self.state = _state(y)
        self.input = _place(input)
        self.residual = None if residual is None else _place(residual)
        self.saved = saved
        self.activation = activation
        self.recipe: weakref.ref[Recipe] | None = None


class _Outputs:
    """The outputs of a forward pass, and the tensors that are kept for backward as they are."""

    def __init__(self) -> None:
        self._known: dict[int, _Output] = {}
        self._kept: weakref.WeakValueDictionary[Any, _Kept] = weakref.WeakValueDictionary()
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
        kept = _Kept(tensor)
        if tensor.layout == torch.strided and type(tensor) is Tensor:
            self._kept[_place(tensor)] = kept
        return kept

    def _recipe(self, tensor: Tensor) -> Recipe | None:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return None
        # While a weak reference is held, no other storage has its address.
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None or _state(tensor) != known.state:
            return None
        recipe = None if known.recipe is None else known.recipe()
        if recipe is None:
            recipe = self._new_recipe(known)
            known.recipe = None if recipe is None else weakref.ref(recipe)
        return recipe

    def _new_recipe(self, known: "_Output") -> Recipe | None:
        """None where a tensor that it needs is not kept anyway."""
        input = self._kept.get(known.input)
        residual = None if known.residual is None else self._kept.get(known.residual)
        if input is None or (known.residual is not None and residual is None):
            return None
        return Recipe(input, residual, known.saved, known.activation)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """The version, and where in its storage a tensor lies."""
    return _version(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Tells tensors apart while their storages live; whoever is kept keeps its storage."""
    return tensor.untyped_storage()._cdata, *_state(tensor)


def _unpack(kept: Any) -> Tensor:
    return kept.output() if isinstance(kept, Recipe) else kept.unchanged()


class _Local(threading.local):
    outputs: _Outputs | None = None


_local = _Local()


def current() -> _Outputs | None:
    """Where this thread's outputs are noted; None outside of :class:`recompute`."""
    return _local.outputs
