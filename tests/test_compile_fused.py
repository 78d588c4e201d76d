"""torch.compile of batch norms with an activation and a residual inside, beside torch.nn's behind each other."""

import copy

import pytest
import torch
from helpers.compiling import activated, assert_same_steps, laid_out
from helpers.derivatives import modules, normal
from helpers.fusing import ADD_RELU, Block, fused_and_stock
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import bn_ext
from bn_ext.activations import NAMES, Activation

pytestmark = pytest.mark.usefixtures("device", "fresh_compiler")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", [None, *NAMES, ("leaky_relu", 0.3), ("elu", 0.7)], ids=str)
def test_activations(activation: Activation, has_residual: bool, training: bool) -> None:
    both = activated(activation, has_residual)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both["bn_ext"].train(training), backend=counter, fullgraph=True)
    assert_same_steps(compiled, both["torch.nn"].train(training), [normal(4, 3, 5, 6) for _ in range(2)])
    assert counter.frame_count == 1


OPTIONS = {
    "cumulative": {"momentum": None},
    "not_affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "untracked_cumulative": {"track_running_stats": False, "momentum": None},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.2), "silu"], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, activation: Activation, training: bool) -> None:
    both = activated(activation, has_residual=True, **OPTIONS[options])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both["bn_ext"].train(training), backend=counter, fullgraph=True)
    assert_same_steps(compiled, both["torch.nn"].train(training), [normal(4, 3, 5, 6) for _ in range(3)])
    assert counter.frame_count == 1


SHAPES = [(4, 3, 5, 6), (6, 3, 5, 6), (6, 3, 7, 9), (9, 3, 8, 4), (4, 3, 5, 6)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["relu6", "gelu"])
def test_batch_and_image_sizes_that_change(activation: str, layout: str, training: bool) -> None:
    both = activated(activation, has_residual=True)
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(both["bn_ext"].train(training), backend=counter, fullgraph=True, dynamic=True)
    for shape in SHAPES:
        assert_same_steps(compiled, both["torch.nn"].train(training), [laid_out(shape, layout)])
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("change", ["name", "parameter"])
def test_an_activation_that_is_changed(change: str) -> None:
    """Compiled again, and only then."""
    (ours, stock), x = modules(), normal(4, 3, 5, 6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    ours.activation = ("leaky_relu", 0.1)
    torch.testing.assert_close(compiled(x), F.leaky_relu(stock(x), 0.1))
    ours.activation = "silu" if change == "name" else ("leaky_relu", 0.4)
    expected = F.silu(stock(x)) if change == "name" else F.leaky_relu(stock(x), 0.4)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    assert counter.frame_count == 2


class Network(nn.Module):
    """Convolutions and what can be fused behind them: silu, and relu with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norms[0](self.convs[0](x)))
        return F.relu(self.norms[1](self.convs[1](y)) + x)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_network_by_inductor(device: str, training: bool) -> None:
    """Sizes change from step to step."""
    network = Network().to(device)
    stock = copy.deepcopy(network).train(training)
    fused, report = bn_ext.fuse(network.train(training), report=True)
    assert [row.what for row in report.rows] == ["batch_norm + silu", ADD_RELU]
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    inputs = [laid_out(shape, "contiguous", torch.float32) for shape in (SHAPES[0], SHAPES[2])]
    assert_same_steps(compiled, stock, inputs, fusing=True)


@pytest.mark.parametrize("training", [True, False])
def test_residual_of_another_shape(training: bool) -> None:
    """What fuse() made falls back to torch's addition there, compiled too."""
    fused, stock, told = fused_and_stock(Block(lambda self, x, z: F.relu(self.bn(x) + z)))
    assert told[0] == ADD_RELU
    compiled = torch.compile(fused.train(training), backend="aot_eager", fullgraph=True)
    stock.train(training)
    for shape in ((4, 3, 5, 6), (4, 3, 1, 1), (6,)):
        x, z = normal(4, 3, 5, 6).cpu(), normal(*shape).cpu()
        torch.testing.assert_close(compiled(x, z), stock(x, z))
    torch.testing.assert_close(fused.state_dict(), stock.state_dict())


class WrittenByChannel(nn.Module):
    """What a compiler may write with channels last: a convolution, and its sine."""

    def __init__(self, sine: bool) -> None:
        super().__init__()
        self.conv, self.sine = nn.Conv2d(3, 8, 3, padding=1), sine
        self.norm, self.last = bn_ext.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(self.norm(y.sin() if self.sine else y, y.cos()))


@pytest.mark.parametrize("sine", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor_chooses_the_layout(device: str, layout: str, sine: bool) -> None:
    """Between convolutions nothing is copied for the sake of strides, where it has channels last."""
    network = WrittenByChannel(sine).to(device)
    compiled = torch.compile(network, fullgraph=True)
    inputs = [laid_out((4, 3, 5, 6), layout, torch.float32)]
    eager = copy.deepcopy(network)
    _, codes = run_and_get_code(assert_same_steps, compiled, eager, inputs, fusing=True)
    if device == "cpu":  # there inductor always chooses channels last for convolutions
        assert len(codes) == 2
        assert not any("240, 30, 6, 1" in code for code in codes)
