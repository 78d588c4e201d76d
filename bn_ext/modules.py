"""Modules that drop in for torch.nn's batch norms: they differ in the operator that does the work."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from bn_ext._eps import HIDDEN, GuardedEps, hidden_eps, lost_activation
from bn_ext.activations import NAMES, Activation, apply, describe, resolve
from bn_ext.functional import batch_norm

_OF_ALL_MODULES = (_global_forward_hooks, _global_forward_pre_hooks)  # dicts, which torch changes in place
_MEMBERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
OPTIONS = ("activation", "skip_nonfinite", "skip_recomputed")
"""What the modules have beyond torch.nn's: arguments of the constructor, and attributes."""


class _FusedForward(torch.nn.modules.batchnorm._BatchNorm):
    """torch.nn's constructor and forward with this package's operator and what that does beyond torch's."""

    __constants__ = [*torch.nn.modules.batchnorm._BatchNorm.__constants__, *OPTIONS, "_names"]  # noqa: RUF012
    _names = list(NAMES)  # noqa: RUF012, torch.jit.script takes no tuple here

    activation: tuple[str, float] | None = None
    """Name and parameter of what forward() applies to its result. It may be set to all that `batch_norm` takes."""
    skip_nonfinite: bool = False
    """Whether channels keep running statistics that a batch would make inf or NaN."""
    skip_recomputed: bool = False
    """Whether a forward pass that runs again within backward, as for a checkpoint, updates and counts nothing."""

    eps = GuardedEps()
    if HIDDEN:
        _hidden_eps = hidden_eps
        __jit_unused_properties__ = ["_hidden_eps"]

    _has_properties = False
    """Whether a subclass defines a parameter or buffer as something else."""

    def __init__(
        self,
        *args: Any,
        activation: Activation = None,
        skip_nonfinite: bool = False,
        skip_recomputed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation  # type: ignore[assignment]
        self.skip_nonfinite = skip_nonfinite
        self.skip_recomputed = skip_recomputed

    def __setattr__(self, name: str, value: Any) -> None:
        """Take an activation of any kind by its name: a module would become a child. Refuse flags that are none."""
        if name == "activation":
            value = None if value is None else resolve(value)
        elif name in OPTIONS and not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        elif name == "__class__" and self.activation is not None and not issubclass(value, _FusedForward):
            raise lost_activation(f"the class {value.__name__}", self)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """All that may be read."""
        return [name for name in super().__dir__() if name != "eps" or self.activation is None]

    def __init_subclass__(cls) -> None:
        """Show the constructor's arguments: those of the torch in use, and those of this class."""
        super().__init_subclass__()
        cls._has_properties = any(hasattr(cls, name) for name in _MEMBERS)
        if cls.__init__ is not _FusedForward.__init__:
            return

        @functools.wraps(_FusedForward.__init__)
        def construct(self: _FusedForward, *args: Any, **kwargs: Any) -> None:
            _FusedForward.__init__(self, *args, **kwargs)

        shown = list(inspect.signature(super().__init__).parameters.values())
        own = inspect.signature(_FusedForward.__init__).parameters.values()
        shown += [parameter for parameter in own if parameter.kind == inspect.Parameter.KEYWORD_ONLY]
        construct.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[method-assign]

    def extra_repr(self) -> str:
        """torch.nn's, and what differs from it."""
        shown = [super().extra_repr()]
        if self.activation is not None:
            shown.append(f"activation={describe(self.activation)}")
        shown += [f"{name}=True" for name in OPTIONS[1:] if getattr(self, name)]
        return ", ".join(shown)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | tuple[str, float] | None = None,
        unlike: str | None = None,
    ) -> Tensor:
        """Normalise `input`, add `residual` and apply the activation; in training, update the running statistics.

        Args:
            input: (N, C, ...); see :func:`bn_ext.batch_norm`.
            residual: Added before the activation; like input, or None.
            activation: In place of the module's own, where that is None; what :func:`bn_ext.fuse` calls it with.
            unlike: "add" or "add_", a method of Tensor: adds a residual that is not like input (broadcast, another
                dtype, a number), which is refused otherwise; then the activation runs by itself too.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if unlike is not None:
                assert residual is not None, "unlike needs a residual"
                alike = residual.shape == input.shape and residual.dtype == input.dtype
                assert alike, "a scripted batch norm takes only a residual of its input's shape and dtype"
            return self._scripted_forward(input, residual, activation)
        return self._forward(input, residual, activation, unlike)

    def _forward(self, input: Tensor, residual: Tensor | None, activation: Activation, unlike: str | None) -> Tensor:
        if isinstance(input, Proxy):
            path = _path_in_graph(self, input)
            if path:
                options = {"activation": activation, "unlike": unlike}
                return _call_in_graph(self, path, input, residual, options)
        if unlike is not None and not _alike(input, residual):
            return apply(getattr(self.forward(input), unlike)(residual), resolve(activation))
        if not isinstance(input, Proxy):  # there are no dimensions to look at
            self._check_input_dim(input)
        if activation is None:
            activation = self.activation
        elif self.activation is not None:
            raise ValueError(f"forward() was given activation={activation!r}, but the module has one: {self}")
        mean, var, count = self._member("running_mean"), self._member("running_var"), None
        try:
            eps = self._hidden_eps if HIDDEN and is_compiling() else self.__dict__["eps"]
        except KeyError:  # a Parameter, or a property of a subclass
            eps = self.eps
        training, momentum = bool(self.training), self.momentum
        if training:
            if self.track_running_stats:
                count = self._member("num_batches_tracked")
                momentum = 0.0 if momentum is None and count is None else momentum
            else:
                mean = var = None
        else:
            training = mean is None and var is None
        return batch_norm(
            *(input, mean, var, self._member("weight"), self._member("bias"), training, momentum, eps),
            num_batches_tracked=count,
            activation=activation,
            residual=residual,
            skip_nonfinite=self.skip_nonfinite,
            skip_recomputed=self.skip_recomputed,
        )

    def _scripted_forward(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | tuple[str, float] | None,
    ) -> Tensor:
        """_forward() in the Python that torch.jit.script compiles.

        Without options of its own it is torch's operator, which alone torch.jit.freeze folds and other passes know.
        """
        self._check_input_dim(input)
        training = self.training or (self.running_mean is None and self.running_var is None)
        is_tracked = self.track_running_stats or not self.training
        mean: Tensor | None = self.running_mean if is_tracked else None
        var: Tensor | None = self.running_var if is_tracked else None
        count: Tensor | None = self.num_batches_tracked if is_tracked and self.training else None
        if self.activation is not None:
            assert activation is None, "forward() was given an activation, but the module has one"
            return self._operator(input, mean, var, count, training, residual, self.activation)
        elif self.skip_nonfinite or self.skip_recomputed:
            return self._operator(input, mean, var, count, training, residual, activation)
        else:
            if training and input.numel() == input.size(1):
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
            name, parameter = "", 0.0
            if activation is not None:
                name, parameter = self._name_and_parameter(activation)
                assert name in self._names, f"activation must be one of {self._names}, got {name}"
            momentum = 0.0 if self.momentum is None else self.momentum
            if count is not None:
                count.add_(1)
                if self.momentum is None:
                    momentum = 1.0 / float(count)
            cudnn = torch.backends.cudnn.enabled
            y = torch.batch_norm(input, self.weight, self.bias, mean, var, training, momentum, self.eps, cudnn)
            y = y if residual is None else y + residual
            return y if activation is None else torch.ops.bn_ext.activate(y, name, parameter)

    def _operator(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        count: Tensor | None,
        training: bool,
        residual: Tensor | None,
        activation: str | tuple[str, float] | None,
    ) -> Tensor:
        name: str | None = None
        parameter = 0.0
        if activation is not None:
            name, parameter = self._name_and_parameter(activation)
        y: Tensor = torch.ops.bn_ext.batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training,
            0.0 if self.momentum is None and count is None else self.momentum,
            self.eps,
            num_batches_tracked=count,
            residual=residual,
            activation=name,
            activation_parameter=parameter,
            skip_nonfinite=self.skip_nonfinite,
            skip_recomputed=self.skip_recomputed,
        )
        return y

    def _name_and_parameter(self, activation: str | tuple[str, float]) -> tuple[str, float]:
        """resolve()'s, in the Python that torch.jit.script compiles."""
        if isinstance(activation, str):
            return activation, 0.01 if activation == "leaky_relu" else 1.0 if activation == "elu" else 0.0
        return activation

    def _member(self, name: str) -> Any:
        """self.name, found at once: torch.nn.Module searches long, and on small tensors that shows."""
        if self._has_properties:
            return getattr(self, name)
        if name in self._parameters:
            return self._parameters[name]
        return self._buffers[name] if name in self._buffers else getattr(self, name)


