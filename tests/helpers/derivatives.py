"""For the tests of derivatives: this package's batch norm beside torch's, and the transforms to put both through."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, func
from torch.utils._python_dispatch import TorchDispatchMode

import bn_ext
from helpers import devices

EPS = 1e-3
Function = Callable[..., Any]


def normal(*shape: int, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Tensor:
    """Random values, the same on every device; layout "contiguous" or "channels_last", also with "_3d"."""
    memory_format = getattr(torch, layout if layout.startswith("channels") else "contiguous_format")
    values = torch.randn(shape, dtype=torch.float64).to(devices.current(), dtype)
    return values.contiguous(memory_format=memory_format)


def uniform(*shape: int) -> Tensor:
    """Random float32 values from 0 to 1, the same on every device."""
    return torch.rand(shape).to(devices.current())


def leaf(tensor: Tensor) -> Tensor:
    """A copy with the same strides that requires a gradient."""
    return torch.empty_like(tensor).copy_(tensor.detach()).requires_grad_()


def functions(
    channels: int,
    mode: str,
    momentum: float | None = 0.3,
    operator: Function = bn_ext.batch_norm,
) -> tuple[Function, Function]:
    """`f(input, weight, bias)` of this package and of torch; mode "train", "untracked" or "eval"."""
    mean, var = normal(channels), normal(channels).abs() + 0.5

    def bind(batch_norm: Function, **counted: Tensor) -> Function:
        def f(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            if mode == "untracked":
                return batch_norm(input, None, None, weight, bias, True, 0.0, EPS)
            kwargs = {name: value.clone() for name, value in counted.items()}
            buffers = (mean.clone(), var.clone())
            return batch_norm(input, *buffers, weight, bias, mode == "train", momentum, EPS, **kwargs)

        return f

    return bind(operator, num_batches_tracked=torch.tensor(3, device=devices.current())), bind(F.batch_norm)


def formula(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm from its definition, all arguments given; updates nothing."""
    dims = [0, *range(2, input.dim())]
    mean = input.mean(dims) if training else running_mean
    var = input.var(dims, correction=0) if training else running_var
    wide = [t.view(1, -1, *[1] * (input.dim() - 2)) for t in (mean, (var + eps).rsqrt(), weight, bias)]
    return (input - wide[0]) * wide[1] * wide[2] + wide[3]


def modules(kind: str = "BatchNorm2d", channels: int = 3, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A float64 module of this package and torch's, with the same random parameters and statistics."""
    options |= {"dtype": torch.float64, "device": devices.current()}
    stock = getattr(torch.nn, kind)(channels, **options)
    with torch.no_grad():
        for tensor in (*stock.parameters(), *(b for b in stock.buffers() if b.is_floating_point())):
            tensor.copy_(normal(*tensor.shape).abs() + 0.5)
    ours = getattr(bn_ext, kind)(channels, **options)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def loss(y: Tensor) -> Tensor:
    """A number that depends on y neither linearly nor only through its scale and shift."""
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return (y * slope).sum() + y.pow(3).mean()


def compare(run: Function, ours: Any, stock: Any, **tolerance: float) -> Any:
    """Assert that `run` gives the same tree of tensors for both; returns this package's."""
    actual, expected = run(ours), run(stock)
    torch.testing.assert_close(actual, expected, **tolerance)
    return actual


def _vmap_grad(f: Function, x: Tensor, w: Tensor, b: Tensor) -> Any:
    one = func.grad(lambda *a: loss(f(*a)), argnums=(0, 1, 2))
    return func.vmap(one, (0, None, 0))(torch.stack([x, x.cos()]), w, torch.stack([b, b.sin()]))


TRANSFORMS: dict[str, Function] = {
    "grad": lambda f, *a: func.grad(lambda *a: loss(f(*a)), argnums=(0, 1, 2))(*a),
    "vjp": lambda f, *a: func.vjp(f, *a)[1](a[0].cos()),
    "jvp": lambda f, *a: func.jvp(f, a, tuple(t.cos() for t in a)),
    "linearize": lambda f, *a: func.linearize(f, *a)[1](*(t.cos() for t in a)),
    "jacrev": lambda f, *a: func.jacrev(f, argnums=(0, 1, 2))(*a),
    "jacfwd": lambda f, *a: func.jacfwd(f, argnums=(0, 1, 2))(*a),
    "hessian": lambda f, *a: func.hessian(lambda *a: loss(f(*a)), argnums=(0, 1, 2))(*a),
    "vmap_input": lambda f, x, w, b: func.vmap(f, (0, None, None))(torch.stack([x, x.cos()]), w, b),
    "vmap_last": lambda f, x, w, b: func.vmap(f, (-1, None, None), 1)(torch.stack([x, x.cos()], -1), w, b),
    "vmap_weight": lambda f, x, w, b: func.vmap(f, (None, 0, None))(x, torch.stack([w, w.cos()]), b),
    "vmap_grad": _vmap_grad,
    "functional_hessian": lambda f, *a: torch.autograd.functional.hessian(lambda *a: loss(f(*a)), a),
    "functional_jacobian": lambda f, *a: torch.autograd.functional.jacobian(f, a, vectorize=True),
}
"""What torch offers to differentiate or batch `f(input, weight, bias)`."""


def _unaligned(shape: tuple[int, ...]) -> Tensor:
    tensor = normal(*shape, dtype=torch.float32)
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(shape)


GRADIENT_LAYOUTS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "contiguous": lambda *s: normal(*s, dtype=torch.float32),
    "channels_last": lambda *s: normal(*s, dtype=torch.float32, layout="channels_last"),
    "transposed": lambda *s: normal(*s[::-1], dtype=torch.float32).permute(3, 2, 1, 0),
    "sliced": lambda n, c, h, w: normal(n + 1, c + 2, h, 2 * w, dtype=torch.float32)[1:, 1:-1, :, ::2],
    "unaligned": lambda *s: _unaligned(s),
    "one_value": lambda *s: normal(dtype=torch.float32).expand(s),
    "one_per_channel": lambda n, c, h, w: normal(1, c, 1, 1, dtype=torch.float32).expand(n, c, h, w),
    "one_per_plane": lambda n, c, h, w: normal(n, c, 1, 1, dtype=torch.float32).expand(n, c, h, w),
    "one_per_row": lambda n, c, h, w: normal(n, c, h, 1, dtype=torch.float32).expand(n, c, h, w),
    "same_for_the_batch": lambda n, c, h, w: normal(1, c, h, w, dtype=torch.float32).expand(n, c, h, w),
    "same_for_all_channels": lambda n, c, h, w: normal(n, 1, h, w, dtype=torch.float32).expand(n, c, h, w),
}
"""Gradients of a 4D output as autograd may hand them over, float32."""


class BackwardMasks(TorchDispatchMode):
    """Collects the output_mask of each bn_ext::batch_norm_backward."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look, then call."""
        if function is torch.ops.bn_ext.batch_norm_backward.default:
            self.masks.append(list(args[10]))
        return function(*args, **(kwargs or {}))
