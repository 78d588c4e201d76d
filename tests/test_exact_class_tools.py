"""Tools that ask for torch.nn's exact classes and functions: under reverted() they give what they give for torch.nn.

Stand-ins work as such tools do; the tools themselves run where they are installed.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.libraries import filled
from torch import Tensor, nn

import bn_ext

# Some of these tools use deprecated parts of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Block(nn.Module):
    """Two things to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))) + x)


def network() -> Any:
    torch.manual_seed(0)
    return filled(nn.Sequential(Block(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))).eval()


def image() -> Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def counted_by_class(model: Any) -> Any:
    """Stand-in: hooks of modules by type(module)."""
    counts = {nn.Conv2d: lambda m, y: y.numel() * m.weight[0].numel(), nn.BatchNorm2d: lambda m, y: 2 * y.numel()}
    total = 0

    def add(module: nn.Module, _: Any, y: Tensor) -> None:
        nonlocal total
        total += counts[type(module)](module, y)

    hooks = [m.register_forward_hook(add) for m in model.modules() if type(m) in counts]
    model(image())
    for hook in hooks:
        hook.remove()
    return total


def counted_by_function(model: Any) -> Any:
    """Stand-in: functions of torch.nn.functional are patched."""
    original, total = (
        {name: getattr(F, name) for name in ("batch_norm", "relu")},
        dict.fromkeys(("batch_norm", "relu"), 0),
    )

    def patched(name: str) -> Callable[..., Tensor]:
        def count(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            total[name] += x.numel()
            return original[name](x, *args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in original:
            patch.setattr(F, name, patched(name))
        model(image())
    return total


def thop(model: Any, **options: Any) -> Any:
    return pytest.importorskip("thop").profile(model, (image(),), verbose=False, **options)


def fvcore(model: Any, **handles: Any) -> Any:
    counter = pytest.importorskip("fvcore.nn").FlopCountAnalysis(model, image())
    counter.unsupported_ops_warnings(False).set_op_handle(**handles)
    return counter.total(), counter.by_operator()


def ptflops(model: Any, **options: Any) -> Any:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False, "backend": "pytorch"} | options
    return count(model, (3, 8, 8), **options)


def torch_pruning(model: Any) -> Any:
    return pytest.importorskip("torch_pruning").utils.count_ops_and_params(model, image())


def calflops(model: Any) -> Any:
    count = pytest.importorskip("calflops").calculate_flops
    with contextlib.redirect_stdout(io.StringIO()):
        return count(model, input_shape=(1, 3, 8, 8), output_as_string=False, print_results=False)


def torchprofile(model: Any) -> Any:
    return pytest.importorskip("torchprofile").profile_macs(model, image())


class Summed(nn.Module):
    """A few modules behind each other, without an addition, with one value for each image of two classes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.pool, self.last = model[1], nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)
        filled(self.last)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.body(x)).flatten(1))


def captum(model: Any) -> Any:
    return pytest.importorskip("captum.attr").LRP(Summed(model).eval()).attribute(image(), target=1)


def backpack(model: Any) -> Any:
    package = pytest.importorskip("backpack")
    body = package.extend(nn.Sequential(*model[1], nn.Flatten(), filled(nn.Linear(256, 2))).eval())
    with package.backpack(package.extensions.DiagGGNExact()):
        package.extend(nn.CrossEntropyLoss())(body(image()), torch.tensor([1])).backward()
    return [parameter.diag_ggn_exact for parameter in body.parameters()]


TOOLS = [
    counted_by_class,
    counted_by_function,
    thop,
    fvcore,
    ptflops,
    torch_pruning,
    calflops,
    torchprofile,
    captum,
    backpack,
]


@pytest.mark.parametrize("make", [bn_ext.convert, bn_ext.fuse])
@pytest.mark.parametrize("tool", TOOLS)
def test_reverted_models_are_torchs(tool: Callable[[Any], Any], make: Callable[[Any], Any]) -> None:
    expected = tool(network())
    model = make(network())
    kinds, y = [type(m) for m in model.modules()], model(image())
    with bn_ext.reverted(model):
        actual = tool(model)
    assert [type(m) for m in model.modules()] == kinds
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(model(image()), y, rtol=0, atol=0)
    # These trace: a converted model is torch's own operator there, and fvcore's trace runs no fused form.
    is_needed = tool is not fvcore and not (tool is torchprofile and make is bn_ext.convert)
    assert (str(outcome(tool, make(network()))) != str(expected)) == is_needed, "whether it needs reverted()"


def outcome(tool: Callable[[Any], Any], model: Any) -> Any:
    """Its result, or its error about a class that it does not know."""
    try:
        return tool(model)
    except (TypeError, NotImplementedError) as error:
        return error


def hooks(tool: Callable[..., Any]) -> dict[str, Any]:
    """The tool's own count of torch.nn's batch norms, as what a user hands over for ours."""
    if tool is thop:
        return {"custom_ops": {bn_ext.BatchNorm2d: pytest.importorskip("thop").vision.basic_hooks.count_normalization}}
    if tool is ptflops:
        count = pytest.importorskip("ptflops.pytorch_ops").bn_flops_counter_hook
        return {"custom_modules_hooks": {bn_ext.BatchNorm2d: count}}
    return {"bn_ext::batch_norm": pytest.importorskip("fvcore.nn.jit_handles").batchnorm_flop_jit}


@pytest.mark.parametrize("make", [bn_ext.convert, bn_ext.fuse])
@pytest.mark.parametrize("tool", [thop, fvcore, ptflops])
def test_hooks_of_the_tools_themselves(tool: Callable[..., Any], make: Callable[[Any], Any]) -> None:
    assert tool(make(network()), **hooks(tool)) == tool(network())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
