"""Unusual arguments are taken where torch takes them, with its result, and refused where torch refuses them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bn_ext

X = torch.randn(4, 3, 2, 2)
LIBRARIES = (F.batch_norm, bn_ext.batch_norm)


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape or (3,), **options)


VECTORS = {
    "none": (None, None),
    "right": (ones(), ones(), ones(), ones()),
    "too long": (ones(4), ones(5), ones(6), ones(7)),
    "float64": tuple(ones(dtype=torch.float64) for _ in range(4)),
    "running_mean alone": (ones(), None),
    "running_var alone": (None, ones()),
    "running_mean on meta": (ones(device="meta"), ones()),
}
EMPTY = [(0,), (0, 3), (0, 3, 2, 2), (2, 3, 0, 4), (2, 0, 2), (3, 0), (0, 3, 2, 2, 2)]


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_empty_input_comes_back_as_from_torch(
    shape: tuple[int, ...], vectors: str, training: bool, dtype: torch.dtype
) -> None:
    results = []
    for function in LIBRARIES:
        given = [v if v is None else v.clone() for v in VECTORS[vectors]]
        x = torch.empty(shape, dtype=dtype)
        if dtype.is_floating_point:
            leaves = [x.requires_grad_(), *(v.requires_grad_() for v in given[2:])]
            y = function(x, *given, training=training)
            gradients = torch.autograd.grad(y.sum(), leaves)
        else:
            y, gradients = function(x, *given, training=training), ()
        results.append([y.detach(), *gradients])
        for value, before in zip(given, VECTORS[vectors], strict=True):
            assert value is None or value.is_meta or torch.equal(value, before)
    for expected, actual in zip(*results, strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", ("elu", 0.5)])
def test_empty_input_with_activation_and_residual(activation: Any) -> None:
    x, z = torch.empty(0, 3, 2, 2, requires_grad=True), torch.empty(0, 3, 2, 2, requires_grad=True)
    y = bn_ext.batch_norm(x, None, None, training=True, activation=activation, residual=z)
    assert [g.shape for g in torch.autograd.grad(y.sum(), (x, z))] == [x.shape] * 2
    with pytest.raises(RuntimeError, match="residual must have the shape of input"):
        bn_ext.batch_norm(x, None, None, training=True, residual=X)


@pytest.mark.parametrize("shape", [(1, 0), (1, 0, 1)])
def test_empty_input_of_one_value_per_channel_is_refused(shape: tuple[int, ...]) -> None:
    for function in LIBRARIES:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            function(torch.empty(shape), None, None, training=True)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("channels", [3, 5])
def test_empty_batch_is_counted_and_updates_nothing(options: dict[str, Any], channels: int) -> None:
    states = []
    for library in (nn, bn_ext):
        module = library.BatchNorm2d(3, **options)
        y = module(torch.empty(0, channels, 2, 2))
        states.append([y, *module.buffers()])
    torch.testing.assert_close(*states)


class Index:
    def __index__(self) -> int:
        return 1


NUMBERS = {
    "tensor": torch.tensor(0.5),
    "float64 tensor": torch.tensor(0.5, dtype=torch.float64),
    "integer tensor": torch.tensor(1),
    "bool tensor": torch.tensor(True),
    "tensor of one dimension": torch.tensor([0.5]),
    "integer tensor of one dimension": torch.tensor([1]),
    "tensor with a gradient": torch.tensor(0.5, requires_grad=True),
    "numpy float32": np.float32(0.5),
    "numpy float64": np.float64(0.5),
    "numpy int64": np.int64(1),
    "numpy array": np.array(0.5),
    "numpy array of an integer": np.array(1),
    "object with an index": Index(),
    "int": 1,
    "bool": True,
    "str": "0.5",
    "complex": 1 + 1j,
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["momentum", "eps"])
@pytest.mark.parametrize("training", [True, False])
def test_numbers_of_other_types(name: str, number: str, training: bool) -> None:
    results: list[Any] = []
    for function in LIBRARIES:
        mean, var = torch.zeros(3), torch.ones(3)
        try:
            results.append([function(X, mean, var, training=training, **{name: NUMBERS[number]}), mean, var])
        except TypeError:
            results.append(TypeError)
            assert torch.equal(mean, torch.zeros(3))
    torch.testing.assert_close(*results) if results[0] is not TypeError else None
    assert (results[0] is TypeError) == (results[1] is TypeError)


def test_number_that_is_refused_is_named() -> None:
    with pytest.raises(TypeError, match=r"argument 'momentum' must be float, not Tensor"):
        bn_ext.batch_norm(X, ones(), ones(), training=True, momentum=torch.tensor([0.1]), eps=torch.tensor(0.1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_of_several_dimensions_are_refused(
    name: str, shape: tuple[int, ...], training: bool
) -> None:
    given = {"running_mean": ones(), "running_var": ones(), "training": training} | {name: ones(*shape)}
    for function, words in zip(LIBRARIES, (None, f"{name} must have one dimension, got shape"), strict=True):
        with pytest.raises(RuntimeError, match=words):
            function(X, **given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (3, 1, 1)], ids=str)
def test_parameters_of_several_dimensions(shape: tuple[int, ...], training: bool) -> None:
    parameters = {"weight": torch.rand(shape), "bias": torch.rand(shape)}
    results = [f(X, ones(), ones(), **parameters, training=training) for f in LIBRARIES]
    torch.testing.assert_close(*results)


def test_count_that_requires_a_gradient() -> None:
    for library in (nn, bn_ext):
        module = library.BatchNorm2d(3)
        module.num_batches_tracked = torch.tensor(2.0, requires_grad=True)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            module(X)
        assert torch.equal(module.running_mean, torch.zeros(3))
        assert module.num_batches_tracked == 2
        with torch.no_grad():
            module(X)
        assert module.num_batches_tracked == 3


def test_no_variance_and_no_eps() -> None:
    """The limit of eps towards zero; torch's NaN is of its way to compute it on the CPU."""
    x = torch.tensor([[-1.0], [1.0], [2.0], [3.0]])
    mean, var, weight, bias = torch.tensor([2.0]), torch.zeros(1), torch.tensor([-3.0]), torch.tensor([5.0])
    y = bn_ext.batch_norm(x, mean, var, weight, bias, eps=0.0)
    limit = F.batch_norm(x.double(), *(v.double() for v in (mean, var, weight, bias)), eps=1e-300)
    is_off_mean = x != mean
    assert torch.equal(y[is_off_mean].isinf(), limit[is_off_mean].abs() > 1e38)
    assert torch.equal(y[is_off_mean].sign(), limit[is_off_mean].sign().float())
    assert y[~is_off_mean].isnan().all()


