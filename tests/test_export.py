"""torch.export, AOTInductor and torch.jit.trace: what comes out runs like the model, in other processes too."""

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compiling import LIBRARIES, Activated, activated, models
from helpers.derivatives import compare, leaf, loss, modules, normal
from torch import Tensor, nn

import bn_ext
from bn_ext.activations import NAMES

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),
]
BATCH_AND_IMAGE = ({axis: torch.export.Dim(name, min=2, max=64) for axis, name in {0: "n", 2: "h", 3: "w"}.items()},)


def called_operators(program: torch.export.ExportedProgram) -> list[str]:
    """Names of what the graph calls."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool, strict: bool) -> None:
    ours, stock = (model.train(training) for model in models())
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = torch.export.export(ours, (normal(4, 3, 5, 6),), strict=strict, dynamic_shapes=sizes)
    assert called_operators(program).count("bn_ext.batch_norm.default") == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded, again = (torch.export.load(io.BytesIO(file.getvalue())) for _ in range(2))
    for exported in (program, loaded, again.run_decompositions()):
        expected, module = copy.deepcopy(stock), exported.module()
        for x in (normal(4, 3, 5, 6), normal(7, 3, 5, 6)):
            torch.testing.assert_close(module(x), expected(x))
        state = module.state_dict()
        torch.testing.assert_close(dict(state), {name: expected.state_dict()[name] for name in state})


@pytest.mark.parametrize("training", [True, False])
def test_decomposed_graph(training: bool) -> None:
    called = called_operators(
        torch.export.export(modules()[0].train(training), (normal(4, 3, 5, 6),)).run_decompositions()
    )
    assert any("auto_functionalized" in name for name in called) == training
    assert ("bn_ext.batch_norm_inference.default" in called) != training


@pytest.mark.parametrize("form", ["training", "eval", "decomposed_eval"])
def test_exported_program_is_differentiable(form: str) -> None:
    (ours, stock), x = (model.train(form == "training") for model in models()), normal(4, 3, 5, 6)
    program = torch.export.export(ours, (x,))
    exported = (program.run_decompositions() if form == "decomposed_eval" else program).module()

    def run(module: nn.Module) -> dict[str, Tensor]:
        loss(module(x)).backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    compare(run, exported, stock)


def test_traced_model_is_saved_and_loaded() -> None:
    """In torch's operator, so that no other process needs bn_ext, and passes of TorchScript know it."""
    ours, stock = (model.eval() for model in models())
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(ours, (normal(4, 3, 5, 6),)), file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert str(loaded.inlined_graph).count("aten::batch_norm(") == 2
    for x in (leaf(normal(4, 3, 5, 6)), leaf(normal(7, 3, 4, 4))):
        compare(lambda model, x=x: (model(x), torch.autograd.grad(loss(model(x)), x)), loaded, stock)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.2), "gelu_tanh"], ids=str)
def test_export_with_activation_and_residual(activation: Any, library: str, training: bool, strict: bool) -> None:
    """One operator in bn_ext's graph; batch and image of any size."""
    both = activated(activation, has_residual=True)
    model, eager = both[library].train(training), copy.deepcopy(both["torch.nn"]).train(training)
    program = torch.export.export(model, (normal(4, 3, 5, 6),), strict=strict, dynamic_shapes=BATCH_AND_IMAGE)
    if library == "bn_ext":
        assert called_operators(program) == ["aten.sin.default", "bn_ext.batch_norm.default"]
    for module in (program.module(), program.run_decompositions().module()):  # they share their statistics
        for shape in ((4, 3, 5, 6), (7, 3, 8, 4)):
            x = normal(*shape)
            torch.testing.assert_close(module(x), eager(x))
        state = module.state_dict()  # without a count that is not used
        torch.testing.assert_close(dict(state), {name: eager.state_dict()[name] for name in state})
    assert "norm.running_var" in state


@pytest.mark.parametrize("activation", NAMES)
def test_exported_activations(activation: str) -> None:
    both, x = activated(activation), normal(4, 3, 5, 6)
    program = torch.export.export(both["bn_ext"].eval(), (x,))
    expected = both["torch.nn"].eval()(x)
    for exported in (program, program.run_decompositions()):
        torch.testing.assert_close(exported.module()(x), expected)


def in_a_fresh_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code`, with `folder` as its current one."""
    root = Path(bn_ext.__file__).resolve().parent.parent
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import torch; {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_saved_program_in_another_process(tmp_path: Path, decomposed: bool, training: bool) -> None:
    """It needs bn_ext, but nothing of the model's source."""
    both, x = activated("silu", has_residual=True), normal(4, 3, 5, 6)
    program = torch.export.export(both["bn_ext"].train(training), (x,), dynamic_shapes=BATCH_AND_IMAGE)
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "program.pt2")
    torch.save(x, tmp_path / "x.pt")
    load = "module = torch.export.load('program.pt2').module(); y = module(torch.load('x.pt'))"
    done = in_a_fresh_process(
        tmp_path, f"import bn_ext; {load}; torch.save((y.detach(), dict(module.state_dict())), 'y.pt')"
    )
    assert done.returncode == 0, done.stderr
    y, state = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(y, both["torch.nn"].train(training)(x).detach())
    torch.testing.assert_close(state, dict(both["torch.nn"].state_dict()))
    failed = in_a_fresh_process(tmp_path, load)
    assert failed.returncode != 0
    assert "bn_ext" in failed.stderr


class Network(nn.Module):
    """A convolution, batch norm by itself, and batch norm with residual and activation."""

    def __init__(self, plain: nn.Module, last: Activated) -> None:
        super().__init__()
        self.conv, self.plain, self.last = nn.Conv2d(3, 3, 3, padding=1), plain, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.plain(self.conv(x)))


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package calls the operator; the process that loads it imports bn_ext."""
    monkeypatch.setenv("CI", "true")  # inductor is stricter then
    plain, last = activated(dtype=torch.float32), activated("silu", has_residual=True, dtype=torch.float32)
    ours, stock = (Network(plain[library], last[library]).eval() for library in LIBRARIES)
    stock.load_state_dict(ours.state_dict())
    x = normal(4, 3, 5, 6, dtype=torch.float32)
    ours.to(x.device), stock.to(x.device)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: BATCH_AND_IMAGE[0][0]},))
    package = str(tmp_path / "model.pt2")
    assert torch._inductor.aoti_compile_and_package(program, package_path=package) == package
    loaded = torch._inductor.aoti_load_package(package)
    for n in (4, 7):
        x = normal(n, 3, 5, 6, dtype=torch.float32)
        # The tolerance is that of a few float32 sums behind each other, in another order.
        torch.testing.assert_close(loaded(x), stock(x), rtol=1e-4, atol=1e-4)
    failed = in_a_fresh_process(tmp_path, "torch._inductor.aoti_load_package('model.pt2')")
    assert failed.returncode != 0
    assert "Could not find schema for bn_ext::batch_norm_inference" in failed.stderr


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("library", LIBRARIES)
def test_traced_with_activation_and_residual(library: str, training: bool) -> None:
    """torch.jit.trace keeps the mode in which it has traced."""
    both = activated("relu", has_residual=True)
    model, eager = both[library].train(training), copy.deepcopy(both["torch.nn"]).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(model, (normal(4, 3, 5, 6),), check_trace=False)
    eager.load_state_dict(model.state_dict())  # tracing was a step
    for shape in ((4, 3, 5, 6), (7, 3, 4, 4)):
        x = normal(*shape)
        torch.testing.assert_close(traced(x), eager(x))
    torch.testing.assert_close(dict(traced.state_dict()), dict(eager.state_dict()))
