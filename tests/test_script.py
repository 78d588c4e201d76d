"""torch.jit.script: the scripted model is torch.nn's in numbers, names and flags."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.libraries import LIBRARIES, both, filled, images, norm, plain, state, steps
from torch import Tensor, nn

import bn_ext

# It is deprecated as a whole.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
]


def model(library: str, channels: int = 3, **options: Any) -> Any:
    """Convolution, batch norm, ReLU, and a batch norm for (N, C) behind them."""
    kinds = (getattr(LIBRARIES[library], name) for name in ("BatchNorm2d", "BatchNorm1d"))
    first, second = (kind(channels, **options) for kind in kinds)
    layers = (nn.Conv2d(3, channels, 3), first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), second)
    return filled(nn.Sequential(*layers).double())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"eps": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_numbers_and_names(options: dict[str, Any]) -> None:
    """train() and eval() of the scripted module count, whichever mode it was scripted in."""

    def run(library: str) -> Any:
        results = []
        for training in (True, False):
            module = model(library, **options)
            scripted = torch.jit.script(module.train(training))
            assert list(scripted.state_dict()) == list(module.state_dict())
            assert [n for n, _ in scripted.named_parameters()] == [n for n, _ in module.named_parameters()]
            assert scripted.training == training
            results += [*steps(scripted, images()), *steps(scripted, images(5))]
        return results

    both(run)


def test_scripted_and_eager_share_their_state() -> None:
    def run(library: str) -> Any:
        module = plain(library)
        scripted = torch.jit.script(module)
        scripted(images())
        assert module.num_batches_tracked == 1
        return state(module), state(scripted)

    both(run)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_each_class(dims: int) -> None:
    x = torch.arange(2.0 * 3 * 4**dims, dtype=torch.float64).view(2, 3, *[4] * dims).sin()
    both(lambda library: steps(torch.jit.script(plain(library, 3, dims)), x))


def saved_and_loaded(scripted: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_saved_and_loaded(momentum: float | None) -> None:
    def run(library: str) -> Any:
        scripted = torch.jit.script(model(library, momentum=momentum))
        scripted(images())
        loaded = saved_and_loaded(scripted)
        assert list(loaded.state_dict()) == list(scripted.state_dict())
        return steps(loaded, images()), steps(loaded, images(5))

    both(run)


@pytest.mark.parametrize("how", ["freeze", "optimize_for_inference"])
def test_frozen(how: str) -> None:
    """Parameters are constants of the graph, and what can be folded is."""

    def run(library: str) -> Any:
        frozen = getattr(torch.jit, how)(torch.jit.script(model(library).eval()))
        return frozen(images()), saved_and_loaded(frozen)(images(5))

    both(run)


def test_a_frozen_model_with_a_batch_norm_in_training() -> None:
    """As test-time adaptation has it: parameters and statistics start as equal constants, and must not become one."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bn_ext.BatchNorm2d(3)).double().eval()
    model[1].train()
    frozen = torch.jit.freeze(torch.jit.script(copy.deepcopy(model)))
    for scale in (1, 2, 3):
        torch.testing.assert_close(frozen(images() * scale), model(images() * scale))


def test_transforms_of_a_scripted_module() -> None:
    for options in ({}, {"activation": "relu"}):
        module = bn_ext.BatchNorm2d(3, **options).double()
        module(images())
        scripted, batches = torch.jit.script(copy.deepcopy(module).eval()), torch.stack([images(), images().cos()])
        expected = torch.stack([module.eval()(x) for x in batches])
        torch.testing.assert_close(torch.func.vmap(scripted)(batches), expected)
        torch.testing.assert_close(torch.func.functionalize(scripted)(batches[0]), expected[0])


@pytest.mark.parametrize("made_by", ["script", "trace"])
def test_freezing_folds_it_into_a_convolution(made_by: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), bn_ext.BatchNorm2d(4)).double().eval()
    program = torch.jit.script(module) if made_by == "script" else torch.jit.trace(module, (images(),))
    frozen = torch.jit.freeze(program)
    assert "batch_norm" not in str(frozen.graph)
    torch.testing.assert_close(frozen(images(5)), module(images(5)))


def test_frozen_in_float32() -> None:
    """optimize_for_inference may use other libraries."""

    def run(library: str) -> Any:
        frozen = torch.jit.optimize_for_inference(torch.jit.script(model(library, 8).float().eval()))
        with torch.no_grad():
            return [frozen(images(4, torch.float32)) for _ in range(3)]

    both(run, rtol=1e-4, atol=1e-4)


def test_inside_a_module_that_is_scripted() -> None:
    """With control flow around it, and two uses of one module."""

    class Loop(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor, times: int) -> Tensor:
            for _ in range(times):
                x = torch.relu(self.norm(x)) if self.training else self.norm(x)
            return x

    def run(library: str) -> Any:
        scripted = torch.jit.script(Loop(plain(library, momentum=None)))
        results = [scripted.train(mode)(images(), 3) for mode in (True, False)]
        return results, state(scripted)

    both(run)


