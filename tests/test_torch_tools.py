"""What torch's own tools make of a batch norm: parametrisation, pruning, folding, quantisation, traced graphs."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from helpers.libraries import both, images, plain, state, step, steps
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization
from torch.nn.utils import fusion, parametrizations, parametrize, prune, skip_init
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.mkldnn import to_mkldnn

import bn_ext


@pytest.fixture(autouse=True)
def _old_tools() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", "Please use quant_min and quant_max", UserWarning)
        warnings.filterwarnings("ignore", "must run observer before calling calculate_qparams", UserWarning)
        yield


class Names(TorchDispatchMode):
    """The names of the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("differentiates", [True, False])
def test_profilers_and_modes_see_the_operators(differentiates: bool, training: bool) -> None:
    module, x = bn_ext.BatchNorm2d(3, dtype=torch.float64).train(training), images()
    expected = {"bn_ext::batch_norm_forward" if training else "bn_ext::batch_norm_inference"}

    def run() -> None:
        with torch.set_grad_enabled(differentiates):
            y = module(x)
        if differentiates:
            expected.add("bn_ext::batch_norm_backward")
            y.sum().backward()

    with Names() as mode:
        run()
    with torch.profiler.profile() as profiler:
        run()
    assert expected <= mode.names
    assert expected <= {event.name for event in profiler.events()}


class Positive(nn.Module):
    """exp, with an inverse."""

    def forward(self, w: Tensor) -> Tensor:
        return w.exp()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.log()


@pytest.mark.parametrize("names", [("weight",), ("weight", "bias"), ("running_var",)])
def test_parametrized(names: tuple[str, ...]) -> None:
    """The property that comes in the place of a parameter or buffer is what counts; a copy and a checkpoint have it."""

    def run(library: str) -> Any:
        module, twin = plain(library), plain(library, 3)
        for each in (module, twin):
            for name in names:
                parametrize.register_parametrization(each, name, Positive())
        # In training a statistic that has become the result of a function is not what is updated.
        run_steps = (lambda m: step(m.eval(), images())) if "running_var" in names else (lambda m: steps(m, images()))
        results = [run_steps(module)]
        with torch.no_grad():
            getattr(module.parametrizations, names[0]).original.mul_(1.5)
        results.append(run_steps(module))
        with parametrize.cached():
            results.append(step(module, images()))
        twin.load_state_dict(module.state_dict())
        results.append(run_steps(twin))
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only supported through"):
            pickle.dumps(module)
        for name in names:
            parametrize.remove_parametrizations(module, name)
        assert type(module) is type(plain(library))
        return [*results, steps(module, images())]

    both(run)


def test_weight_norm() -> None:
    def run(library: str) -> Any:
        results = []
        for add in (parametrizations.weight_norm, nn.utils.weight_norm):
            module = add(plain(library))
            results += [step(module, images()), step(module.eval(), images())]
        return [*results, step(nn.utils.remove_weight_norm(module), images())]

    both(run)


def test_pruned() -> None:
    def run(library: str) -> Any:
        model = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), plain(library))
        nn.init.eye_(model[0].weight.view(3, 3))
        nn.init.zeros_(model[0].bias)
        prune.l1_unstructured(model[1], "weight", 1)
        prune.global_unstructured([(model[0], "weight"), (model[1], "bias")], prune.L1Unstructured, amount=2)
        results = [step(model, images()), step(model.eval(), images())]
        prune.remove(model[1], "weight")
        assert (model[1].weight == 0).sum() == 1
        return [*results, steps(model[1], images())]

    both(run)


