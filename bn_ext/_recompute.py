"""`recompute`: backward recomputes the outputs of batch norms instead of keeping them."""

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
    """Context manager: backward recomputes the outputs of this package's batch norms instead of keeping them.

    A layer after a batch norm, such as a convolution, keeps its input for backward. That input is cheap to recompute
    from the tensors that the batch norm keeps anyway: its own input and a few numbers per channel. Inside the block, a
    layer that saves an output of a batch norm saves a recipe instead. Backward recomputes the output once, no matter
    how many layers saved it. This saves memory if the batch norm computes the activation (see `bn_ext.fuse`); if a
    separate activation changes the output in place, or later layers save the activation's result, it saves nothing.

    These tensors are kept as usual: an output that is changed in place; a view of an output; an output whose residual
    nothing else keeps; tensors saved inside torch.utils.checkpoint or other saved-tensor hooks, or with these around
    the block; and all tensors in compiled or traced code or under a TorchFunctionMode such as that of
    torch.set_default_device.

    It uses `torch.autograd.graph.saved_tensors_hooks` and therefore applies to the current thread only. Blocks may be
    nested, and one object may be entered several times.

    Raises:
        RuntimeError: In backward, if a kept tensor was changed in place after the forward pass, as without `recompute`.

    Numerics: results and gradients are bit-equal to those without `recompute`.

    Source: `torch.autograd.graph.saved_tensors_hooks`, torch's page on autograd mechanics.

    Examples:
        >>> norm, layer = bn_ext.BatchNorm1d(4, activation="relu"), torch.nn.Linear(4, 4)
        >>> with bn_ext.recompute():
        ...     loss = layer(norm(torch.randn(8, 4))).sum()
        >>> loss.backward()
        >>> norm.weight.grad.shape
        torch.Size([4])
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
    """Whether hooks can be set without disabling the hooks of other code, such as a checkpoint."""
    autograd: Any = torch._C._autograd
    if torch._C._is_tracing() or not autograd._saved_tensors_hooks_is_enabled():
        return False
    on_top = autograd._top_saved_tensors_default_hooks(True)
    return on_top is None or (outer is not None and on_top[0] == outer.pack)


class _Kept:
    """A tensor that is kept itself. It is detached, because a tensor that holds its own graph is never freed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = _version(tensor)

    def unchanged(self) -> Tensor:
        """The tensor, if its version is still the same; replaces torch's own check, which hooks disable."""
        version = _version(self.tensor)
        if version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(self.tensor.shape)} is at version {version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class Recipe:
    """The tensors and options from which one output is recomputed."""

    def __init__(
        self, input: _Kept, residual: _Kept | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        self._input, self._residual, self._saved, self._activation = input, residual, saved, activation
        self._output: Tensor | None = None
        self._requests = 0
        self._lock = threading.Lock()
        self.savers = 0
        """How often the output was saved; a backward pass requests it as often."""

    def output(self) -> Tensor:
        """The output, which is held until all savers have requested it or backward ends."""
        with self._lock:
            output = self._output
            if output is None:
                output = self._output = self._recompute()
                _after_backward(self._release)
            self._requests += 1
            if self._requests >= self.savers:
                self._forget()
            return output

    def tensors(self) -> list[Tensor]:
        """All tensors that the recipe holds."""
        kept = [self._input, *([] if self._residual is None else [self._residual])]
        return [*(k.tensor for k in kept), self._saved]

    def _recompute(self) -> Tensor:
        input = self._input.unchanged()
        residual = None if self._residual is None else self._residual.unchanged()
        with torch.no_grad():
            y: Tensor = torch.ops.bn_ext.batch_norm_repeat(input, self._saved, residual, *self._activation)
        return y

    def _forget(self) -> None:
        self._output, self._requests = None, 0

    def _release(self) -> None:
        with self._lock:
            self._forget()


def _after_backward(call: Callable[[], None]) -> None:
    """Call a function at the end of the running backward pass; do nothing outside of a backward pass."""
    with contextlib.suppress(RuntimeError):
        torch.autograd.Variable._execution_engine.queue_callback(call)


class _Output:
    """The record of one output during the forward pass; it keeps no tensor of the output's size alive."""

    def __init__(
        self, y: Tensor, input: Tensor, residual: Tensor | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        self.storage = StorageWeakRef(y.untyped_storage())
        self.state = _state(y)
        self.input = _key(input)
        self.residual = None if residual is None else _key(residual)
        self.saved = saved
        self.activation = activation
        self.recipe: weakref.ref[Recipe] | None = None


class _Outputs:
    """The outputs of a forward pass, and the tensors that are kept for backward themselves."""

    def __init__(self) -> None:
        self._known: dict[int, _Output] = {}
        self._kept: weakref.WeakValueDictionary[Any, _Kept] = weakref.WeakValueDictionary()
        self._limit = 64

    def add(
        self, y: Tensor, input: Tensor, residual: Tensor | None, saved: Tensor, activation: tuple[str | None, float]
    ) -> None:
        """Record an output."""
        if len(self._known) >= self._limit:
            self._known = {key: known for key, known in self._known.items() if not known.storage.expired()}
            self._limit = 2 * len(self._known) + 64
        known = _Output(y, input, residual, saved, activation)
        self._known[known.storage.cdata] = known

    def pack(self, tensor: Tensor) -> Any:
        """The recipe that replaces a tensor until backward, or the tensor itself if it has none."""
        recipe = self._recipe(tensor)
        if recipe is not None:
            recipe.savers += 1
            return recipe
        kept = _Kept(tensor)
        if tensor.layout == torch.strided and type(tensor) is Tensor:
            self._kept[_key(tensor)] = kept
        return kept

    def _recipe(self, tensor: Tensor) -> Recipe | None:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return None
        # While _Output holds a weak reference to a storage, no other storage can have its address.
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None or _state(tensor) != known.state:
            return None
        recipe = None if known.recipe is None else known.recipe()
        if recipe is None:
            recipe = self._new_recipe(known)
            known.recipe = None if recipe is None else weakref.ref(recipe)
        return recipe

    def _new_recipe(self, known: "_Output") -> Recipe | None:
        """A recipe; None if it would keep a tensor that nothing else keeps."""
        input = self._kept.get(known.input)
        residual = None if known.residual is None else self._kept.get(known.residual)
        if input is None or (known.residual is not None and residual is None):
            return None
        return Recipe(input, residual, known.saved, known.activation)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's version, and its location in its storage."""
    return _version(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """Identifies a tensor as long as its storage lives; a kept tensor keeps its storage."""
    return tensor.untyped_storage()._cdata, *_state(tensor)


def _unpack(kept: Any) -> Tensor:
    return kept.output() if isinstance(kept, Recipe) else kept.unchanged()


class _Local(threading.local):
    outputs: _Outputs | None = None


_local = _Local()


def current() -> _Outputs | None:
    """The record of this thread's outputs; None outside of `recompute`."""
    return _local.outputs
