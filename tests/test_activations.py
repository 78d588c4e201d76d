"""Activation and residual inside the normalisation: values, gradients of first and second order, what is kept."""

import itertools
import math
from typing import Any

import pytest
import torch
from helpers.derivatives import EPS, TRANSFORMS, BackwardMasks, leaf, loss, normal, uniform
from torch import Tensor, nn
from torch.autograd import grad

import bn_ext
from bn_ext import testing
from bn_ext.activations import NAMES, apply

ACTIVATIONS = [None, *NAMES, ("leaky_relu", 0.3), ("elu", 1.7)]
SMOOTH = [name for name in NAMES if name not in testing.KINKS]
RELU_LIKE = ["relu", "leaky_relu", "relu6"]
SHAPES = [(5, 3, 7, 9), (40, 6, 3, 3), (3, 4, 50, 50), (66, 3, 9, 9), (33, 5)]


def separate(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    *,
    activation: Any = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same by torch's operators."""
    y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
    return apply(y if residual is None else y + residual, activation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", list(testing.TOLERANCE))
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_against_float64(
    device: str, activation: Any, residual: bool, dtype: torch.dtype, layout: str, training: bool
) -> None:
    for seed, shape in enumerate(SHAPES):
        if layout == "channels_last" and len(shape) < 4:
            continue
        options = {"activation": activation, "residual": residual, "device": device, "seed": seed}
        shares = testing.check(bn_ext.batch_norm, testing.Case(shape, dtype, layout, training, eps=EPS, **options))
        assert ("dresidual" in shares) == residual
        assert max(shares.values()) <= 1, (shape, shares)


def arguments(residual: bool, *shape: int) -> tuple[Tensor, ...]:
    """Input, weight, bias and perhaps residual, float64, requiring gradients."""
    channels = shape[1]
    return tuple(leaf(normal(*s)) for s in (shape, (channels,), (channels,), shape)[: 4 if residual else 3])


def bound(operator: Any, activation: Any, training: bool, channels: int = 3) -> Any:
    """f(x, weight, bias, residual=None) of an operator."""
    mean, var = normal(channels), normal(channels).abs() + 0.5
    more = {} if operator is separate else {"eps": EPS}

    def f(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        buffers = (mean.clone(), var.clone())
        return operator(x, *buffers, weight, bias, training, activation=activation, residual=residual, **more)

    return f


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(device: str, activation: Any, residual: bool, training: bool) -> None:
    torch.manual_seed(5)
    values = arguments(residual, 3, 2, 2, 2)
    f = bound(bn_ext.batch_norm, activation, training, 2)
    assert torch.autograd.gradcheck(f, values)
    assert torch.autograd.gradgradcheck(f, values)


@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (3, 2, 2, 1, 2), (5, 2)])
@pytest.mark.parametrize("activation", RELU_LIKE)
def test_second_derivatives_by_way_of_a_mask(device: str, activation: str, shape: tuple[int, ...]) -> None:
    """The bits lie in the order of memory, in channels_last too."""
    torch.manual_seed(5)
    x, w, b, z = arguments(True, *shape)
    if len(shape) > 2:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradgradcheck(bound(bn_ext.batch_norm, activation, True, 2), (x, w, b, z))


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap_input", "vmap_grad"])
@pytest.mark.parametrize("activation", ["relu", "silu", ("leaky_relu", 0.3)])
def test_transforms(device: str, activation: Any, transform: str) -> None:
    values = [t.detach() for t in arguments(False, 4, 3, 2, 2)]
    torch.manual_seed(1)
    ours = bound(bn_ext.batch_norm, activation, False)
    torch.manual_seed(1)
    theirs = bound(separate, activation, False)
    torch.testing.assert_close(TRANSFORMS[transform](ours, *values), TRANSFORMS[transform](theirs, *values))


def test_residual_in_forward_mode(device: str) -> None:
    x, w, b, z = (t.detach() for t in arguments(True, 4, 3, 2, 2))
    torch.manual_seed(1)
    ours = bound(bn_ext.batch_norm, "silu", True)
    torch.manual_seed(1)
    theirs = bound(separate, "silu", True)
    for f, g in ((ours, theirs),):
        results = [torch.func.jvp(lambda z, h=h: h(x, w, b, z), (z,), (z.cos(),)) for h in (f, g)]
        torch.testing.assert_close(*results)


KINKS = [-math.inf, -6.0, -3.0, -0.0, 0.0, 3.0, 6.0, math.inf]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kinks_as_torch(device: str, activation: Any, residual: bool) -> None:
    """Where u is exactly a kink, or infinite: torch's value and subgradient."""
    u = torch.tensor(KINKS if activation in (None, *RELU_LIKE, ("leaky_relu", 0.3)) else KINKS[1:-1], device=device)
    z = u.expand(2, len(u)).contiguous().requires_grad_()
    weight, bias = (torch.zeros(len(u), device=device), None) if residual else (torch.zeros_like(u), u)
    x = torch.ones(2, len(u), device=device)
    mean, var = torch.ones_like(u), torch.ones_like(u)
    bias = None if bias is None else bias.clone().requires_grad_()
    y = bn_ext.batch_norm(x, mean, var, weight, bias, activation=activation, residual=z if residual else None)
    expected = apply(z, activation)
    torch.testing.assert_close(y, expected)
    dy = torch.tensor([[2.0], [-3.0]], device=device).expand(2, len(u))
    (dz,) = grad(expected, z, dy)
    (ours,) = grad(y, z if residual else bias, dy)
    torch.testing.assert_close(ours, dz if residual else dz.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(device: str, activation: Any, dtype: torch.dtype) -> None:
    """Far from zero: neither inf nor NaN comes of it, nor a small value that should be none."""
    u = torch.tensor([-1e18, -1e9, -800.0, -100.0, -90.0, 90.0, 100.0, 800.0, 1e9, 1e18], dtype=dtype, device=device)
    bias = u.clone().requires_grad_()
    x, one, zero = torch.ones(2, len(u), dtype=dtype, device=device), torch.ones_like(u), torch.zeros_like(u)
    y = bn_ext.batch_norm(x, one, one, zero, bias, activation=activation)
    exact = u.double().clone().requires_grad_()
    expected = apply(exact, activation)
    limit = 1e-30 if dtype == torch.float32 else 1e-290
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-6, atol=limit)
    (ours,), (theirs,) = grad(y[0].sum(), bias), grad(expected.sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=limit)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_what_does_not_pass_are_zero(device: str, training: bool, residual: bool) -> None:
    """An inf or NaN that comes to a value which relu holds back does not come through."""
    x, w, b, *z = arguments(residual, 4, 3, 5, 5)
    y = bound(bn_ext.batch_norm, "relu", training)(x, w, b, *z)
    dy = torch.where(y > 0, torch.ones_like(y), torch.full_like(y, math.inf))
    for gradient in grad(y, (x, w, b, *z), dy):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
def test_without_a_mask_they_are_zero_too(device: str, residual: bool, dtype: torch.dtype) -> None:
    """Compiled code keeps a residual where eager code keeps its mask."""
    x, z = (normal(4, 3, 5, 5).to(device, dtype) for _ in range(2))
    z = z if residual else None
    for activation in ("relu", "relu6"):
        y, saved, _ = torch.ops.bn_ext.batch_norm_forward(x, *[None] * 5, z, 0.1, EPS, activation)
        passes = (y > 0) & (y < 6)
        dy = torch.where(passes, torch.ones_like(y), torch.full_like(y, math.inf))
        wanted = [True, True, True, True]
        gradients = [
            torch.ops.bn_ext.batch_norm_backward(g, x, None, saved, z, None, None, True, activation, 0.0, wanted)
            for g in (dy, passes.to(dtype))
        ]
        for with_inf, without in zip(*gradients, strict=True):
            assert torch.equal(with_inf, without)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 5, 1, 1), (1, 1, 3, 1), (4, 16, 8, 8), (1, 3, 41, 73)])
