"""torch.fx.symbolic_trace and torchvision's feature extraction: a batch norm is one call of a module, as torch.nn's."""

import copy
import operator
import pickle
from typing import Any

import pytest
import torch
from helpers.compiling import LIBRARIES, Activated, activated, models, step
from helpers.derivatives import compare, normal
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

import bn_ext

pytestmark = pytest.mark.usefixtures("device")


def nodes(graph: torch.fx.Graph) -> list[tuple[str, str, str]]:
    """What a user sees of them: kind, name and target."""
    return [(node.op, node.name, str(node.target)) for node in graph.nodes]


@pytest.mark.parametrize("training", [True, False])
def test_same_graph_and_results(training: bool) -> None:
    ours, stock = (model.train(training) for model in models())
    traced, traced_stock = torch.fx.symbolic_trace(ours), torch.fx.symbolic_trace(stock)
    assert nodes(traced.graph) == nodes(traced_stock.graph)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["conv", "norm", "norm"]
    assert isinstance(traced.norm, bn_ext.BatchNorm2d)
    for x in (normal(4, 3, 5, 6), normal(7, 3, 5, 6)):
        compare(lambda model, x=x: step(model, x)[:2], traced, stock)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())


@pytest.mark.parametrize(
    ("kind", "shape"), [("BatchNorm1d", (6, 3)), ("BatchNorm1d", (6, 3, 5)), ("BatchNorm3d", (4, 3, 2, 3, 4))]
)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_kinds_and_options(options: dict[str, Any], kind: str, shape: tuple[int, ...]) -> None:
    both = activated(kind=kind, **options)
    traced = {library: torch.fx.symbolic_trace(nn.Sequential(model.norm)) for library, model in both.items()}
    assert nodes(traced["bn_ext"].graph) == nodes(traced["torch.nn"].graph)
    for _ in range(3):
        x = normal(*shape)
        compare(lambda model, x=x: step(model, x)[:2], traced["bn_ext"], traced["torch.nn"])
    torch.testing.assert_close(traced["bn_ext"].state_dict(), traced["torch.nn"].state_dict())


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_traced_model_follows_its_mode(library: str) -> None:
    """train() and eval() after tracing are heeded; the state_dict is that of the model."""
    both = activated("relu", has_residual=True)
    eager = copy.deepcopy(both["torch.nn"])
    traced = torch.fx.symbolic_trace(both[library].eval())
    assert list(traced.state_dict()) == list(eager.state_dict())
    for training in (True, True, False, True, False):
        traced.train(training), eager.train(training)
        assert traced.norm.training == training
        x = normal(4, 3, 5, 6)
        compare(lambda model, x=x: step(model, x)[:2], traced, eager)
    torch.testing.assert_close(traced.state_dict(), eager.state_dict())


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.2), "silu"], ids=str)
def test_activation_and_residual_stay_inside(activation: Any, has_residual: bool) -> None:
    """One node for all three; a change of the activation after tracing is heeded, as any of a module."""
    both = activated(activation, has_residual)
    traced = torch.fx.symbolic_trace(both["bn_ext"])
    called = [(node.op, str(node.target)) for node in traced.graph.nodes if node.op != "call_method"]
    assert called == [("placeholder", "x"), ("call_module", "norm"), ("output", "output")]
    for shape in ((4, 3, 5, 6), (7, 3, 2, 2)):
        compare(
            lambda model, shape=shape: step(model, normal(*shape).fill_(0.5).cumsum(-1))[:2], traced, both["torch.nn"]
        )
    torch.testing.assert_close(traced.state_dict(), both["torch.nn"].state_dict())
    traced.norm.activation = "tanh"
    both["torch.nn"].behind = "tanh"
    compare(lambda model: step(model, normal(4, 3, 5, 6).fill_(0.5).cumsum(0))[:2], traced, both["torch.nn"])


