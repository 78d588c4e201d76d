"""Bad input gets one clear error, torch's where torch has one, and nothing is lost by it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bn_ext

X = torch.randn(4, 3, 2, 2)


def vector(size: int = 3, **options: object) -> torch.Tensor:
    return torch.ones(size, **options)


# name: (arguments, keyword arguments); torch raises for each, ours must raise the same type with the same words.
AS_TORCH = {
    "running_mean too long": ((X, vector(4), vector(4)), {"training": True}),
    "running_mean too long in eval": ((X, vector(4), vector(4)), {}),
    "running_var too long": ((X, vector(3), vector(4)), {"training": True}),
    "weight too long": ((X, vector(), vector(), vector(4)), {"training": True}),
    "bias too long": ((X, vector(), vector(), vector(), vector(4)), {"training": True}),
    "no statistics in eval": ((X, None, None), {}),
    "no running_var in eval": ((X, vector(), None), {}),
    "no running_var in training": ((X, vector(), None), {"training": True}),
    "no running_mean in training": ((X, None, vector()), {"training": True}),
    "one value per channel": ((torch.randn(1, 3, 1, 1), vector(), vector()), {"training": True}),
    "one value per channel, 2D": ((torch.randn(1, 3), vector(), vector()), {"training": True}),
    "running_mean requires grad": ((X, vector(requires_grad=True), vector()), {"training": True}),
    "no input": ((None, vector(), vector()), {}),
    "input is a list": (([1.0], vector(), vector()), {}),
    "weight is a list": ((X, vector(), vector(), [1.0]), {}),
    "eps is a list": ((X, vector(), vector()), {"eps": [1.0]}),
    "unknown keyword": ((X, vector(), vector()), {"foo": 1}),
    "int32": ((X.int(), vector(), vector()), {"training": True}),
    "bool": ((X.bool(), vector(), vector()), {"training": True}),
    "complex": ((X.cfloat(), vector(), vector()), {"training": True}),
}
# torch's type; torch's words are only the beginning, or are put better.
WORDS = {
    "unknown keyword": "unexpected keyword argument 'foo'",
    "running_mean requires grad": "is not differentiable with respect to argument 'running_mean'. "
    "This input cannot have requires_grad True.",
    "input is a list": "argument 'input'",
    "no input": "argument 'input'",
    "weight is a list": "argument 'weight' must be Tensor, not list",
    "eps is a list": "'eps' must be float, not list",
    "eps is a list (torch)": "not supported between instances of 'list' and 'float'",
    "weight is a list (torch)": "argument 'weight' (position 2) must be Tensor, not list",
}


def raised(function: object, *args: object, **kwargs: object) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011 - the caller looks at type and words
        function(*args, **kwargs)
    return info.value


@pytest.mark.parametrize("name", AS_TORCH)
def test_as_torch(name: str) -> None:
    args, kwargs = AS_TORCH[name]
    theirs = raised(F.batch_norm, *args, **kwargs)
    ours = raised(bn_ext.batch_norm, *args, **kwargs)
    assert type(ours) is type(theirs)
    assert WORDS.get(name, str(theirs).split("\n")[0]) in str(ours)
    assert WORDS.get(f"{name} (torch)", WORDS.get(name, "")) in str(theirs)
    assert "\n" not in str(ours).split("\nException raised from")[0]


@pytest.mark.parametrize(("training", "eps"), [(True, 0.0), (True, -1.0), (False, -1.0)])
def test_eps_out_of_range(training: bool, eps: float) -> None:
    with pytest.raises(ValueError, match=r"batch_norm eps must be (positive during training|non-negative), but got"):
        bn_ext.batch_norm(X, vector(), vector(), training=training, eps=eps)


def test_eps_zero_is_fine_in_eval() -> None:
    y = bn_ext.batch_norm(X, vector(), vector(), eps=0)
    torch.testing.assert_close(y, X - 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X, vector().double(), vector().double()), "mixed dtype.*scalar type of Float.*running_mean of Double"),
        ((X.double(), vector(), vector()), "mixed dtype.*scalar type of Double.*running_mean of Float"),
        ((X, vector(), vector(), vector().half()), "mixed dtype.*scalar type of Float.*weight of Half"),
        ((X.half(), vector(), vector(), vector().half()), "expected scalar type Float but found Half.*weight"),
        ((X, vector(device="meta"), vector(device="meta")), "same device.*input is on cpu and running_mean is on meta"),
        ((X.to("meta"), vector(), vector()), "same device.*input is on meta and running_mean is on cpu"),
        ((X, vector(), vector(), vector(device="meta")), "same device.*weight is on meta"),
        ((torch.randn(3), vector(), vector()), r"at least 2 dimensions \(N, C, ...\), got 1D"),
        ((torch.tensor(1.0), vector(), vector()), "at least 2 dimensions.*got 0D"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_runtime_errors_with_torchs_type(arguments: tuple, words: str, training: bool) -> None:
    if arguments[0].dim() > 1:
        assert isinstance(raised(F.batch_norm, *arguments, training=training), RuntimeError)
    with pytest.raises(RuntimeError, match=words):
        bn_ext.batch_norm(*arguments, training=training)


def test_momentum_none_needs_the_count() -> None:
    with pytest.raises(ValueError, match=r"momentum=None .* needs num_batches_tracked"):
        bn_ext.batch_norm(X, vector(), vector(), training=True, momentum=None)


@pytest.mark.parametrize(
    ("tracked", "words"),
    [
        (torch.tensor(0.0), "num_batches_tracked must be an int64 scalar, got Float of 0 dimensions"),
        (torch.zeros(2, dtype=torch.int64), "num_batches_tracked must be an int64 scalar, got Long of 1 dimensions"),
        (torch.tensor(0, device="meta"), "input is on cpu and num_batches_tracked is on meta"),
    ],
)
def test_num_batches_tracked(tracked: torch.Tensor, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        bn_ext.batch_norm(X, vector(), vector(), training=True, num_batches_tracked=tracked)
    with pytest.raises(TypeError, match="'num_batches_tracked' must be Tensor, not int"):
        bn_ext.batch_norm(X, vector(), vector(), training=True, num_batches_tracked=1)


@pytest.mark.parametrize(
    ("module", "shape"),
    [("BatchNorm1d", (2, 3, 4, 5)), ("BatchNorm1d", (3,)), ("BatchNorm2d", (2, 3)), ("BatchNorm3d", (2, 3, 4, 4))],
)
def test_wrong_rank_as_torch(module: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    theirs, ours = (raised(getattr(source, module)(3), x) for source in (nn, bn_ext))
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


BAD_FOR_A_MODULE = {
    "one value per channel": torch.randn(1, 3, 1, 1),
    "wrong channels": torch.randn(2, 4, 3, 3),
    "wrong rank": torch.randn(2, 3),
    "integer": torch.ones(2, 3, 2, 2, dtype=torch.int32),
    "complex": torch.ones(2, 3, 2, 2, dtype=torch.complex64),
    "float64 beside float32": torch.ones(2, 3, 2, 2, dtype=torch.float64),
    "another device": torch.ones(2, 3, 2, 2, device="meta"),
    "no tensor": [1.0],
}


@pytest.mark.parametrize("name", BAD_FOR_A_MODULE)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_failed_call_leaves_everything_as_it_was(name: str, momentum: float | None) -> None:
    module = bn_ext.BatchNorm2d(3, momentum=momentum)
    module(X)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    error = raised(module, BAD_FOR_A_MODULE[name])
    stock = raised(nn.BatchNorm2d(3), BAD_FOR_A_MODULE[name])
    assert type(error) is type(stock)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_gradient_of_a_wrong_shape() -> None:
    mean, rstd = vector(), vector()
    with pytest.raises(RuntimeError, match="grad_output must have the shape of input"):
        torch.ops.bn_ext.batch_norm_backward(X[:2], X, None, mean, rstd, True, [True, False, False])
    with pytest.raises(RuntimeError, match="grad_output must have the dtype and device of input"):
        torch.ops.bn_ext.batch_norm_backward(X.double(), X, None, mean, rstd, True, [True, False, False])