def _path_in_graph(module: torch.nn.Module, input: Proxy) -> str:
    """Where a module lies in the model that torch.fx.symbolic_trace goes through; empty if it is no part of one."""
    try:
        return str(input.tracer.path_of_module(module))  # type: ignore[attr-defined]
    except (AttributeError, NameError):  # another kind of tracer; a module from elsewhere
        return ""


def _call_in_graph(module: torch.nn.Module, path: str, input: Proxy, residual: object, options: dict[str, Any]) -> Any:
    """One call in the graph, as torch.nn's modules come out; training stays the module's own."""
    create, arguments = input.tracer.create_proxy, (input,) if residual is None else (input, residual)
    given = {name: value for name, value in options.items() if value is not None}
    if _is_plain(module):
        return create("call_module", path, arguments, given)
    return create("call_function", plain_forward, (create("get_attr", path, (), {}), *arguments), given)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a call is this package's forward(): what hooks and subclasses do besides lies in the graph already."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, *_OF_ALL_MODULES)
    forward = type(module).forward
    is_ours = forward is _FusedForward.forward or forward.__module__ == "bn_ext._timm"
    return is_ours and "forward" not in vars(module) and not any(hooks)


def plain_forward(module: _FusedForward, *args: Any, **kwargs: Any) -> Any:
    """The module's forward(), without hooks and without what a subclass adds; for graphs of torch.fx."""
    return _FusedForward.forward(module, *args, **kwargs)