def test_two_calls_in_their_order() -> None:
    """Of one module, one of them with a residual."""

    class Twice(nn.Module):
        def __init__(self, one: Activated) -> None:
            super().__init__()
            self.norm = one.norm

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.norm(self.norm(x), z) - x

    model = Twice(activated("relu")["bn_ext"])
    traced = torch.fx.symbolic_trace(model)
    first, second, last = (node for node in traced.graph.nodes if node.op.startswith("call"))
    assert (first.target, second.target, last.target) == ("norm", "norm", operator.sub)
    assert second.args[0] is first
    x, z = normal(4, 3, 5, 6), normal(4, 3, 5, 6)
    expected = copy.deepcopy(model)
    torch.testing.assert_close(traced(x, z), expected(x, z))
    assert traced.norm.num_batches_tracked == expected.norm.num_batches_tracked == 2
    torch.testing.assert_close(traced.state_dict(), expected.state_dict())


class Around(bn_ext.BatchNorm2d):
    """A forward of its own, around the one it inherits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2) + 1


def of_a_subclass(norm: Any) -> Any:
    norm.__class__ = Around


def patched(norm: Any) -> Any:
    forward = norm.forward
    norm.forward = lambda x: forward(x + 1) * 2


def with_hook_for_all(norm: Any) -> Any:
    return register_module_forward_hook(lambda m, x, y: y * 2 if m is norm else None)


ADDITIONS: dict[str, Any] = {
    "forward hook": lambda norm: norm.register_forward_hook(lambda m, x, y: y * 2),
    "forward pre-hook": lambda norm: norm.register_forward_pre_hook(lambda m, x: (x[0] + 1,)),
    "hook of all modules": with_hook_for_all,
    "subclass": of_a_subclass,
    "patched": patched,
}


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_are_made_once(name: str, training: bool) -> None:
    """What hooks and subclasses do besides is traced, and not done by the call again; modes are heeded."""
    model, x = nn.Sequential(activated("relu")["bn_ext"].norm, nn.Tanh()), normal(4, 3, 5, 6)
    handle = ADDITIONS[name](model[0])
    try:
        traced = torch.fx.symbolic_trace(model.train(not training)).train(training)
        forms = (model, traced, torch.fx.symbolic_trace(traced), torch.compile(traced, backend="aot_eager"))
        state, results = copy.deepcopy(model.state_dict()), []
        for form in forms:
            model.load_state_dict(state)
            results.append((form(x), copy.deepcopy(model.state_dict())))
    finally:
        if isinstance(handle, RemovableHandle):
            handle.remove()
    assert results[0][1]["0.num_batches_tracked"] == training
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    if name == "subclass":
        model.load_state_dict(state)
        torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(x), results[0][0])


@pytest.mark.parametrize("training", [True, False])
def test_a_traced_model_is_exported_and_compiled(training: bool) -> None:
    ours, stock = (model.train(training) for model in models())
    traced, x = torch.fx.symbolic_trace(ours), normal(4, 3, 5, 6)
    program = torch.export.export(copy.deepcopy(traced), (x,))
    expected = copy.deepcopy(stock)(x)
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(torch.compile(traced, backend="aot_eager", fullgraph=True)(x), expected)


def test_features_of_torchvision() -> None:
    """Names of nodes and features, in training and in evaluation."""
    pytest.importorskip("torchvision")
    from torchvision.models import feature_extraction, resnet18

    stock = resnet18(num_classes=5)
    ours = bn_ext.convert(copy.deepcopy(stock))
    names = feature_extraction.get_graph_node_names(stock)
    assert feature_extraction.get_graph_node_names(ours) == names
    assert "layer1.0.bn1" in names[0]
    wanted = ["bn1", "layer1.0.bn1", "layer1.0.relu", "layer2.0.downsample.1", "layer4.1.add", "flatten"]
    x = torch.randn(2, 3, 64, 64)
    extractors = [feature_extraction.create_feature_extractor(model, wanted) for model in (ours, stock)]
    for training in (True, False, True):
        actual, expected = (extractor.train(training)(x) for extractor in extractors)
        assert list(actual) == list(expected) == wanted
        # Batch norms behind each other, in float32.
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(extractors[0].state_dict(), extractors[1].state_dict(), rtol=1e-4, atol=1e-4)
