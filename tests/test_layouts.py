"""Memory formats, strides and memory: what comes out where, and that nothing of the input's size is made besides.

The model is torch.nn on the CPU, whichever device bn_ext runs on: on a GPU torch's strides depend on the kernel.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import bn_ext

FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def ours(x: torch.Tensor, training: bool = True) -> torch.Tensor:
    c = x.shape[1]
    mean, var = torch.zeros(c, device=x.device), torch.ones(c, device=x.device)
    return bn_ext.batch_norm(x, mean, var, training=training)


def on(device: str, x: torch.Tensor) -> torch.Tensor:
    """The same values with the same strides on a device."""
    if device == "cpu":
        return x
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((size,), (1,)).to(device).as_strided(x.shape, x.stride())


def stock(x: torch.Tensor, training: bool = True) -> torch.Tensor:
    c = x.shape[1]
    return F.batch_norm(x, torch.zeros(c), torch.ones(c), training=training)


X4 = torch.randn(4, 3, 5, 2)
LAYOUTS = {
    "contiguous": X4,
    "channels_last": X4.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 4, 2, 5).contiguous(memory_format=torch.channels_last_3d),
    "transposed": X4.transpose(2, 3),
    "sliced": X4[:, :, ::2],
    "sliced channels_last": X4.contiguous(memory_format=torch.channels_last)[:, :, 1:],
    "batch and channel swapped": X4.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "expanded batch": torch.randn(1, 3, 1, 1).expand(4, 3, 2, 2),
    "expanded channels": torch.randn(4, 1, 2, 2).expand(4, 3, 2, 2),
    "(N, C) transposed": torch.randn(3, 8).t(),
    "(N, C, L) of (N, L, C)": torch.randn(2, 9, 3).transpose(1, 2),
    "one position, channels_last": torch.randn(4, 3, 1, 1).contiguous(memory_format=torch.channels_last),
    "one channel": torch.randn(4, 1, 3, 3),
    "6D": torch.randn(2, 3, 2, 2, 2, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_strides_as_torch(device: str, name: str, training: bool) -> None:
    x = LAYOUTS[name]
    y, expected = ours(on(device, x), training), stock(x, training)
    torch.testing.assert_close(y.cpu(), expected)
    assert y.stride() == expected.stride()
    assert torch.empty_like(x, device="meta").stride() == torch.empty_like(x).stride()
    assert ours_on_meta(x, training).stride() == expected.stride()


def with_order(shape: tuple[int, ...], order: tuple[int, ...], ones: bool) -> torch.Tensor:
    """A dense tensor whose dimensions lie in memory in this order; sizes of one have strides of one if asked for."""
    strides, values = [1] * len(shape), 1
    for dimension in reversed(order):
        if shape[dimension] > 1 or not ones:
            strides[dimension] = values
        values *= shape[dimension]
    return torch.empty_strided(shape, strides).copy_(torch.randn(shape))


@pytest.mark.parametrize("shape", [s for s in itertools.product((1, 3), repeat=4) if s.count(1) in (1, 2, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_sizes_of_one_as_torch(device: str, shape: tuple[int, ...], training: bool) -> None:
    """Many fit two layouts; gradients are those of a contiguous float64 tensor."""
    if training and shape[0] * shape[2] * shape[3] == 1:
        return
    for order, ones in itertools.product(itertools.permutations(range(4)), (True, False)):
        x = with_order(shape, order, ones)
        y, expected = ours(on(device, x), training), stock(x, training)
        assert (y.stride(), ours_on_meta(x, training).stride()) == (expected.stride(),) * 2, x.stride()
        dy = with_order(shape, (0, 2, 3, 1), ones)
        exact, leaf = x.double().contiguous().requires_grad_(), on(device, x).requires_grad_()
        c = torch.zeros(shape[1], dtype=torch.float64)
        expected_y = F.batch_norm(exact, c, c + 1, training=training)
        torch.testing.assert_close(y.cpu().double(), expected_y, rtol=1e-5, atol=1e-5)
        (dx,) = torch.autograd.grad(ours(leaf, training), leaf, on(device, dy))
        (expected_dx,) = torch.autograd.grad(expected_y, exact, dy.double().contiguous())
        torch.testing.assert_close(dx.cpu().double(), expected_dx, rtol=1e-5, atol=1e-5)


def ours_on_meta(x: torch.Tensor, training: bool) -> torch.Tensor:
    """What the fake kernels say of a tensor of the same strides."""
    return ours(on("meta", x), training)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_in_another_layout(device: str, name: str, other: str, training: bool) -> None:
    shape = (3, 6, 4, 5, 2) if "channels_last_3d" in (name, other) else (3, 6, 4, 5)
    if {name, other} >= {"channels_last", "channels_last_3d"} or (len(shape) == 5 and "channels_last" in (name, other)):
        shape, name, other = (3, 6, 4, 5), name.removesuffix("_3d"), other.removesuffix("_3d")
    x = torch.randn(shape).contiguous(memory_format=FORMATS[name])
    dy = torch.randn(shape).contiguous(memory_format=FORMATS[other])
    results = []
    for function, where in ((ours, device), (stock, "cpu")):
        leaf = x.to(where, copy=True).requires_grad_()
        function(leaf, training).backward(dy.to(where))
        results.append(leaf.grad)
    torch.testing.assert_close(results[0].cpu(), results[1])
    assert results[0].stride() == results[1].stride()


EXPANDED = {
    "all": lambda shape: torch.randn(()).expand(shape),
    "positions": lambda shape: torch.randn(shape[0], shape[1], 1, 1).expand(shape),
    "batch": lambda shape: torch.randn(1, *shape[1:]).expand(shape),
    "channels": lambda shape: torch.randn(shape[0], 1, *shape[2:]).expand(shape),
}


@pytest.mark.parametrize("name", EXPANDED)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (4, 3, 50, 60), (4, 70, 6, 6), (3, 5, 1, 1)])
def test_expanded_gradient(
    device: str, name: str, memory_format: torch.memory_format, training: bool, shape: tuple
) -> None:
    x = torch.randn(shape).contiguous(memory_format=memory_format).to(device)
    dy = on(device, EXPANDED[name](shape))
    weight = torch.rand(shape[1]).to(device).requires_grad_()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    zeros = torch.zeros(shape[1], device=device)
    y = bn_ext.batch_norm(leaf, zeros, zeros + 1, weight, None, training)
    dx, dweight = torch.autograd.grad(y, (leaf, weight), dy)
    twin, twin_weight = x.double().requires_grad_(), weight.detach().double().requires_grad_()
    c = torch.zeros(shape[1], dtype=torch.float64, device=device)
    expected = F.batch_norm(twin, c, c + 1, twin_weight, None, training)
    expected_dx, expected_dweight = torch.autograd.grad(expected, (twin, twin_weight), dy.double())
    terms = (dy * (expected.detach() / twin_weight.detach().view(1, -1, 1, 1))).abs().sum((0, 2, 3))
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)
    assert ((dweight - expected_dweight).abs() <= 1e-6 * terms + 1e-6).all()


def allocated_by(function: object, device: str) -> int:
    """Bytes of all tensors made while the function runs, freed or not."""
    if device == "cuda":
        before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        function()
        return torch.cuda.memory_stats()["requested_bytes.all.allocated"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = function()
    del result
    return sum(max(0, e.self_cpu_memory_usage) for e in prof.events() if e.name != "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_two_layouts(device: str, training: bool, dtype: torch.dtype) -> None:
    """With W = 1 an input's strides can be those of two layouts, and dy's of the other one.

    torch.nn's gradients are wrong there, so the model is float64 in a layout of which there is no doubt.
    """
    x = on(device, torch.randn(2, 5, 3).to(dtype).transpose(1, 2).unsqueeze(-1)).requires_grad_()
    dy = on(device, torch.randn(2, 3, 5, 1).to(dtype))
    weight, bias = (torch.ones(3, device=device).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    y = bn_ext.batch_norm(x, mean, var, weight, bias, training)
    actual = torch.autograd.grad(y, (x, weight, bias), dy)
    exact = [t.detach().double().contiguous().requires_grad_() for t in (x, weight, bias)]
    expected = F.batch_norm(exact[0], torch.zeros_like(exact[1]), torch.ones_like(exact[1]), *exact[1:], training)
    expected_gradients = torch.autograd.grad(expected, exact, dy.double().contiguous())
    close = 1e-5 if dtype == torch.float32 else 2e-2
    for a, e in zip((y, *actual), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=close, atol=close)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["dense", "expanded"])
def test_allocates_output_and_input_gradient_only(
    device: str, memory_format: torch.memory_format, training: bool, dtype: torch.dtype, gradient: str
) -> None:
    x = torch.randn(8, 16, 40, 40).to(device, dtype).contiguous(memory_format=memory_format).requires_grad_()
    module = bn_ext.BatchNorm2d(16, device=device).train(training)
    size = x.numel() * x.element_size()
    vectors = 16 * 8 * 64  # per-channel vectors and the partial sums of a GPU, generously
    assert size <= allocated_by(lambda: module(x), device) <= size + vectors
    y = module(x)
    dy = torch.randn_like(y) if gradient == "dense" else torch.ones((), dtype=dtype, device=device).expand(y.shape)
    inputs = (x, module.weight, module.bias)
    assert size <= allocated_by(lambda: torch.autograd.grad(y, inputs, dy), device) <= size + vectors


def test_allocation_is_seen(device: str) -> None:
    """The measure itself: a copy shows."""
    x = torch.randn(1000, device=device)
    assert allocated_by(lambda: x.clone(), device) >= 4000