@pytest.mark.parametrize("activation", RELU_LIKE)
def test_masks_of_any_size(device: str, activation: str, shape: tuple[int, ...], layout: str) -> None:
    """One bit per value, whichever byte it shares with others."""
    x, z = (leaf(normal(*shape, dtype=torch.float32, layout=layout)) for _ in range(2))
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    y = bn_ext.batch_norm(x, mean, var, activation=activation, residual=z)
    expected = separate(x, mean, var, None, None, False, activation=activation, residual=z)
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)  # eps differs
    dy = uniform(*shape)
    (dz,) = grad(y, z, dy)
    passes = (y > 0) & (y < 6 if activation == "relu6" else y == y)
    torch.testing.assert_close(dz, torch.where(passes, dy, dy * (0.01 if activation == "leaky_relu" else 0)))


@pytest.mark.parametrize(
    ("shape", "of_mask", "of_input"),
    [
        ((2, 3, 5, 7), "contiguous", "channels_last"),
        ((2, 3, 5, 7), "channels_last", "contiguous"),
        ((2, 3, 4, 5, 7), "contiguous", "channels_last_3d"),
        ((2, 3, 4, 5, 7), "channels_last_3d", "contiguous"),
    ],
)
@pytest.mark.parametrize("changes", ["before", "between"])
def test_masks_hold_to_their_memory_format(
    device: str, shape: tuple[int, ...], of_mask: str, of_input: str, changes: str
) -> None:
    """Compilers choose a layout for the forward, and one for the backward graph."""
    x, z = (normal(*shape, layout=of_mask) for _ in range(2))
    other = normal(*shape, layout=of_input).copy_(x)
    mask_format = getattr(torch, of_mask if of_mask.startswith("channels") else "contiguous_format")
    ops = torch.ops.bn_ext
    of_forward = other if changes == "before" else x
    y, saved, mask = ops.batch_norm_forward(of_forward, *[None] * 5, z, 0.1, EPS, "relu", 0.0, mask_format)
    dy, leaves = normal(*shape), (leaf(x), leaf(z))
    expected = separate(leaves[0], None, None, None, None, True, activation="relu", residual=leaves[1])
    rest = ("relu", 0.0, [True, False, False, True])
    dx, _, _, dz = ops.batch_norm_backward(dy, other, None, saved, None, mask, mask_format, True, *rest)
    torch.testing.assert_close((y, dx, dz), (expected.detach(), *grad(expected, leaves, dy)))
    assert y.stride() == dx.stride() == dz.stride() == z.stride()


