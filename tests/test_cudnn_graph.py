"""cuDNN's graph API as a provider, against a stand-in that does what the names of a graph's nodes say.

It shows that the graphs describe the operations and that every call hands over the right memory; that cuDNN's own
kernels are right is checked before they are timed.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.cudnn import Cudnn
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cudnn_graph
from benchmarks.check import check, reference
from benchmarks.cudnn_graph import ADD_RELU, RELU, CudnnSubject, Unsupported, unavailable
from benchmarks.inputs import DTYPES, Case, Inputs, make_inputs
from benchmarks.operations import OPERATIONS, PLAIN
from benchmarks.shapes import OVERHEAD

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZE = (4, 3, 9, 7)
LAST = (189, 1, 21, 3)  # strides of SIZE in channels_last
VECTOR = ((1, 3, 1, 1), (3, 1, 3, 3), torch.float32, False)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudnn]:
    """The stand-in as the package, a stream that is not the default one, and results that start as NaN."""
    module = Cudnn()
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch, "empty_like", lambda like, **other: torch.full_like(like, torch.nan, **other).detach())
    cudnn_graph.handle.cache_clear()
    yield module
    cudnn_graph.handle.cache_clear()


def inputs_of(operation: str, dtype: str = "float32", layout: str = "channels_last") -> tuple[Case, Inputs]:
    case = Case("small", SIZE, dtype, layout, operation)
    return case, make_inputs(case, CPU)


def test_unavailable(monkeypatch: pytest.MonkeyPatch, cudnn: Cudnn) -> None:
    assert unavailable(CPU) == "cuDNN's graph API needs an NVIDIA GPU."
    assert unavailable(GPU) == ""
    cudnn.version = 8700
    assert unavailable(GPU) == "cuDNN 8700 is too old for these graphs, which need 8904 or newer."
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert unavailable(GPU).startswith("cuDNN's graph API needs a package (pip install nvidia-cudnn-frontend): ")


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results(cudnn: Cudnn, operation: str, dtype: str, layout: str) -> None:
    """Values, shapes, dtypes and layouts, as before anything is timed."""
    case, inputs = inputs_of(operation, dtype, layout)
    expected = reference(case, inputs)
    subject = CudnnSubject(operation, inputs)
    check("cuDNN", case, inputs, subject, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_copy(cudnn: Cudnn, operation: str) -> None:
    """A call uses its own copy and what its own forward saved; it changes no other call's results."""
    _, inputs = inputs_of(operation)
    again = {
        name: [each, (each.detach().flip(0) * 2 + 1).requires_grad_(each.requires_grad)]
        for name in ("x", "z", "dy")
        for each in getattr(inputs, name)
    }
    inputs = replace(inputs, **again)
    subject = CudnnSubject(operation, inputs)
    results = {direction: [call() for call in calls] for direction, calls in subject.calls.items()}
    repeated = {direction: [call() for call in calls] for direction, calls in subject.calls.items()}

    def expect(training: bool, x: Tensor, *z: Tensor) -> Tensor:
        statistics = (inputs.running_mean.clone(), inputs.running_var.clone())
        y = F.batch_norm(x, *statistics, weight, bias, training)
        y = y + z[0] if z else y
        return y if operation == PLAIN else y.relu()

    for i, (dy, arguments) in enumerate(zip(inputs.dy, inputs.arguments(), strict=True)):
        weight, bias = (each.clone().requires_grad_() for each in (inputs.weight, inputs.bias))
        x, *z = arguments
        y = expect(True, *arguments)
        gradients = torch.autograd.grad(y, (x, weight, bias, *z), dy)
        for each in (results, repeated):
            torch.testing.assert_close(each["forward"][i], y.detach())
            torch.testing.assert_close(each["eval"][i], expect(False, *arguments).detach())
            for direction in ("backward", "forward+backward"):
                torch.testing.assert_close(each[direction][i], gradients, rtol=1e-4, atol=1e-4)


