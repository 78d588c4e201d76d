"""Which calls of forward() only return a value, and which read or change state that a graph does not record."""

import builtins
import operator
import types
from typing import Any

from bn_ext._contents import is_library

DECORATORS = {("contextlib", "inner"), ("torch.utils._contextlib", "decorate_context")}
HARMLESS_MODULES = {
    *("torch", "bn_ext", "numpy", "functorch", "abc", "collections", "_collections_abc", "copy", "dataclasses", "enum"),
    *("functools", "inspect", "itertools", "math", "numbers", "operator", "types", "typing", "weakref"),
}
TRACING_MODULES = ("torch.fx", "torch.overrides", "torch.utils._python_dispatch")
EFFECTFUL_MODULES = (
    *("torch.autograd.anomaly_mode", "torch.autograd.grad_mode", "torch.utils._python_dispatch"),
    *("torch.accelerator", "torch.autograd.profiler", "torch.backends", "torch.cuda", "torch.distributed", "torch.hub"),
    *("torch.mps", "torch.multiprocessing", "torch.profiler", "torch.serialization", "torch.utils.checkpoint"),
    *("torch.xpu",),
)
_HARMLESS_BUILTINS = {"builtins", "_operator", "math", "cmath", "_functools", "itertools", "_collections", "_abc"}
_TENSOR_PREDICATES = (
    "is_tensor",
    "is_floating_point",
    "is_complex",
    "is_nonzero",
    "is_signed",
    "is_same_size",
    "is_conj",
    "is_neg",
)
READS_OF_VALUES = ("tolist", "numpy", "data_ptr", "register_hook", "backward")  # no operator of torch runs
SEEDS = ("manual_seed", "seed")  # torch.compile wraps some of them
INTROSPECTION = (id, dir, callable, operator.is_, operator.is_not)  # traced values return other results
_EFFECTS = (print, open, input, exec, eval, compile, breakpoint, __import__, globals)
_MODE_GETTERS = (
    *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_compiling", "is_tracing"),
    *("is_in_onnx_export", "get_autocast_dtype", "_get_tracing_state"),
)
MACHINERY = ("torch.nn.modules.module", "torch.nn.parameter")
OBSERVERS = ("torch.fx.", "bn_ext.", "torch.utils._pytree.")


def is_harmless(function: Any) -> bool:
    """Whether a function written in C only returns a value or changes a watched container."""
    if function in _EFFECTS:
        return False
    owner, module = getattr(function, "__self__", None), getattr(function, "__module__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        # list.append, also of a subclass
        is_of_builtin = hasattr(builtins, str(function.__qualname__).partition(".")[0])
        module = "builtins" if is_of_builtin else type(owner).__module__
    name = str(module or "torch").partition(".")[0]
    return name in _HARMLESS_BUILTINS or name in HARMLESS_MODULES


def accesses_mode(caller: str, module: str, name: str) -> bool:
    """Whether a function of torch reads or sets a mode, a default or a flag, which a graph does not record."""
    if module.partition(".")[0] != "torch" or f"{module}.".startswith(OBSERVERS):
        return False
    if is_library(caller):
        return caller.startswith("torch.nn.") and caller not in MACHINERY and name in _MODE_GETTERS
    is_access = name.lstrip("_").startswith(("is_", "get_", "set_", "has_torch_function", "are_", "use_deterministic"))
    return is_access and not module.startswith("torch.nn") and name not in (*_TENSOR_PREDICATES, "is_scripting")
