"""Drop-in modules for torch.nn's batch norms; only the operator differs."""

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

_GLOBAL_HOOKS = (_global_forward_hooks, _global_forward_pre_hooks)  # dicts, which torch changes in place
_MEMBERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
OPTIONS = ("activation", "skip_nonfinite", "skip_recomputed")  # arguments and attributes that torch.nn does not have


class _FusedForward(torch.nn.modules.batchnorm._BatchNorm):
    """torch.nn's constructor and forward(), with this package's operator and options."""

    __constants__ = [*torch.nn.modules.batchnorm._BatchNorm.__constants__, *OPTIONS, "_names"]  # noqa: RUF012
    _names = list(NAMES)  # noqa: RUF012, torch.jit.script accepts no tuple here

    activation: tuple[str, float] | None = None  # can be set to any activation that batch_norm accepts
    skip_nonfinite: bool = False
    skip_recomputed: bool = False

    eps = GuardedEps()
    if HIDDEN:
        _hidden_eps = hidden_eps
        __jit_unused_properties__ = ["_hidden_eps"]

    _has_properties = False  # whether a subclass defines the name of a parameter or buffer as a class attribute

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
        """Store an activation by name, because a module would become a child; reject options that are not bool."""
        if name == "activation":
            value = None if value is None else resolve(value)
        elif name in OPTIONS and not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        elif name == "__class__" and self.activation is not None and not issubclass(value, _FusedForward):
            raise lost_activation(f"the class {value.__name__}", self)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name != "eps" or self.activation is None]

    def __init_subclass__(cls) -> None:
        """Set the constructor's signature: the arguments of the torch in use, and those of this class."""
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
        """torch.nn's text, and each option that is not at its default."""
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
            input: (N, C, ...); `bn_ext.batch_norm` describes dtypes, result, errors and numerics.
            residual: Added before the activation: shape, dtype and device of input; or None.
            activation: Used if the module's own activation is None; `bn_ext.fuse` passes it.
            unlike: "add" or "add_", the Tensor method that adds a residual unlike input (broadcast, another dtype, a
                number); the activation is then a separate operation. None rejects such a residual.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if unlike is not None:
                assert residual is not None, "unlike requires a residual"
                alike = residual.shape == input.shape and residual.dtype == input.dtype
                assert alike, "a scripted batch norm requires a residual of its input's shape and dtype"
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
        if not isinstance(input, Proxy):  # a Proxy has no dimensions to check
            self._check_input_dim(input)
        if activation is None:
            activation = self.activation
        elif self.activation is not None:
            raise ValueError(f"forward() got activation={activation!r}, but the module has its own: {self}")
        mean, var, count = self._member("running_mean"), self._member("running_var"), None
        try:
            eps = self._hidden_eps if HIDDEN and is_compiling() else self.__dict__["eps"]
        except KeyError:  # eps is a Parameter, or a property of a subclass
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
        self, input: Tensor, residual: Tensor | None, activation: str | tuple[str, float] | None
    ) -> Tensor:
        """_forward() for torch.jit.script; without options, torch's operator, which TorchScript's passes recognise."""
        self._check_input_dim(input)
        training = self.training or (self.running_mean is None and self.running_var is None)
        is_tracked = self.track_running_stats or not self.training
        mean: Tensor | None = self.running_mean if is_tracked else None
        var: Tensor | None = self.running_var if is_tracked else None
        count: Tensor | None = self.num_batches_tracked if is_tracked and self.training else None
        if self.activation is not None:
            assert activation is None, "forward() got an activation, but the module has its own"
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
        """resolve() for torch.jit.script."""
        if isinstance(activation, str):
            return activation, 0.01 if activation == "leaky_relu" else 1.0 if activation == "elu" else 0.0
        return activation

    def _member(self, name: str) -> Any:
        """self.name without torch.nn.Module's search, which takes a visible share of the time of small tensors."""
        if self._has_properties:
            return getattr(self, name)
        if name in self._parameters:
            return self._parameters[name]
        return self._buffers[name] if name in self._buffers else getattr(self, name)


def _path_in_graph(module: torch.nn.Module, input: Proxy) -> str:
    """The module's path in the model that torch.fx.symbolic_trace traces; empty if it is not part of it."""
    try:
        return str(input.tracer.path_of_module(module))  # type: ignore[attr-defined]
    except (AttributeError, NameError):  # another tracer; a module of another model
        return ""