def saved_bytes(f: Any) -> tuple[int, list[Tensor]]:
    """Bytes kept for backward, each storage once, and what is kept."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values()), kept


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(device: str, dtype: torch.dtype, activation: Any, residual: bool, training: bool) -> None:
    """The input and numbers per channel; of a residual one bit per value, or itself where no bit can tell."""
    x, z = (leaf(normal(4, 6, 5, 7, dtype=dtype)) for _ in range(2))
    w, b, mean, var = (uniform(6).requires_grad_(i < 2) for i in range(4))
    z = z if residual else None
    total, kept = saved_bytes(
        lambda: bn_ext.batch_norm(x, mean, var, w, b, training, activation=activation, residual=z)
    )
    name = activation if activation is None or isinstance(activation, str) else activation[0]
    has_mask = residual and name in RELU_LIKE
    keeps_residual = residual and name in SMOOTH
    per_channel = 5 + (name is not None and not has_mask)  # weight, mean, rstd, scale, offset, and perhaps bias
    expected = x.nbytes * (1 + keeps_residual) + per_channel * 4 * 6
    assert total == expected + (x.numel() // 8 + 4 if has_mask else 0)
    assert kept[0].data_ptr() == x.data_ptr()


NEEDED = [needed for needed in itertools.product([True, False], repeat=4) if any(needed)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_only_needed_gradients(device: str, activation: Any, needed: tuple[bool, ...], training: bool) -> None:
    values = [t.detach() for t in arguments(True, 4, 3, 2, 2)]
    gradients = []
    for operator in (bn_ext.batch_norm, separate):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(values, needed, strict=True)]
        torch.manual_seed(3)
        with BackwardMasks() as spy:
            loss(bound(operator, activation, training)(*leaves)).backward()
        gradients.append([t.grad for t in leaves])
        if operator is bn_ext.batch_norm:
            # Without an activation the residual's gradient is the output's.
            computed = [*needed[:3], needed[3] and activation is not None]
            assert spy.masks == ([computed] if any(computed) else [])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("changed", ["x", "w", "b", "z"])
def test_what_is_kept_may_not_change(device: str, activation: str, changed: str) -> None:
    """And what is not kept may: with relu's mask neither bias nor residual."""
    values = dict(zip("xwbz", (t * 1 for t in arguments(True, 4, 3, 2, 2)), strict=True))
    y = bound(bn_ext.batch_norm, activation, True)(*values.values())
    values[changed].mul_(2)
    if activation == "relu" and changed in "bz":
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_strides_of_residual_and_gradient_do_not_matter(device: str, activation: str, layout: str) -> None:
    values = [t.detach() for t in arguments(True, 4, 3, 5, 6)]
    x = leaf(values[0].contiguous(memory_format=torch.channels_last) if layout == "channels_last" else values[0])
    residuals = [values[3], values[3].contiguous(memory_format=torch.channels_last)]
    residuals += [
        normal(6, 5, 3, 4).permute(3, 2, 1, 0),
        normal(4, 3, 5, 12)[..., ::2],
        normal(4, 1, 1, 1).expand(4, 3, 5, 6),
    ]
    for z, dy in itertools.product(residuals, [*residuals, normal().expand(4, 3, 5, 6)]):
        z = z.detach().requires_grad_()
        results = []
        for operator in (bn_ext.batch_norm, separate):
            torch.manual_seed(3)
            y = bound(operator, activation, True)(x, *values[1:3], z)
            results.append([y.detach(), *grad(y, (x, z), dy)])
        torch.testing.assert_close(*results)
        assert results[0][0].is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sees_the_unrounded_value(device: str, dtype: torch.dtype, activation: Any) -> None:
    """One rounding, at the end: nearer to the exact result than torch's modules, which round three times."""
    x, z = (normal(16, 8, 6, 6, dtype=dtype) for _ in range(2))
    w, b = uniform(8) + 0.5, uniform(8)
    exact = separate(x.double(), None, None, w.double(), b.double(), True, activation=activation, residual=z.double())
    ours = bn_ext.batch_norm(x, None, None, w, b, True, 0.1, EPS, activation=activation, residual=z).double()
    theirs = separate(x, None, None, w, b, True, activation=activation, residual=z).double()
    assert (ours - exact).square().mean() < (theirs - exact).square().mean()