class Functional(nn.Module):
    """Calls batch_norm as a function, as torch.nn.functional.batch_norm is called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = filled(nn.BatchNorm2d(3).double())

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return bn_ext.batch_norm(
            *(x, norm.running_mean, norm.running_var, norm.weight, norm.bias),
            *(self.training, 0.1, norm.eps),
            activation="relu",
        )


def test_function_is_scripted_as_the_operator() -> None:
    eager = Functional()
    scripted = torch.jit.script(copy.deepcopy(eager))
    assert "bn_ext::batch_norm" in str(scripted.graph)
    torch.testing.assert_close(steps(scripted, images()), steps(eager, images()))


def test_errors_of_a_scripted_module() -> None:
    """A wrong rank, and one value per channel."""
    for library in LIBRARIES:
        scripted = torch.jit.script(plain(library))
        for shape, words in (
            ((2, 3), r"expected 4D input \(got 2D input\)"),
            ((1, 3, 1, 1), "Expected more than 1 value"),
        ):
            with pytest.raises((RuntimeError, torch.jit.Error), match=words):
                scripted(torch.ones(shape, dtype=torch.float64))


class Added(nn.Module):
    """Hands a residual to its batch norm."""

    def __init__(self, library: str, activation: Any) -> None:
        super().__init__()
        self.norm = norm(library, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, x)


@pytest.mark.parametrize("activation", [None, "relu", "silu", ("leaky_relu", 0.2)])
def test_activation_and_residual(activation: Any) -> None:
    """Scripted here, eager in torch.nn: the operators' names are looked up in Python there."""

    def run(library: str) -> Any:
        module, added = norm(library, activation=activation), Added(library, activation)
        if library == "bn_ext":
            module, added = torch.jit.script(module), torch.jit.script(added)
            module, added = saved_and_loaded(module), saved_and_loaded(added)
        return steps(module, images()), steps(added, images())

    both(run)


class Called(nn.Module):
    """Hands an activation to its batch norm, which has none of its own."""

    activation: Any

    def __init__(self, library: str, activation: Any) -> None:
        super().__init__()
        self.norm = norm(library, activation=activation if library == "torch" else None)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, bn_ext.BatchNorm2d):
            return self.norm(self.norm(x, x, self.activation, "add"), None, self.activation)
        return self.norm(self.norm(x, x))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "mish", ("leaky_relu", 0.2), ("elu", 0.5)])
def test_activation_of_a_call(activation: Any) -> None:
    """As fused models that torch.fx has traced hand it over."""

    def run(library: str) -> Any:
        module = Called(library, activation)
        if library == "bn_ext":
            module = saved_and_loaded(torch.jit.script(torch.fx.symbolic_trace(module)))
        return steps(module, images())

    both(run)


def test_arguments_that_a_scripted_module_refuses() -> None:
    """Without touching its state."""
    plain_one = torch.jit.script(plain("bn_ext"))
    relu = torch.jit.script(norm("bn_ext", activation="relu"))
    before = state(plain_one), state(relu)
    for call, words in (
        (lambda: relu(images(), None, "silu"), "got an activation, but the module has its own"),
        (lambda: plain_one(images(), images()[:1], "relu", "add"), "residual of its input's shape and dtype"),
        (lambda: plain_one(images(), None, "softplus"), "softplus"),
    ):
        with pytest.raises((RuntimeError, torch.jit.Error), match=words):
            call()
    torch.testing.assert_close((state(plain_one), state(relu)), before, rtol=0, atol=0)


def test_converted_model() -> None:
    """What bn_ext.convert leaves behind is scriptable as what it was given, before and after."""
    stock = model("torch")
    scripted = torch.jit.script(bn_ext.convert(model("torch")))
    torch.testing.assert_close(steps(scripted, images()), steps(stock, images()))


class Block(nn.Module):
    """Names of this file in forward()."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self.bn = filled(LIBRARIES[library].BatchNorm2d(3).double())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn(x) + x)


@pytest.mark.parametrize("recompute", [True, False])
def test_fused_model(recompute: bool) -> None:
    """Its original forward() is what is scripted."""
    fused = bn_ext.fuse(nn.Sequential(Block("torch"), Block("torch")), recompute=recompute)
    scripted = torch.jit.script(fused)
    stock = nn.Sequential(Block("torch"), Block("torch"))
    torch.testing.assert_close(steps(scripted, images()), steps(stock, images()))
    assert "aten::relu" in str(scripted.inlined_graph)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Scripted classes are remembered by name."""
    torch.jit._state._clear_class_state()
    yield
    torch.jit._state._clear_class_state()