def _call_in_graph(module: torch.nn.Module, path: str, input: Proxy, residual: object, options: dict[str, Any]) -> Any:
    """Record one call in the graph, like a torch.nn module; the call follows the module's training flag."""
    create, arguments = input.tracer.create_proxy, (input,) if residual is None else (input, residual)
    given = {name: value for name, value in options.items() if value is not None}
    if _is_plain(module):
        return create("call_module", path, arguments, given)
    return create("call_function", plain_forward, (create("get_attr", path, (), {}), *arguments), given)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a call runs only this package's forward(); the trace records additions by hooks and subclasses."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, *_GLOBAL_HOOKS)
    forward = type(module).forward
    is_ours = forward is _FusedForward.forward or forward.__module__ == "bn_ext._timm"
    return is_ours and "forward" not in vars(module) and not any(hooks)


def plain_forward(module: _FusedForward, *args: Any, **kwargs: Any) -> Any:
    """Call the module's forward() without hooks and without additions of a subclass; for torch.fx graphs."""
    return _FusedForward.forward(module, *args, **kwargs)


def _alike(input: Tensor, residual: object) -> bool:
    """Whether one operator can add the residual too; False during torch.fx.symbolic_trace, which cannot check it."""
    if isinstance(input, Proxy) or not isinstance(residual, Tensor):
        return False
    return residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device


class BatchNorm1d(_FusedForward, torch.nn.BatchNorm1d):
    """Drop-in for `torch.nn.BatchNorm1d`: (N, C) or (N, C, L) input; the arguments are those of `BatchNorm2d`.

    Examples:
        >>> bn_ext.BatchNorm1d(3)(torch.zeros(4, 3)).shape
        torch.Size([4, 3])
    """


class BatchNorm2d(_FusedForward, torch.nn.BatchNorm2d):
    """Drop-in for `torch.nn.BatchNorm2d`: (N, C, H, W) input, contiguous or channels_last.

    Equivalent to torch.nn.BatchNorm2d, then addition and activation. Parameters, buffers, state_dict, numbers and
    errors are those of the torch in use. `bn_ext.batch_norm` describes dtypes, numerics, determinism and the source.

    Args:
        *args: torch.nn.BatchNorm2d's: num_features (C), eps, momentum, affine, track_running_stats, device, dtype.
        activation: Applied to the result, as in `bn_ext.batch_norm`.
        skip_nonfinite: Whether a channel keeps its running statistics if a batch would make one of them inf or NaN.
        skip_recomputed: Whether a forward pass inside a backward pass, as in a checkpoint, updates and counts nothing.

    Examples:
        >>> norm, x = bn_ext.BatchNorm2d(3, activation="relu"), torch.randn(2, 3, 4, 4)
        >>> torch.allclose(norm(x, residual=x), (torch.nn.BatchNorm2d(3)(x) + x).relu(), atol=1e-5)
        True
    """


class BatchNorm3d(_FusedForward, torch.nn.BatchNorm3d):
    """Drop-in for `torch.nn.BatchNorm3d`: (N, C, D, H, W) input; the arguments are those of `BatchNorm2d`.

    Examples:
        >>> bn_ext.BatchNorm3d(3)(torch.zeros(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """


class LazyBatchNorm1d(_FusedForward, torch.nn.LazyBatchNorm1d):
    """Drop-in for `torch.nn.LazyBatchNorm1d`; its first forward pass turns it into a `BatchNorm1d`.

    Examples:
        >>> bn_ext.LazyBatchNorm1d()(torch.zeros(4, 3)).shape
        torch.Size([4, 3])
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_FusedForward, torch.nn.LazyBatchNorm2d):
    """Drop-in for `torch.nn.LazyBatchNorm2d`; its first forward pass turns it into a `BatchNorm2d`.

    Examples:
        >>> bn_ext.LazyBatchNorm2d()(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_FusedForward, torch.nn.LazyBatchNorm3d):
    """Drop-in for `torch.nn.LazyBatchNorm3d`; its first forward pass turns it into a `BatchNorm3d`.

    Examples:
        >>> bn_ext.LazyBatchNorm3d()(torch.zeros(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    cls_to_become = BatchNorm3d
