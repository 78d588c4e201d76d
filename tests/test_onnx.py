"""torch.onnx.export of bn_ext's modules: the operators that torch.nn's become, without help, and the same numbers."""

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.compiling import LIBRARIES, activated
from torch import Tensor, nn
from torch.nn import functional as F

import bn_ext
from bn_ext.activations import NAMES, Activation

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Model = nn.Module | torch.export.ExportedProgram
N = torch.export.Dim("n", min=2, max=64)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch.onnx warns of its own use of what is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(graph: Any, *inputs: Tensor) -> Tensor:
    """What onnxruntime makes of it."""
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


def operators(graph: Any) -> list[str]:
    """In order; those of other domains than ONNX's with their domain."""
    return [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph.node]


def export(model: Model, *inputs: Tensor, is_dynamic: bool = False) -> Any:
    """By torch.export, as is the default."""
    if isinstance(model, torch.export.ExportedProgram):
        return torch.onnx.export(model, dynamo=True, verbose=False).model_proto
    sizes = tuple({0: N} for _ in inputs) if is_dynamic else None
    return torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=sizes, verbose=False).model_proto


def check(models: dict[str, Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[str]:
    """Both libraries' models become the same operators, and compute what torch.nn's eager one does; the operators."""
    eager = models["torch.nn"]
    graphs = {
        library: export(models[library], torch.randn(shapes[0], dtype=dtype), is_dynamic=len(shapes) > 1)
        for library in LIBRARIES
    }
    assert operators(graphs["bn_ext"]) == operators(graphs["torch.nn"])
    for shape in shapes:
        x = torch.randn(shape, dtype=dtype)
        expected = eager(x).detach()
        # onnxruntime rounds to 16 bits and sums in other places than torch.
        tolerance = {torch.float16: 4e-3}.get(dtype, 1e-5)
        for graph in graphs.values():
            torch.testing.assert_close(run(graph, x), expected, rtol=tolerance, atol=tolerance)
    return operators(graphs["bn_ext"])


def in_eval(models: dict[str, Any]) -> dict[str, Any]:
    return {library: model.eval() for library, model in models.items()}


OPERATORS = {
    **{"relu": ["Relu"], "leaky_relu": ["LeakyRelu"], "relu6": ["Clip"], "elu": ["Elu"], "silu": ["Sigmoid", "Mul"]},
    **{"gelu": ["Gelu"], "gelu_tanh": ["Gelu"], "hardswish": ["HardSwish"], "sigmoid": ["Sigmoid"], "tanh": ["Tanh"]},
    "mish": ["Mish"],
}


@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, *NAMES, ("leaky_relu", 0.3), ("elu", 0.7)], ids=str)
def test_activations_and_residual(activation: Activation) -> None:
    """With any number of images."""
    name = activation[0] if isinstance(activation, tuple) else activation
    found = check(in_eval(activated(activation, True, dtype=torch.float32)), (4, 3, 5, 6), (7, 3, 5, 6))
    assert found[:1] == ["Sin"]
    assert sorted(found[1:3]) == ["Add", "BatchNormalization"]
    if torch.__version__ >= "2.13":  # older ones have no operator for some
        assert found[3:] == OPERATORS.get(name, [])