def test_running_statistics(cudnn: Cudnn) -> None:
    """They move with the calls of forward, and with no others."""
    _, inputs = inputs_of(PLAIN)
    subject = CudnnSubject(PLAIN, inputs)
    norm = torch.nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = inputs.running_mean.clone(), inputs.running_var.clone()
    for direction in ("eval", "backward", "forward+backward"):
        subject.calls[direction][0]()
    for _ in range(3):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(subject.trained_norm, name), getattr(norm, name))
        subject.calls["forward"][0]()
        norm(inputs.x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operation", [PLAIN, RELU, ADD_RELU])
def test_what_cudnn_is_told(cudnn: Cudnn, operation: str, dtype: torch.dtype) -> None:
    _, inputs = inputs_of(operation)
    converted = {name: [each.detach().to(dtype) for each in getattr(inputs, name)] for name in ("x", "z", "dy")}
    CudnnSubject(operation, replace(inputs, **converted))
    activation, mask = (SIZE, LAST, dtype, False), (SIZE, LAST, torch.bool, False)
    scalar = ((1, 1, 1, 1), (1, 1, 1, 1), torch.float32, True)
    residual = operation == ADD_RELU
    forward = {"x": activation, "y": activation} | {"eps": scalar, "momentum": scalar}
    forward |= dict.fromkeys(("weight", "bias", "mean", "rstd"), VECTOR)
    forward |= dict.fromkeys(("running_mean", "running_var", "next_running_mean", "next_running_var"), VECTOR)
    backward = dict.fromkeys(("x", "dy", "dx"), activation)
    backward |= dict.fromkeys(("weight", "mean", "rstd", "dweight", "dbias"), VECTOR)
    evaluation = {"x": activation, "y": activation} | dict.fromkeys(("mean", "rstd", "weight", "bias"), VECTOR)
    if operation == RELU:
        backward["bias"] = VECTOR
    if residual:
        forward |= {"z": activation, "zeros": activation, "mask": mask}
        backward |= {"dz": activation, "mask": mask}
        evaluation["z"] = activation
    assert len(cudnn.graphs) == 3
    for graph, expected in zip(cudnn.graphs, (evaluation, forward, backward), strict=True):
        external = graph.external()
        assert {name: tensor.told() for name, tensor in external.items()} == expected
        assert sorted(tensor.said["uid"] for tensor in external.values()) == list(range(1, len(external) + 1))
        types = {"io_data_type": dtype, "intermediate_data_type": torch.float32, "compute_data_type": torch.float32}
        assert graph.said == types | {"handle": cudnn.handle}


def test_refusals(cudnn: Cudnn) -> None:
    """The sentence names the direction and has cuDNN's words; where one graph is refused none is compiled."""
    _, inputs = inputs_of(RELU, "bfloat16", "contiguous")
    cudnn.refuses = lambda graph: any(name == "batchnorm_backward" for name, _, _ in graph.nodes)
    with pytest.raises(Unsupported) as info:
        CudnnSubject(RELU, inputs)
    assert str(info.value) == (
        "cuDNN has no backward of bn+relu for (4, 3, 9, 7) bfloat16 with strides (189, 63, 7, 1): "
        "No valid engine configs for _: !packed."
    )
    assert not any("build_plans" in graph.steps for graph in cudnn.graphs)


def test_what_is_not_written(cudnn: Cudnn) -> None:
    _, inputs = inputs_of(PLAIN)
    rows = replace(inputs, x=[torch.randn(50, 3)])
    with pytest.raises(
        Unsupported, match=r"^cuDNN's graph of batch_norm for 2 dimensions of float32 is not written here"
    ):
        CudnnSubject(PLAIN, rows)
    with pytest.raises(Unsupported, match="4 dimensions of float64 is not written here"):
        CudnnSubject(PLAIN, replace(inputs, x=[torch.randn(SIZE, dtype=torch.float64)]))
    with pytest.raises(Unsupported, match=r"graph of bn\+silu for"):
        CudnnSubject("bn+silu", inputs)
    assert not cudnn.graphs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("device", ["cuda"])
def test_on_a_gpu(device: str, operation: str, dtype: str) -> None:
    """The package itself, called directly and captured in a CUDA graph."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if unavailable(GPU):
        pytest.skip(unavailable(GPU))
    with torch.cuda.stream(torch.cuda.Stream()):
        case = Case(OVERHEAD.name, (8, 16, 9, 7), dtype, "channels_last", operation)  # so named for one copy
        inputs = make_inputs(case, torch.device(device))
        expected = reference(case, inputs)
        subject = CudnnSubject(operation, inputs)
        check("cuDNN", case, inputs, subject, expected)
        called = {direction: calls[0]() for direction, calls in subject.calls.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = {direction: calls[0]() for direction, calls in subject.calls.items()}
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(captured, called)