CONVOLUTIONS: list[Any] = [
    *((nn.Conv1d, 1, (2, 3, 9)), (nn.Conv2d, 2, (2, 3, 7, 6)), (nn.Conv3d, 3, (2, 3, 5, 4, 3))),
    *((nn.ConvTranspose1d, 1, (2, 3, 9)), (nn.ConvTranspose2d, 2, (2, 3, 7, 6))),
    (nn.ConvTranspose3d, 3, (2, 3, 5, 4, 3)),
]
CONVOLUTIONS = [(*case, affine) for case in CONVOLUTIONS for affine in (True, False)] + [(nn.Linear, 1, (4, 3), True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "dims", "shape", "affine"), CONVOLUTIONS)
def test_folded_into_the_layer_before(kind: Any, dims: int, shape: tuple[int, ...], affine: bool, bias: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    size = () if kind is nn.Linear else (2,)
    layer = kind(3, 4, *size, bias=bias, dtype=torch.float64).eval()

    def run(library: str) -> Any:
        after = plain(library, 4, dims, affine=affine).eval()
        if kind is nn.Linear:
            folded = fusion.fuse_linear_bn_eval(layer, after)
        else:
            folded = fusion.fuse_conv_bn_eval(layer, after, transpose="Transpose" in kind.__name__)
        torch.testing.assert_close(folded(x), after(layer(x)))
        return folded(x), state(folded)

    both(run)


def convolutions(library: str, activation: Any = None) -> nn.Sequential:
    """Two convolutions with batch norms, and a ReLU, inside the first batch norm where that is wanted."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, dtype=torch.float64), nn.Conv2d(4, 4, 3, dtype=torch.float64)]
    model = nn.Sequential(layers[0], plain(library, 4), nn.ReLU(), layers[1], plain(library, 4))
    if activation is not None and library == "bn_ext":
        model[1].activation, model[2] = activation, nn.Identity()
    return model


TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fx fuse": optimization.fuse,
    "fx optimize_for_inference": optimization.optimize_for_inference,
    "fuse_fx": quantize_fx.fuse_fx,
    "prepare_fx": lambda m: quantize_fx.prepare_fx(
        m, quantization.get_default_qconfig_mapping("fbgemm"), (images(2, torch.float32),)
    ),
}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_for_inference_lose_nothing(tool: str, activation: Any) -> None:
    """They look for exactly torch's classes, and leave ours in place."""

    def run(library: str) -> Any:
        model = TOOLS[tool](convolutions(library, activation).float().eval())
        return model(images(4, torch.float32))

    both(run, rtol=1e-4, atol=1e-4)  # float32, with the batch norm inside the convolution or behind it


@pytest.mark.parametrize("qat", [True, False])
def test_fuse_modules_refuses_or_takes_reverted_ones(qat: bool) -> None:
    """Quantisation knows torch's own classes by name: one clear error, and bn_ext.revert is what helps."""
    fuse = quantization.fuse_modules_qat if qat else quantization.fuse_modules
    model = convolutions("bn_ext").train(qat)
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*bn_ext\.modules\.BatchNorm2d"):
        fuse(model, [["0", "1", "2"], ["3", "4"]])

    def run(library: str) -> Any:
        model = convolutions(library).float().train(qat)
        if library == "bn_ext":
            bn_ext.revert(model)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        model = fuse(model, [["0", "1", "2"], ["3", "4"]])
        model = quantization.prepare_qat(model) if qat else model
        return model(images(4, torch.float32))

    both(run)


def test_quantized_input_is_refused() -> None:
    """Without fusing, static quantisation leaves ours as it is."""
    model = nn.Sequential(quantization.QuantStub(), plain("bn_ext", dtype=torch.float32), quantization.DeQuantStub())
    model.eval().qconfig = quantization.get_default_qconfig("fbgemm")
    model = quantization.prepare(model)
    model(images(4, torch.float32))
    with pytest.raises(NotImplementedError, match="\"batch_norm\" not implemented for 'QUInt8'"):
        quantization.convert(model)(images(4, torch.float32))


def test_dynamic_quantization_of_the_rest() -> None:
    def run(library: str) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(plain(library, 5, 1, dtype=torch.float32), nn.Linear(5, 3)).eval()
        return quantization.quantize_dynamic(model, {nn.Linear})(torch.arange(20.0).view(4, 5).sin())

    both(run)


def test_to_mkldnn() -> None:
    def run(library: str) -> Any:
        model = to_mkldnn(convolutions(library).float().eval())
        return model(images(4, torch.float32).to_mkldnn()).to_dense()

    both(run, rtol=1e-4, atol=1e-4)


def test_skip_init_and_meta_device() -> None:
    """Made without memory, filled from a checkpoint."""

    def run(library: str) -> Any:
        source = plain(library)
        empty = skip_init(type(source), 3, dtype=torch.float64)
        empty.load_state_dict(source.state_dict())
        with torch.device("meta"):
            model = type(source)(3, momentum=None)
        assert {t.device.type for t in model.state_dict().values()} == {"meta"}
        results = [steps(empty, images())]
        moved = copy.deepcopy(model).double().to_empty(device="cpu")
        moved.reset_parameters()
        results.append(steps(moved, images()))
        model.load_state_dict(state(source), assign=True)
        return [*results, steps(model, images())]

    both(run)


def test_to_mkldnn_does_not_lose_an_activation() -> None:
    with pytest.raises(RuntimeError, match=r"would lose the activation inside .*set its `activation` to None"):
        to_mkldnn(convolutions("bn_ext", "relu").float().eval())
