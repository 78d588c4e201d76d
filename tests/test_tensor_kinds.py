"""Tensors that are not plain: lazily negated, without memory, subclasses, borrowed memory, other layouts and dtypes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.libraries import both, images, norm, plain, state, step, steps
from torch import Tensor, nn
from torch.autograd import grad
from torch.testing._internal.two_tensor import TwoTensor

import bn_ext

CASES = [(None, False), ("relu", False), ("relu", True), ("silu", True)]


def negated(tensor: Tensor) -> Tensor:
    """The same values, with a bit that says so instead of a minus sign in memory."""
    view = torch.complex(tensor.detach(), -tensor.detach()).conj().imag
    assert view.is_neg()
    return view


WHICH = [(which, training) for which in ("input", "residual", "parameters", "gradient") for training in (True, False)]


@pytest.mark.parametrize(("which", "training"), [*WHICH, ("statistics", False)])
@pytest.mark.parametrize(("activation", "residual"), CASES)
def test_lazily_negated(activation: Any, residual: bool, which: str, training: bool) -> None:
    def run(library: str, change: Callable[[Tensor], Tensor]) -> Any:
        module = norm(library, activation=activation).train(training)
        if which == "parameters":
            module.weight, module.bias = (nn.Parameter(change(p.detach())) for p in (module.weight, module.bias))
        if which == "statistics":
            module.running_mean, module.running_var = change(module.running_mean), change(module.running_var)
        x, z = images(), images().cos()
        leaves = [(change(t) if which == name else t).requires_grad_() for name, t in (("input", x), ("residual", z))]
        leaves = leaves[: 2 if residual else 1]
        y = module(*leaves)
        dy = y.detach().cos()
        gradients = grad(y, [*leaves, *module.parameters()], change(dy) if which == "gradient" else dy)
        return y, gradients, state(module)

    both(lambda library: run(library, negated))
    torch.testing.assert_close(run("bn_ext", negated), run("bn_ext", lambda t: t))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "residual"), CASES)
def test_lazy_copies_are_not_made_for_reading(activation: Any, residual: bool, training: bool) -> None:
    module = norm("bn_ext", activation=activation).train(training)
    values = [images(), module.weight, module.bias, *[images().cos()] * residual]
    x, weight, bias, *z = [torch._lazy_clone(value.detach()).requires_grad_() for value in values]
    statistics = [module.running_mean, module.running_var]
    before, lazy = statistics[0].clone(), [torch._lazy_clone(statistic) for statistic in statistics]
    y = bn_ext.batch_norm(x, *lazy, weight, bias, training, activation=activation, residual=z[0] if z else None)
    dy = torch._lazy_clone(y.detach().cos())
    gradients = grad(y, [x, weight, bias, *z], dy)
    assert all(map(torch._C._is_cow_tensor, [x, weight, bias, *z, dy]))  # type: ignore[attr-defined]
    assert [torch._C._is_cow_tensor(t) for t in lazy] == [not training] * 2  # type: ignore[attr-defined]
    assert torch.equal(statistics[0], before)
    expected = module(*(leaves := [images().requires_grad_(), *[images().cos().requires_grad_()] * residual]))
    torch.testing.assert_close(y, expected)
    wanted = [leaves[0], module.weight, module.bias, *leaves[1:]]
    torch.testing.assert_close(gradients, grad(expected, wanted, expected.detach().cos()))
    torch.testing.assert_close(lazy, statistics)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "residual"), CASES)
def test_tensors_of_zeros_without_memory(activation: Any, residual: bool, training: bool) -> None:
    def run(library: str) -> Any:
        module = norm(library, activation=activation).train(training)
        zeros = torch._efficientzerotensor(images().shape, dtype=torch.float64)
        x = images().requires_grad_()
        y = module(x, *[zeros] * residual)
        gradients = grad(y, [x, *module.parameters()], zeros)
        return y, [g + 0.0 for g in gradients], module(zeros), state(module)

    both(run)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Logged(torch.Tensor):
    """A subclass that sees the functions."""

    @classmethod
    def __torch_function__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(f)
        return super().__torch_function__(f, types, args, kwargs or {})


seen: list[Any] = []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "residual"), CASES)
@pytest.mark.parametrize("kind", [Plain, Logged])
def test_subclasses_are_kept(kind: Any, activation: Any, residual: bool, training: bool) -> None:
    def run(library: str) -> Any:
        module = norm(library, activation=activation).train(training)
        x = images().as_subclass(kind).requires_grad_()
        y = module(x, *[x.detach().cos()] * residual)
        gradients = grad(y.sin().sum(), [x, *module.parameters()])
        types = [type(t) is kind for t in (y, *gradients, *module.state_dict().values())]
        return [t.as_subclass(torch.Tensor) for t in (y, *gradients)], types, state(module)

    both(run)
    assert kind is Plain or torch.ops.bn_ext.batch_norm in seen


def test_subclass_of_a_weight() -> None:
    def run(library: str) -> Any:
        module = plain(library)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Plain))
        y = module(images())
        return type(y) is Plain, y.as_subclass(torch.Tensor)

    both(run)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "residual"), CASES)
def test_wrapper_subclass(activation: Any, residual: bool, training: bool) -> None:
    """Two tensors behind one, by __torch_dispatch__: derivatives pass through."""

    def run(library: str) -> Any:
        module = norm(library, activation=activation, track_running_stats=not training)
        x = TwoTensor(images(), images().cos()).requires_grad_()
        module.train(training)
        y = module(x, *[x.detach()] * residual)
        gradients = grad(y.sin().sum(), [x, *module.parameters()])
        return [(t.a, t.b) if isinstance(t, TwoTensor) else t for t in (y.detach(), *gradients)]

    both(run)


def test_what_answers_for_itself() -> None:
    class Answers:
        @classmethod
        def __torch_function__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return "answer"

    for function in (F.batch_norm, bn_ext.batch_norm):
        assert function(Answers(), torch.zeros(3), torch.ones(3)) == "answer"


def from_file(values: Tensor, folder: Path) -> Tensor:
    values.numpy().tofile(folder / "values")
    return torch.from_file(str(folder / "values"), size=values.numel(), dtype=values.dtype).view(values.shape)


def mapped(values: Tensor, folder: Path) -> Tensor:
    values.numpy().tofile(folder / "values")
    return torch.from_numpy(np.memmap(folder / "values", np.float64, "r", shape=tuple(values.shape)))


MEMORY: dict[str, Callable[[Tensor, Path], Tensor]] = {
    "numpy": lambda t, _: torch.from_numpy(t.numpy().copy()),
    "numpy fortran": lambda t, _: torch.from_numpy(np.asfortranarray(t.numpy())),
    "numpy, every second": lambda t, _: torch.from_numpy(t.numpy().repeat(2, 1)[:, ::2]),
    "dlpack": lambda t, _: torch.from_dlpack(t.clone()),
    "frombuffer": lambda t, _: torch.frombuffer(bytearray(t.numpy().tobytes()), dtype=t.dtype).view(t.shape),
    "unaligned": lambda t, _: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "file": from_file,
    "read-only map": mapped,
    "shared": lambda t, _: t.clone().share_memory_(),
    "expanded channels": lambda t, _: t[:, :1].expand(t.shape),
    "expanded batch": lambda t, _: t[:1].expand(t.shape),
    "expanded rows": lambda t, _: t[..., :1].expand(t.shape),
    "one value": lambda t, _: t[0, 0, 0, 0].expand(t.shape),
    "transposed": lambda t, _: t.transpose(2, 3),
    "windows": lambda t, _: t.unfold(3, 3, 1)[..., 1],
    "overlapping": lambda t, _: torch.as_strided(t, (4, 3, 2, 2), (20, 3, 2, 1)),
    "bits of integers": lambda t, _: t.view(torch.int64).view(torch.float64),
    "real part": lambda t, _: torch.complex(t, t.cos()).real,
    "sparse and back": lambda t, _: t.relu().to_sparse().to_dense(),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_memory_of_others(memory: str, tmp_path: Path) -> None:
    """As input and as residual."""
    x = MEMORY[memory](images(), tmp_path)

    def run(library: str) -> Any:
        results = []
        for training in (True, False):
            for activation in (None, "relu", "gelu"):
                module = norm(library, activation=activation).train(training)
                leaf = x.detach().requires_grad_()  # the same memory
                y = module(leaf, leaf)
                results.append((y, grad(y.sin().sum(), [leaf, *module.parameters()]), state(module)))
        return results

    both(run)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "int32": (Tensor.int, NotImplementedError),
    "bool": (Tensor.bool, NotImplementedError),
    "complex64": (Tensor.cfloat, NotImplementedError),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), NotImplementedError),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8), NotImplementedError),
    "sparse": (Tensor.to_sparse, NotImplementedError),
    "nested": (lambda t: torch.nested.nested_tensor([t[0], t[1, :, :3]]), RuntimeError),
    "jagged": (lambda t: torch.nested.nested_tensor([t[0], t[1, :2]], layout=torch.jagged), RuntimeError),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_refused_as_by_torch(kind: str, training: bool) -> None:
    make, error = REFUSED[kind]
    for library in ("torch", "bn_ext"):
        module = plain(library).train(training)
        before = state(module)
        with pytest.raises(error) as info:
            module(make(images()))
        assert "INTERNAL ASSERT" not in str(info.value)
        assert type(info.value) is error
        if library == "bn_ext":
            torch.testing.assert_close(state(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "residual"), [(None, False), ("relu", False)])
def test_mkldnn_layout(activation: Any, residual: bool, training: bool) -> None:
    def run(library: str) -> Any:
        module = norm(library, activation=activation, dtype=torch.float32).train(training)
        x = images(4, torch.float32).to_mkldnn()
        return module(x).to_dense(), state(module)

    both(run, rtol=1e-5, atol=1e-5)  # float32, by another library


def test_result_may_be_changed_in_place() -> None:
    def run(library: str) -> Any:
        module = plain(library)
        y = module(images())
        assert (y.is_leaf, y._is_view(), y.requires_grad) == (False, False, True)
        y.add_(1).relu_()
        return grad(y.pow(2).sum(), list(module.parameters())), steps(module, images()), step(module, images())

    both(run)


@pytest.mark.parametrize("names", [("running_mean",), ("running_var",), ("running_mean", "running_var")])
def test_negated_statistics(names: tuple[str, ...]) -> None:
    """Read in evaluation; not updated in training: torch.nn loses the update without a word."""
    expected, module = plain("bn_ext").eval(), plain("bn_ext").eval()
    for name in names:
        setattr(module, name, negated(getattr(module, name)))
    torch.testing.assert_close(module(images()), expected(images()))
    with pytest.raises(RuntimeError, match=r"lazily negated views: call resolve_neg\(\) on them"):
        module.train()(images())
    torch.testing.assert_close(state(module), state(expected))
