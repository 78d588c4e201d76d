"""State around a trace (settings of torch, random number generators, training flags): set, restored, compared."""

import contextlib
import gc
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def in_mode(modules: list[torch.nn.Module], training: bool) -> Iterator[None]:
    """Set the training flag of all modules, and restore it afterwards."""
    with contextlib.ExitStack() as flags:  # restores all, even if one raises
        for module in modules:
            flags.callback(object.__setattr__, module, "training", module.training)
            object.__setattr__(module, "training", training)
        yield


@contextlib.contextmanager
def generators_restored() -> Iterator[list[Any]]:
    """Restore the states of random number generators; the list then holds those that were used."""
    before, used = _generators(), list[Any]()
    try:
        yield used
    finally:
        after = _generators()
        for (set_state, state, values), (_, _, values_after) in zip(before, after, strict=False):  # numpy may come
            if values != values_after:
                used.append(set_state)
                set_state(state)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Disable the garbage collector, which could run foreign callbacks in the middle of forward()."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def _generators() -> list[tuple[Any, Any, Any]]:
    """For each random number generator that forward() may use: the setter of its state, the state, and its values."""
    numpy = sys.modules.get("numpy")
    state = torch.get_rng_state()
    found: list[Any] = [(torch.set_rng_state, state, state.tolist()), (random.setstate, *[random.getstate()] * 2)]
    if numpy is not None:
        kind, key, *rest = numpy.random.get_state()
        found.append((numpy.random.set_state, (kind, key, *rest), [key.tolist(), *rest]))
    return found


_GRAD_MODES = torch.is_grad_enabled, torch.is_inference_mode_enabled
_SETTINGS = (
    *("are_deterministic_algorithms_enabled", "is_deterministic_algorithms_warn_only_enabled", "is_anomaly_enabled"),
    *("get_float32_matmul_precision", "get_default_dtype", "get_num_threads", "_get_cudnn_enabled"),
    *("_get_cudnn_benchmark", "_get_cudnn_deterministic", "_get_cudnn_allow_tf32", "_get_mkldnn_enabled"),
    *("_get_flash_sdp_enabled", "_get_math_sdp_enabled", "_get_mem_efficient_sdp_enabled"),
)
_settings = [function for name in _SETTINGS if (function := getattr(torch, name, getattr(torch._C, name, None)))]


def surroundings() -> tuple[Any, ...]:
    """The settings that affect an operation and that a graph does not record."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (
        *(enabled() for enabled in _GRAD_MODES),
        *(setting() for setting in _settings),
        *autocast,
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )
