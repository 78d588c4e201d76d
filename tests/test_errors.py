"""Bad input gets one clear error, torch's where torch has one, and nothing is lost by it.

The words are those of torch on the CPU, whichever device bn_ext runs on: on a GPU they depend on the kernel.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bn_ext

X = torch.randn(4, 3, 2, 2)


def vector(size: int = 3, **options: object) -> torch.Tensor:
    return torch.ones(size, **options)


def on(device: str, arguments: Any) -> Any:
    """The same arguments with the CPU's tensors on a device."""
    if isinstance(arguments, torch.Tensor):
        leaf = arguments.detach().to(device) if arguments.device.type == "cpu" else arguments
        return leaf.requires_grad_(arguments.requires_grad)
    return tuple(on(device, a) for a in arguments) if isinstance(arguments, tuple) else arguments


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
    "no running_var and running_mean too long": ((X, vector(4), None), {"training": True}),
    "no running_var and weight too long": ((X, vector(), None, vector(4)), {"training": True}),
    "no running_var in eval and running_mean too long": ((X, vector(4), None), {}),
    "no running_mean of another dtype": ((X, None, vector().double()), {"training": True}),
    "int32 and running_mean too long": ((X.int(), vector(4), vector()), {"training": True}),
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
def test_as_torch(device: str, name: str) -> None:
    args, kwargs = AS_TORCH[name]
    theirs = raised(F.batch_norm, *args, **kwargs)
    ours = raised(bn_ext.batch_norm, *on(device, args), **kwargs)
    assert type(ours) is type(theirs)
    assert WORDS.get(name, str(theirs).split("\n")[0]) in str(ours)
    assert WORDS.get(f"{name} (torch)", WORDS.get(name, "")) in str(theirs)
    assert "\n" not in str(ours).split("\nException raised from")[0]


def test_eps_zero_is_fine_in_eval(device: str) -> None:
    y = bn_ext.batch_norm(*on(device, (X, vector(), vector())), eps=0)
    torch.testing.assert_close(y.cpu(), X - 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X, vector().double(), vector().double()), "mixed dtype.*scalar type of Float.*running_mean of Double"),
        ((X.double(), vector(), vector()), "mixed dtype.*scalar type of Double.*running_mean of Float"),
        ((X, vector(), vector(), vector().half()), "mixed dtype.*scalar type of Float.*weight of Half"),
        ((X.half(), vector(), vector().half()), "expected scalar type Float but found Half.*running_var"),
        (
            (X, vector(device="meta"), vector(device="meta")),
            "same device.*input is on DEVICE and running_mean is on meta",
        ),
        ((X.to("meta"), vector(), vector()), "same device.*input is on meta and running_mean is on DEVICE"),
        ((X, vector(), vector(), vector(device="meta")), "same device.*weight is on meta"),
        ((torch.randn(3), vector(), vector()), r"at least 2 dimensions \(N, C, ...\), got 1D"),
        ((torch.tensor(1.0), vector(), vector()), "at least 2 dimensions.*got 0D"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_runtime_errors_with_torchs_type(device: str, arguments: tuple, words: str, training: bool) -> None:
    if arguments[0].dim() > 1:
        assert isinstance(raised(F.batch_norm, *arguments, training=training), RuntimeError)
    with pytest.raises(RuntimeError, match=words.replace("DEVICE", str(on(device, X).device))):
        bn_ext.batch_norm(*on(device, arguments), training=training)


def test_momentum_none_needs_the_count(device: str) -> None:
    with pytest.raises(ValueError, match=r"momentum=None .* requires num_batches_tracked"):
        bn_ext.batch_norm(*on(device, (X, vector(), vector())), training=True, momentum=None)


def test_count_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="'num_batches_tracked' must be Tensor, not int"):
        bn_ext.batch_norm(X, vector(), vector(), training=True, num_batches_tracked=1)


@pytest.mark.parametrize("training", [1, None, "yes"])
def test_training_is_a_bool(training: object) -> None:
    words = f"argument 'training' .*must be bool, not {type(training).__name__}"
    for function in (F.batch_norm, bn_ext.batch_norm):
        with pytest.raises(TypeError, match=words):
            function(X, vector(), vector(), training=training)


def test_a_type_error_of_somebody_else_is_not_ours() -> None:
    def refuse(_: torch.Tensor) -> None:
        raise TypeError("from a hook")

    hooks = torch.autograd.graph.saved_tensors_hooks(refuse, lambda packed: packed)
    with hooks, pytest.raises(TypeError, match="from a hook"):
        bn_ext.BatchNorm2d(3)(X)


def test_inference_tensor_in_training(device: str) -> None:
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 4, device=device)
    module = bn_ext.BatchNorm2d(3, device=device)
    for norm in (nn.BatchNorm2d(3, device=device), module):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            norm(x)
    assert module.num_batches_tracked == 0
    assert torch.equal(module.running_mean.cpu(), torch.zeros(3))