COUNTS = [torch.tensor(-1), torch.tensor([-1]), torch.tensor(-1.0), torch.tensor(-1, dtype=torch.int32)]


@pytest.mark.parametrize("count", COUNTS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (0, 3, 2, 2)], ids=str)
def test_mean_over_no_batches_at_all(count: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Count and statistics stay as they were; torch.nn's count is 0 by then."""
    for library in (nn, bn_ext):
        module = library.BatchNorm2d(3, momentum=None)
        module.num_batches_tracked = count.clone()
        with pytest.raises(ZeroDivisionError, match="float division by zero"):
            module(torch.randn(shape, requires_grad=True))
        assert torch.equal(module.running_mean, torch.zeros(3))
        assert torch.equal(module.running_var, torch.ones(3))
    assert module.num_batches_tracked == -1
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        module(X)


@pytest.mark.parametrize("eps", [0.0, -1.0, -1e-5, -1e-4, -0.002, -1 / 3, -123.0, -1e15, -1e16, -1.5e20])
@pytest.mark.parametrize("training", [True, False])
def test_eps_out_of_range_in_torchs_words(eps: float, training: bool) -> None:
    words: list[str] = []
    for function in LIBRARIES:
        try:
            function(X, ones(), ones(), training=training, eps=eps)
            words.append("")
        except ValueError as error:
            words.append(str(error))
    theirs, ours = words
    assert (ours == "") == ((eps, training) == (0.0, False))
    if theirs.startswith("batch_norm eps must be positive, but"):  # torch 2.11 says so of 0 in evaluation, too
        ours = (ours or theirs).replace(" during training", "").replace("non-negative", "positive")
    assert ours == theirs


def test_operator_itself_refuses_what_the_function_refuses() -> None:
    with pytest.raises(RuntimeError, match="running_mean must have one dimension"):
        torch.ops.bn_ext.batch_norm_forward(X, None, None, ones(1, 3), ones(), None, None, 0.1, 1e-5)
    with pytest.raises(ZeroDivisionError):
        torch.ops.bn_ext.batch_norm_forward(X, None, None, ones(), ones(), torch.tensor(-1), None, None, 1e-5)