MODULES = [
    (nn.ReLU(inplace=True), "relu"),
    (nn.LeakyReLU(0.3), ("leaky_relu", 0.3)),
    (nn.ReLU6(), "relu6"),
    (nn.ELU(1.7), ("elu", 1.7)),
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.Hardswish(), "hardswish"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Tanh(), "tanh"),
    (nn.Mish(), "mish"),
]


@pytest.mark.parametrize(("module", "name"), MODULES)
def test_modules_of_torch_name_their_kind(device: str, module: nn.Module, name: Any) -> None:
    x, z = normal(4, 3, 5, 6), normal(4, 3, 5, 6)
    options = {"dtype": torch.float64, "device": device}
    norm = bn_ext.BatchNorm2d(3, activation=module, **options)
    assert norm.activation == (name if isinstance(name, tuple) else (name, norm.activation[1]))
    stock = nn.BatchNorm2d(3, **options)
    torch.testing.assert_close(norm(x, z), module(stock(x) + z))
    torch.testing.assert_close(norm.state_dict(), stock.state_dict())
    plain = bn_ext.BatchNorm2d(3, **options)
    torch.testing.assert_close(plain(x, z, activation=name), module(stock.train()(x) + z))
    assert f"activation={name if isinstance(name, str) else name[0]}" in repr(norm)


def test_activation_set_later(device: str) -> None:
    norm = bn_ext.BatchNorm2d(3, device=device)
    x = torch.randn(4, 3, 2, 2, device=device)
    for activation in ("relu", nn.ReLU()):
        norm.activation = activation
        assert (norm(x) >= 0).all()
        assert norm.activation == ("relu", 0.0)
    with pytest.raises(ValueError, match="activation must be None, one of relu"):
        norm.activation = nn.Softmax(1)
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    with pytest.raises(ValueError, match="forward\\(\\) got activation='silu', but the module has its own"):
        norm(x, activation="silu")


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(device: str, layout: str, backend: str, training: bool, activation: Any) -> None:
    """Fullgraph; from the forward to the backward graph goes the residual, or with channels last the mask."""
    torch._dynamo.reset()
    module = bn_ext.BatchNorm2d(3, activation=activation, device=device).train(training)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x, z = (leaf(normal(4, 3, 5, 6, dtype=torch.float32, layout=layout)) for _ in range(2))
    results = []
    for f in (module, compiled):
        y = f(x, z)
        results.append([y, *grad(loss(y), (x, z, *module.parameters()))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_batch(device: str, activation: Any) -> None:
    norm = bn_ext.BatchNorm2d(3, activation=activation, device=device)
    x, z = (torch.randn(0, 3, 4, 4, device=device, requires_grad=True) for _ in range(2))
    y = norm(x, z)
    y.sum().backward()
    assert y.shape == x.grad.shape == z.grad.shape == x.shape
    assert norm.weight.grad.tolist() == [0, 0, 0]