def _alike(input: Tensor, residual: object) -> bool:
    """Whether one operator can do both; torch.fx.symbolic_trace cannot tell."""
    if isinstance(input, Proxy) or not isinstance(residual, Tensor):
        return False
    return residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device


class BatchNorm1d(_FusedForward, torch.nn.BatchNorm1d):
    """Drop-in for :class:`torch.nn.BatchNorm1d`: (N, C) or (N, C, L) input.

    Same arguments, parameters, buffers, state_dict, numbers and errors as the torch in use; see
    :func:`bn_ext.batch_norm` for the operation, its dtypes and its numerics.
    """


class BatchNorm2d(_FusedForward, torch.nn.BatchNorm2d):
    """Drop-in for :class:`torch.nn.BatchNorm2d`: (N, C, H, W) input, contiguous or channels_last.

    Same arguments, parameters, buffers, state_dict, numbers and errors as the torch in use; see
    :func:`bn_ext.batch_norm` for the operation, its dtypes and its numerics.
    """


class BatchNorm3d(_FusedForward, torch.nn.BatchNorm3d):
    """Drop-in for :class:`torch.nn.BatchNorm3d`: (N, C, D, H, W) input, contiguous or channels_last_3d.

    Same arguments, parameters, buffers, state_dict, numbers and errors as the torch in use; see
    :func:`bn_ext.batch_norm` for the operation, its dtypes and its numerics.
    """


class LazyBatchNorm1d(_FusedForward, torch.nn.LazyBatchNorm1d):
    """Drop-in for :class:`torch.nn.LazyBatchNorm1d`: becomes a :class:`BatchNorm1d` at its first forward pass."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_FusedForward, torch.nn.LazyBatchNorm2d):
    """Drop-in for :class:`torch.nn.LazyBatchNorm2d`: becomes a :class:`BatchNorm2d` at its first forward pass."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_FusedForward, torch.nn.LazyBatchNorm3d):
    """Drop-in for :class:`torch.nn.LazyBatchNorm3d`: becomes a :class:`BatchNorm3d` at its first forward pass."""

    cls_to_become = BatchNorm3d