KINDS = {
    "nc": ("BatchNorm1d", (6, 3), (9, 3)),
    "ncl": ("BatchNorm1d", (6, 3, 5), (9, 3, 5)),
    "nchw": ("BatchNorm2d", (6, 3, 5, 4), (9, 3, 5, 4)),
    "ncdhw": ("BatchNorm3d", (6, 3, 5, 4, 2), (9, 3, 5, 4, 2)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str, affine: bool) -> None:
    kind, *shapes = KINDS[name]
    models = in_eval(activated(kind=kind, dtype=torch.float32, affine=affine))
    assert check(models, *shapes) == ["BatchNormalization"]


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_of_the_batch(affine: bool) -> None:
    """ONNX computes them, without running statistics."""
    options = {"track_running_stats": False, "affine": affine, "dtype": torch.float32}
    assert "ReduceMean" in check(in_eval(activated("relu", True, **options)), (4, 3, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    assert "BatchNormalization" in check(in_eval(activated("relu", True, dtype=dtype)), (4, 3, 5, 6), dtype=dtype)


def test_float16_beside_float32_parameters() -> None:
    models = in_eval(activated("relu", dtype=torch.float32))
    assert "BatchNormalization" in check(models, (4, 3, 5, 6), dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_training(momentum: float) -> None:
    """torch.nn's becomes an operator that uses the running statistics all the same; and so does ours."""
    models = activated("relu", True, momentum=momentum, dtype=torch.float32)
    x = torch.randn(4, 3, 5, 6)
    graphs = {library: export(model.train(), x) for library, model in models.items()}
    assert operators(graphs["bn_ext"]) == operators(graphs["torch.nn"])
    torch.testing.assert_close(run(graphs["bn_ext"], x), run(graphs["torch.nn"], x), rtol=1e-5, atol=1e-5)


class Network(nn.Module):
    """Convolution, batch norm, residual and relu; and once more without residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for norm in (self.norm, self.norm2):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm(self.conv(x)) + x))))


@pytest.mark.parametrize("how", [bn_ext.convert, bn_ext.fuse], ids=["convert", "fuse"])
def test_networks(how: Any) -> None:
    """ONNX's optimizer folds batch norms into the convolutions before them."""
    stock = Network().eval()
    ours = how(copy.deepcopy(stock))
    assert sum(isinstance(module, bn_ext.BatchNorm2d) for module in ours.modules()) == 2
    found = check({"bn_ext": ours, "torch.nn": stock}, (4, 3, 8, 8), (7, 3, 8, 8))
    assert found == ["Conv", "Add", "Relu", "Conv", "Relu"]


FORMS = {
    "program": lambda program: program,
    "loaded": lambda program: saved_and_loaded(program),
}


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    return torch.export.load(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("form", FORMS)
def test_programs_exported_before(form: str) -> None:
    models = in_eval(activated("relu", True, dtype=torch.float32))
    x = torch.randn(4, 3, 5, 6)
    graphs = {}
    for library, model in models.items():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: N},))
        graphs[library] = export(FORMS[form](program))
    assert operators(graphs["bn_ext"]) == operators(graphs["torch.nn"])
    for n in (4, 7):
        x = torch.randn(n, 3, 5, 6)
        for graph in graphs.values():
            torch.testing.assert_close(run(graph, x), models["torch.nn"](x).detach(), rtol=1e-5, atol=1e-5)


def test_afterwards_everything_runs_the_kernels() -> None:
    """The operators are torch's own only while torch.onnx is at work."""
    module, x = bn_ext.BatchNorm2d(3, activation="relu").eval(), torch.randn(4, 3, 5, 6)
    assert operators(export(module, x)) == ["BatchNormalization", "Relu"]
    program = torch.export.export(module, (x,))
    called = [str(node.target) for p in (program, program.run_decompositions()) for node in p.graph.nodes]
    assert [name for name in called if "norm" in name] == [
        "bn_ext.batch_norm.default",
        "bn_ext.batch_norm_inference.default",
    ]


@pytest.mark.parametrize("library", ["bn_ext", "torch.nn"])
def test_exporter_before_torch_export(library: str) -> None:
    """dynamo=False, which torch calls deprecated."""
    models = in_eval(activated("relu", True, dtype=torch.float32))
    x, file = torch.randn(4, 3, 5, 6), io.BytesIO()
    torch.onnx.export(models[library], (x,), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue())
    assert "BatchNormalization" in operators(graph)
    torch.testing.assert_close(run(graph, x), models["torch.nn"](x).detach(), rtol=1e-5, atol=1e-5)