def test_statistics_that_require_grad_are_fine_without_gradients() -> None:
    for mean in (vector().requires_grad_(), vector()):
        with torch.no_grad():
            y = bn_ext.batch_norm(X, mean, vector().requires_grad_())
            torch.testing.assert_close(y, F.batch_norm(X, mean, vector().requires_grad_()))


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
def test_a_failed_call_leaves_everything_as_it_was(device: str, name: str, momentum: float | None) -> None:
    module = bn_ext.BatchNorm2d(3, momentum=momentum, device=device)
    module(on(device, X))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    error = raised(module, on(device, BAD_FOR_A_MODULE[name]))
    stock = raised(nn.BatchNorm2d(3), BAD_FOR_A_MODULE[name])
    assert type(error) is type(stock)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


SAVED = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dy": X[:2]}, "grad_output must have the shape of input"),
        ({"dy": X.double()}, "grad_output must have the dtype and device of input"),
        (
            {"saved": torch.ones(4, 1)},
            r"saved must be the tensor that the forward .*, \(4, 3\) of Float on DEVICE, got \[4, 1\] of Float",
        ),
        ({"saved": SAVED.double()}, "saved must be the tensor that .* of Double"),
        ({"weight": vector(2)}, "weight should contain 3 elements not 2"),
        ({"residual": X[:2]}, "residual must have the shape of input"),
        ({"mask": torch.zeros(3, dtype=torch.uint8)}, "mask must be the tensor that the forward .* got 3 of Byte"),
        ({"mask": torch.zeros(10, dtype=torch.uint8)}, "mask requires the mask_format that the forward pass was"),
        *(
            (
                {"mask": torch.zeros(10, dtype=torch.uint8), "mask_format": wrong},
                "mask_format must be torch.contiguous_f",
            )
            for wrong in (torch.channels_last_3d, torch.preserve_format, 7)
        ),
        (
            {
                "mask": torch.zeros(10, dtype=torch.uint8),
                "mask_format": torch.contiguous_format,
                "activation": "silu",
            },
            "mask requires the activation relu, leaky_relu or relu6, got silu",
        ),
        ({"activation": "foo"}, "activation must be relu, .*, got foo"),
    ],
)
def test_inner_backward(device: str, changes: dict[str, Any], words: str) -> None:
    arguments = {"dy": X, "input": X, "weight": None, "saved": SAVED, "residual": None, "mask": None}
    arguments |= {
        "mask_format": None,
        "training": True,
        "activation": None,
        "activation_parameter": 0.0,
        "output_mask": [True, *[False] * 3],
    }
    arguments |= changes
    arguments |= zip(("dy", "input"), on(device, (arguments["dy"], arguments["input"])), strict=True)
    for name in ("weight", "saved", "residual", "mask"):
        arguments[name] = on(device, (arguments[name],))[0]
    with pytest.raises((RuntimeError, ValueError), match=words.replace("DEVICE", str(arguments["input"].device))):
        torch.ops.bn_ext.batch_norm_backward(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": X[:2]}, r"residual must have the shape of input \[.*\], got \[2, "),
        ({"residual": X[:, :, :1]}, "residual must have the shape of input"),
        ({"residual": X.bfloat16()}, r"residual must have the dtype of input \(Float\), got BFloat16"),
        (
            {"residual": torch.empty_like(X, device="meta")},
            "Expected all tensors to be on the same device, but input is on DEVICE and residual is on meta",
        ),
        ({"residual": 3}, "argument 'residual' must be Tensor, not int"),
        ({"activation": "foo"}, "activation must be None, one of relu, .* got 'foo'"),
        ({"activation": nn.Softmax(1)}, "activation must be .* got 'torch.nn.modules.activation.Softmax'"),
        ({"activation": ("relu", 1.0)}, "activation 'relu' takes no parameter, got 1.0"),
        ({"activation": 3}, "activation must be None, one of relu, .* got 3"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_activation_and_residual(device: str, changes: dict[str, Any], words: str, training: bool) -> None:
    """One sentence, and nothing has changed."""
    module = bn_ext.BatchNorm2d(3, device=device).train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    (x,) = on(device, (X,))
    arguments = dict(zip(changes, on(device, tuple(changes.values())), strict=True))
    with pytest.raises((RuntimeError, ValueError, TypeError), match=words.replace("DEVICE", str(x.device))):
        module(x, **arguments)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", [torch.channels_last_3d, torch.preserve_format, 7])
def test_inner_forward_with_a_mask(device: str, wrong: Any, training: bool) -> None:
    """Nothing has been updated then."""
    x, mean, var, count = on(device, (X, vector(), vector(), torch.tensor(3)))
    before = [t.clone() for t in (mean, var, count)]
    ops, rest = torch.ops.bn_ext, (1e-5, "relu", 0.0, wrong)
    forward, *between = (ops.batch_norm_forward, count, x, 0.1) if training else (ops.batch_norm_inference, x)
    with pytest.raises(RuntimeError, match=r"mask_format must be torch\.contiguous_format"):
        forward(x, None, None, mean, var, *between, *rest)
    torch.testing.assert_close([mean, var, count], before)
