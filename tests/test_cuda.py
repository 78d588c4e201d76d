"""What only a GPU has: graphs, streams, several devices, tensors of more than 2^31 elements, its memory.

That results are right on it, the other files test: most of their tests run on every device of the machine.
"""

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bn_ext
from bn_ext import testing

if "cuda" not in testing.devices():
    pytest.skip("needs a GPU, and a build of bn_ext with CUDA kernels", allow_module_level=True)

FORMATS = [torch.contiguous_format, torch.channels_last]
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(params=["cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Of all tests here; conftest.py chooses by it."""
    return str(request.param)


def normal(
    *shape: int,
    device: str = "cuda",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Random values on a device."""
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Forward and backward: output and all gradients."""
    y = module(x)
    inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit."""
    assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * len(expected)


def state(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return list(module.state_dict().values())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_graph_of_a_training_step(
    device: str, dtype: torch.dtype, memory_format: torch.memory_format, momentum: float | None
) -> None:
    """Running statistics and their count advance at each replay, as at each call, and not while it is captured."""
    captured, eager = (bn_ext.BatchNorm2d(24, momentum=momentum, device=device) for _ in range(2))
    x, dy = (normal(16, 24, 14, 14, dtype=dtype, memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as torch's documentation of graphs has it
        step(captured, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(eager.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured, x, dy)
    assert_equal(state(captured), state(eager))
    for replay in range(1, 4):
        with torch.no_grad():
            x.normal_(replay, replay), dy.normal_()
        graph.replay()
        assert_equal(results, step(eager, x, dy))
        assert_equal(state(captured), state(eager))
        assert captured.num_batches_tracked.item() == replay


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_graph_in_eval(device: str, dtype: torch.dtype) -> None:
    module = bn_ext.BatchNorm2d(8, device=device).eval()
    x = normal(4, 8, 7, 7, dtype=dtype)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = module(x)
    x.copy_(normal(4, 8, 7, 7, dtype=dtype))
    module.running_mean.add_(1)
    graph.replay()
    assert_equal([y], [module(x).detach()])


def test_graphed_callables(device: str) -> None:
    model = nn.Sequential(bn_ext.BatchNorm2d(8), nn.ReLU(), bn_ext.BatchNorm2d(8, momentum=None)).to(device)
    twin = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (normal(4, 8, 9, 9).requires_grad_(),))
    model.load_state_dict(twin.state_dict())  # warm-up and capture have run it a few times
    for _ in range(3):
        x, dy = normal(4, 8, 9, 9).requires_grad_(), normal(4, 8, 9, 9)
        inputs = [x, *model.parameters()]
        y = graphed(x)
        actual = [t.clone() for t in (y.detach(), *torch.autograd.grad(y, inputs, dy))]
        assert_equal(actual, step(twin, x, dy))
        assert_equal(state(model), state(twin))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_to_graphs(device: str) -> None:
    """reduce-overhead captures what it compiles."""
    model = nn.Sequential(bn_ext.BatchNorm2d(8), nn.ReLU(), bn_ext.BatchNorm2d(8, momentum=None)).to(device)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x, dy = normal(4, 8, 9, 9).requires_grad_(), normal(4, 8, 9, 9)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        actual = [t.clone() for t in (y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy))]
        # What the compiler fuses around the kernels is computed in another order.
        torch.testing.assert_close(actual, step(twin, x, dy), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state(model), state(twin))
    torch._dynamo.reset()


@pytest.mark.alone
@pytest.mark.parametrize("memory_format", FORMATS)
def test_side_stream(device: str, memory_format: torch.memory_format) -> None:
    """A call runs on the current stream, and waits for no other."""
    module = bn_ext.BatchNorm2d(24, device=device)
    x, dy = (normal(16, 24, 14, 14, memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    expected = step(copy.deepcopy(module), x, dy)
    default, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(default)
    with torch.cuda.stream(side):
        step(copy.deepcopy(module), x, dy)  # so that memory of this stream is there, and kernels are loaded
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(3_000_000_000)  # cycles: a second or two
    busy.record()
    with torch.cuda.stream(side):
        results = step(module, x, dy)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    assert not busy.query()
    default.wait_event(done)
    for result in results:
        result.record_stream(default)
    assert_equal(results, expected)


def test_streams_side_by_side(device: str) -> None:
    """Each has a workspace of its own."""
    inputs = [normal(8, 32, 20, 20).requires_grad_() for _ in range(4)]
    dy = normal(8, 32, 20, 20)
    modules = [bn_ext.BatchNorm2d(32, device=device) for _ in inputs]
    expected = [step(copy.deepcopy(module), x, dy) for module, x in zip(modules, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        results = []
        for stream, module, x in zip(streams, modules, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(module, x, dy))
    torch.cuda.synchronize()
    for actual, wanted in zip(results, expected, strict=True):
        assert_equal(actual, wanted)


@pytest.fixture
def _no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("_no_synchronisation")
def test_a_call_does_not_wait_for_the_device(device: str, training: bool, momentum: float | None) -> None:
    module = bn_ext.BatchNorm2d(24, momentum=momentum, device=device).train(training)
    x, dy = normal(4, 24, 7, 7).requires_grad_(), normal(4, 24, 7, 7)
    step(module, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):  # the measure itself
        x.sum().item()
    step(module, x, dy)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", list(testing.TOLERANCE))
@pytest.mark.parametrize("shape", [(32, 64, 30, 30), (64, 3, 50, 50), (16, 600, 7, 7), (4, 2, 300, 300)])
def test_bit_equal_from_run_to_run(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x, dy = (normal(*shape, device=device, dtype=dtype, memory_format=memory_format) for _ in range(2))
    params = torch.float64 if dtype == torch.float64 else torch.float32
    fresh = bn_ext.BatchNorm2d(shape[1], device=device, dtype=params)
    expected: list[Tensor] = []
    for _ in range(5):
        module = copy.deepcopy(fresh)
        results = step(module, x.requires_grad_(), dy) + state(module)
        expected = expected or results
        assert_equal(results, expected)


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """The same values and strides, so many elements behind a well aligned address; NaN before and after."""
    buffer = tensor.new_full((tensor.numel() + 2 * offset,), torch.nan)
    return buffer.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


@pytest.mark.parametrize("dtype", list(testing.TOLERANCE))
@pytest.mark.parametrize(("of_x", "of_dy"), [(1, 0), (0, 1), (1, 1), (2, 4), (3, 7), (8, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 5, 7, 7)])
def test_misaligned(
    device: str, shape: tuple[int, ...], layout: str, of_x: int, of_dy: int, dtype: torch.dtype
) -> None:
    def operator(x: Tensor, *rest: object) -> Tensor:
        y = bn_ext.batch_norm(shifted(x, of_x), *rest)
        y.register_hook(lambda dy: shifted(dy, of_dy))
        return y

    for training in (True, False):
        shares = testing.check(operator, testing.Case(shape, dtype, layout, training, device=device))
        assert max(shares.values()) <= 1, shares


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_need_not_be_the_tensors(device: str) -> None:
    modules = [bn_ext.BatchNorm2d(24, device=f"{device}:{i}") for i in range(2)]
    x, dy = normal(4, 24, 7, 7), normal(4, 24, 7, 7)
    results = []
    for i, module in enumerate(modules):
        with torch.cuda.device(1 - i):
            here = [t.to(f"{device}:{i}") for t in (x, dy)]
            results.append(step(module, here[0].requires_grad_(), here[1]))
            assert torch.cuda.current_device() == 1 - i
        assert {t.device.index for t in results[i]} == {i}
    torch.testing.assert_close(*[[t.cpu() for t in r] for r in results])
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        modules[0](x.to(f"{device}:1"))


def test_input_and_module_on_different_devices(device: str) -> None:
    here, there = bn_ext.BatchNorm2d(3, device=device), bn_ext.BatchNorm2d(3)
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=f"same device, but input is on cpu and running_mean is on {device}:0"):
        here(x)
    with pytest.raises(RuntimeError, match=f"same device, but input is on {device}:0 and running_mean is on cpu"):
        there(x.to(device))
    assert here.num_batches_tracked == there.num_batches_tracked == 0


def test_count_on_the_cpu(device: str) -> None:
    """As torch allows it; the only call that waits for nothing but the host."""
    module = bn_ext.BatchNorm2d(3, momentum=None, device=device)
    module.num_batches_tracked = torch.tensor(0)
    x = normal(2, 3, 4, 4, device=device)
    module(x), module(x + 2)
    assert module.num_batches_tracked.item() == 2
    torch.testing.assert_close(module.running_mean, x.mean((0, 2, 3)) + 1)


# More than 2^31 elements; all sizes of the axis that is cut are multiples of 4.
LARGE = [
    ((1, 2, 2**30 + 8), 2, torch.contiguous_format),
    ((2**30 + 8, 2), 0, torch.contiguous_format),
    ((8, 64, 2049, 2048), 0, torch.contiguous_format),
    ((8, 64, 2049, 2048), 0, torch.channels_last),
]


def quarters(axis: int, values: list[float], tensor: Tensor) -> Tensor:
    """Fill a tensor with one value in each quarter of an axis."""
    size = tensor.shape[axis] // 4
    for i, value in enumerate(values):
        tensor.narrow(axis, i * size, size).fill_(value)
    return tensor


def check_large(shape: tuple[int, ...], axis: int, memory_format: torch.memory_format, device: str) -> None:
    """Mean 0, variance 1, so y = x; dy is what comes out as dx, and something along 1 and xhat that does not."""
    empty = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=memory_format)
    x = quarters(axis, [-1, -1, 1, 1], empty).requires_grad_()
    weight, bias = torch.ones(shape[1], device=device), torch.zeros(shape[1], device=device)
    mean, var = torch.full_like(bias, 5), torch.full_like(bias, 5)
    y = bn_ext.batch_norm(x, mean, var, weight.requires_grad_(), bias.requires_grad_(), training=True, momentum=1.0)
    assert torch.equal(y.detach(), x.detach())
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
    count = x.numel() // shape[1]
    torch.testing.assert_close(var, torch.full_like(var, count / (count - 1)), rtol=1e-5, atol=0)
    dy = quarters(axis, [1.25, -0.75, 1.75, -0.25], torch.empty_like(empty))  # + 0.5 + 0.25 * xhat
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    torch.testing.assert_close(dbias, torch.full_like(dbias, 0.5 * count), rtol=1e-5, atol=0)
    torch.testing.assert_close(dweight, torch.full_like(dweight, 0.25 * count), rtol=1e-4, atol=0)
    assert torch.equal(dx, quarters(axis, [1, -1, 1, -1], dy))
    with torch.no_grad():
        y = bn_ext.batch_norm(x, mean, var, weight, bias)
        assert torch.equal(y, x)


@pytest.mark.large_memory
@pytest.mark.parametrize(("shape", "axis", "memory_format"), LARGE)
def test_more_than_2_to_the_31_elements(
    device: str, shape: tuple[int, ...], axis: int, memory_format: torch.memory_format
) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 28 * 2**30:
        pytest.skip("needs 28 GiB of the GPU's memory")
    try:
        check_large(shape, axis, memory_format, device)
    finally:
        torch.cuda.empty_cache()


# Beyond what a grid has in y and z (65535), and beyond cuDNN's largest batch (880801).
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((880802, 3), "contiguous"),
        ((880802, 2, 2), "contiguous"),
        ((65537, 2, 3, 3), "contiguous"),
        ((65537, 2, 3, 3), "channels_last"),
        ((2, 65537, 3, 3), "contiguous"),
        ((2, 65537, 3, 3), "channels_last"),
        ((3, 131073), "contiguous"),
    ],
)
def test_many_images_and_many_channels(device: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    case = testing.Case(shape, dtype, layout, device=device)
    for training in (True, False):
        shares = testing.check(bn_ext.batch_norm, dataclasses.replace(case, training=training))
        assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The convolution before gives 16-bit values, parameters stay float32."""
    conv = nn.Conv2d(3, 16, 3, device=device).to(memory_format=memory_format)
    norm = bn_ext.BatchNorm2d(16, device=device)
    x = normal(8, 3, 20, 20, device=device, memory_format=memory_format)
    with torch.autocast(device, dtype):
        z = conv(x)
        y = norm(z)
    assert z.dtype == y.dtype == dtype
    expected = F.batch_norm(z.double(), None, None, training=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=eps)
    y.sum().backward()
    assert norm.weight.grad.dtype == conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("cudnn", [True, False])
def test_as_torch_on_the_same_device(
    device: str, cudnn: bool, dtype: torch.dtype, memory_format: torch.memory_format, training: bool
) -> None:
    """torch.nn with cuDNN and without it; the tolerance is what either may differ from float64 by."""
    ours, stock = (library.BatchNorm2d(16, device=device).train(training) for library in (bn_ext, nn))
    x, dy = (normal(8, 16, 14, 14, device=device, dtype=dtype, memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    with torch.backends.cudnn.flags(enabled=cudnn):
        expected = step(stock, x, dy)
    eps = torch.finfo(dtype).eps
    for actual, wanted in zip(step(ours, x, dy), expected, strict=True):
        tolerance = 4 * eps if actual.dtype == dtype != torch.float32 else 1e-4
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state(ours), state(stock), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_step(device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Nothing is left behind, and beside the results a call needs little."""
    module = bn_ext.BatchNorm2d(256, device=device)
    x, dy = (normal(64, 256, 56, 56, dtype=dtype, memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    step(module, x, dy)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(10):
        step(module, x, dy)
        assert torch.cuda.memory_allocated() == before
    workspace = torch.cuda.max_memory_allocated() - before - 2 * x.nbytes  # y and dx
    assert workspace <= x.nbytes / 10
