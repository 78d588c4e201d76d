"""An activation inside a module: whoever makes something else of the module is refused, whoever only reads is not."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.libraries import images, norm, plain
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel
from torch.utils.mkldnn import to_mkldnn

import bn_ext

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
]


class Frozen(nn.Module):
    """A batch norm of buffers, as detection libraries and timm's freeze_batch_norm_2d make it."""

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        for name, tensor in source.state_dict().items():
            self.register_buffer(name, tensor.clone())
        self.eps = source.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def frozen(conv: nn.Module, bn: Any) -> nn.Module:
    return nn.Sequential(conv, Frozen(bn))


def constructed_anew(conv: nn.Module, bn: Any) -> nn.Module:
    """As apex's and timm's converters to synchronised and split batch norms."""
    new = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
    new.load_state_dict(bn.state_dict())
    return nn.Sequential(conv, new.double().eval())


def folded_by_matrices(conv: nn.Conv2d, bn: Any) -> nn.Module:
    """As in detectors of the YOLO family."""
    folded = copy.deepcopy(conv)
    scale = torch.diag(bn.weight.div(torch.sqrt(bn.eps + bn.running_var)))
    folded.weight.data = (scale @ conv.weight.flatten(1)).view_as(conv.weight)
    shift = bn.bias - bn.weight * bn.running_mean / torch.sqrt(bn.running_var + bn.eps)
    folded.bias.data = scale @ conv.bias + shift
    return folded


def folded_by_tensors(conv: nn.Conv2d, bn: Any) -> nn.Module:
    statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    folded = copy.deepcopy(conv)
    folded.weight, folded.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    return folded


def folded_by_torch(conv: nn.Conv2d, bn: Any) -> nn.Module:
    return fuse_conv_bn_eval(conv, bn)


class ByFunction(nn.Module):
    """A forward of torch's function and the tensors of a module."""

    def __init__(self, conv: nn.Module, bn: Any) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        self(images())

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


def with_a_default(conv: nn.Module, bn: Any) -> nn.Module:
    """A tool that also takes layers without eps."""
    new = nn.BatchNorm2d(3, getattr(bn, "eps", 1e-5), dtype=torch.float64)
    new.load_state_dict(bn.state_dict())
    return nn.Sequential(conv, new.eval())


def of_another_class(conv: nn.Module, bn: Any) -> nn.Module:
    bn.__class__ = nn.BatchNorm2d
    return nn.Sequential(conv, bn)


def to_onednn(conv: nn.Module, bn: Any) -> nn.Module:
    dense = to_mkldnn(nn.Sequential(conv, bn).float())
    return lambda x: dense(x.float().to_mkldnn()).to_dense().double()  # type: ignore[return-value]


CONVERTERS: list[Callable[..., Any]] = [
    *(frozen, constructed_anew, folded_by_matrices, folded_by_tensors, folded_by_torch, ByFunction, with_a_default),
    *(of_another_class, to_onednn),
]


@pytest.mark.parametrize("convert", CONVERTERS)
def test_converters_refuse_a_module_with_an_activation_and_take_one_without(convert: Callable[..., Any]) -> None:
    conv, x = nn.Conv2d(3, 3, 1).double().eval(), images()
    if convert is to_onednn:
        conv, x = conv.float(), x.float()
    bn = norm("bn_ext", activation="relu", eps=0.1, dtype=x.dtype).eval()
    before, expected = dict(vars(bn)), bn(conv(x))
    with pytest.raises(RuntimeError, match=r"would lose the activation inside BatchNorm2d\(3, eps=0\.1.*=relu\): "):
        convert(conv, bn)
    assert type(bn) is bn_ext.BatchNorm2d
    assert vars(bn) == before
    torch.testing.assert_close(bn(conv(x)), expected)
    bn.activation = None
    expected = bn(conv(x))
    assert expected.min() < 0
    torch.testing.assert_close(convert(conv, bn)(x), expected.double(), rtol=1e-5, atol=1e-5)


def scripted(module: Any) -> Any:
    return torch.jit.script(module)


def traced(module: Any) -> Any:
    return torch.jit.trace(module, images())


def averaged(module: Any) -> Any:
    model = AveragedModel(module, use_buffers=True)
    model.update_parameters(module)
    return model


def initialised(module: Any) -> Any:
    """As detectors do: eps and momentum are set, not read."""
    module.eps, module.momentum = module.__dict__["eps"], 0.1
    nn.init.constant_(module.weight, 1.0)
    return module


def inspected(module: Any) -> Any:
    assert dict(inspect.getmembers(module))["momentum"] == 0.1
    assert "eps=0.1" in repr(module)
    assert "eps" not in dir(module)
    module.activation = None
    assert dict(inspect.getmembers(module))["eps"] == 0.1
    module.activation = "relu"
    return module


READERS: list[Callable[[Any], Any]] = [
    *(copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module)), scripted, traced, averaged),
    *(initialised, inspected),
]


@pytest.mark.parametrize("read", READERS)
def test_what_only_reads_works_with_an_activation(read: Callable[[Any], Any]) -> None:
    module = norm("bn_ext", activation="relu", eps=0.1).eval()
    other = read(module)
    torch.testing.assert_close(other(images()), module(images()))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "num_features", "momentum"])
def test_compiled_functions_read_all_but_eps(name: str) -> None:
    """Without a graph break."""
    module = norm("bn_ext", activation="relu")

    def scaled(x: Tensor) -> Tensor:
        value = getattr(module, name)
        return x * (value.sum() if isinstance(value, Tensor) else value)

    torch.testing.assert_close(torch.compile(scaled, fullgraph=True, backend="eager")(images()), scaled(images()))


def test_a_compiled_module_follows_its_eps() -> None:
    for activation in (None, "relu"):
        module = norm("bn_ext", activation=activation).eval()
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for eps in (0.1, 10.0):
            module.eps = eps
            expected = norm("torch", activation=activation, eps=eps).eval()(images())
            torch.testing.assert_close(compiled(images()), expected)


def test_eps_is_an_attribute_like_others_without_an_activation() -> None:
    module = plain("bn_ext")
    module.eps = 0.2
    assert module.eps == vars(module)["eps"] == 0.2
    del module.eps
    assert not hasattr(module, "eps")
    told = []
    for library in ("torch", "bn_ext"):
        module = plain(library)
        del module.eps
        for use in (lambda m: m.eps, lambda m: m(images()), lambda m: delattr(m, "eps")):
            with pytest.raises(AttributeError) as error:
                use(module)
            told.append(str(error.value))
    assert told[:3] == told[3:]
    parameter = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    module.eps = parameter
    assert module.eps is parameter
    assert "eps" in dict(module.named_parameters())


def test_subclasses_define_eps_as_they_like() -> None:
    class Own(bn_ext.BatchNorm2d):
        @property
        def eps(self) -> float:
            return 0.5

        @eps.setter
        def eps(self, value: float) -> None:
            """Not needed."""

    module = Own(3, dtype=torch.float64)
    torch.testing.assert_close(module(images()), nn.BatchNorm2d(3, eps=0.5, dtype=torch.float64)(images()))
