"""For the tests of compilers: inputs in every layout, a model, and what one step of training does."""

from typing import Any

import torch
from torch import Tensor, nn

import bn_ext
from bn_ext.activations import Activation, apply
from helpers import devices
from helpers.derivatives import leaf, loss, modules, normal

INPUTS = {
    "nc": (6, 3),
    "nc1": (6, 3, 1),
    "ncl": (6, 3, 5),
    "nchw": (4, 3, 5, 6),
    "n1hw": (4, 1, 5, 6),
    "1chw": (1, 3, 5, 6),
    "nc11": (4, 3, 1, 1),
    "nc1w": (4, 3, 1, 6),
    "ncdhw": (2, 3, 4, 5, 6),
    "nc11w": (2, 3, 1, 1, 6),
}
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded"]
KINDS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random values of a shape in memory as the layout's name says."""
    x = normal(*shape, dtype=dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return x.repeat_interleave(2, 1)[:, ::2]
    return x[:1].expand(shape) if layout == "expanded" else x


def fitting(*layouts: str) -> list[Any]:
    """All pairs of an input and a layout that there are."""
    pairs = [(name, layout) for name in INPUTS for layout in layouts]
    return [p for p in pairs if p[1] != "channels_last" or len(INPUTS[p[0]]) >= 4]


def step(module: Any, x: Tensor) -> Any:
    """One forward and backward; everything a user may look at."""
    x = leaf(x)
    y = module(x)
    gradients = torch.autograd.grad(loss(y), (x, *module.parameters()))
    return [y.detach(), *gradients], [y.stride(), gradients[0].stride()], list(module.state_dict().values())


def assert_same_steps(compiled: Any, eager: Any, inputs: list[Tensor], fusing: bool = False) -> None:
    """The compiled module does to each input in turn what the eager one does.

    A fusing compiler chooses strides of gradients by itself, and sums in another order: the tolerance is that of a
    few float32 sums behind each other. On a GPU torch.nn's own strides depend on the kernel that it chooses.
    """
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if fusing else {}
    for x in inputs:
        actual, expected = step(compiled, x), step(eager, x)
        if fusing:
            del actual[1][1], expected[1][1]
        if x.is_cuda:
            del actual[1], expected[1]
        torch.testing.assert_close(actual, expected, **tolerance)


class Model(nn.Module):
    """Convolution, one batch norm used twice, and things to fuse around it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=norm.weight.dtype, device=devices.current())
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """With a residual."""
        return self.norm(self.norm(self.conv(x)).relu() + x).sigmoid()


def models(dtype: torch.dtype = torch.float64) -> list[Model]:
    """The same model with this package's batch norm and with torch's."""
    ours, stock = (Model(norm).to(dtype) for norm in modules())
    stock.conv.load_state_dict(ours.conv.state_dict())
    return [ours, stock]


class Activated(nn.Module):
    """Batch norm, a residual made of the input, and an activation: inside bn_ext's module, or behind torch.nn's."""

    def __init__(self, norm: nn.Module, activation: Activation, has_residual: bool) -> None:
        super().__init__()
        self.norm, self.has_residual = norm, has_residual
        self.behind = None if isinstance(norm, bn_ext.modules._FusedForward) else activation
        if self.behind is None:
            norm.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Of any number of dimensions."""
        residual = x.sin() if self.has_residual else None
        if isinstance(self.norm, bn_ext.modules._FusedForward):
            return self.norm(x, residual)
        y = self.norm(x)
        return apply(y if residual is None else y + residual, self.behind)


def activated(
    activation: Activation = None,
    has_residual: bool = False,
    kind: str = "BatchNorm2d",
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Activated]:
    """The same of both libraries, by "bn_ext" and "torch.nn"."""
    norms = dict(zip(LIBRARIES, modules(kind, **options), strict=True))
    return {name: Activated(norm, activation, has_residual).to(dtype) for name, norm in norms.items()}


LIBRARIES = ["bn_ext", "torch.nn"]
