"""bn_ext.fuse: questions whose answer a graph would hold for good are refused; the numbers stay stock's."""

import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import Small, fused_and_stock, seen_of, x_of
from torch import Tensor, nn


def length(y: Tensor) -> int:
    try:
        return len(y)
    except Exception:
        return 1


def size(y: Tensor) -> int:
    try:
        return int(y.shape[0])
    except Exception:
        return 1


def branch(y: Tensor) -> int:
    try:
        return 2 if y.sum() > -1e9 else 1
    except Exception:
        return 1


T = type
LAST = torch.zeros(())


QUESTIONS: dict[str, Callable[[Tensor], float]] = {
    "a string": lambda y: 2 if str(y.device) == "cpu" else 1,
    "a formatted string": lambda y: 2 if f"{y.dtype}" == "torch.float64" else 1,
    "a key": lambda y: {torch.float64: 2.0}.get(y.dtype, 1.0),
    "an element": lambda y: 2 if y.dtype in {torch.float64} else 1,
    "the type of an attribute": lambda y: 2 if isinstance(y.shape, tuple) else 1,
    "identity of an attribute": lambda y: 2 if y.dtype is torch.float64 else 1,
    "identity of a flag": lambda y: 2 if y.is_cuda is False else 1,
    "type()": lambda y: 2 if type(y) is Tensor else 1,
    "the name of the type": lambda y: len(type(y).__name__),
    "the type, by another name": lambda y: 2 if T(y) == Tensor else 1,
    "whether it is a parameter": lambda y: 2 if isinstance(y, nn.Parameter) else 1,
    "the gradient": lambda y: 2 if y.grad is None else 1,
    "the gradient's function": lambda y: 2 if y.detach().grad_fn is None else 1,
    "whether it is a view": lambda y: 2 if y._base is None else 1,
    "how often it was written to": lambda y: 1 + y._version,
    "its address": lambda y: 2 if id(y) == id(y.contiguous()) else 1,
    "identity by a function": lambda y: 2 if operator.is_(y, y.contiguous()) else 1,
    "whether it can be called": lambda y: 1 if callable(y) else 2,
    "whether it is a global": lambda y: 2 if LAST is y else 1,
    "whether it is traced": lambda y: 1 if isinstance(y, torch.fx.Proxy) else 2,
    "whether a trace goes on": lambda y: 1 if torch.fx._symbolic_trace.is_fx_tracing() else 2,
    "a torch function": lambda y: 1 if torch.overrides.has_torch_function((y,)) else 2,
    "the length, and the error is caught": length,
    "the size, and the error is caught": size,
    "a value, and the error is caught": branch,
    "anomaly detection": lambda y: 1 if torch.is_anomaly_enabled() else 2,
    "autocast": lambda y: 1 if torch.is_autocast_cpu_enabled() else 2,
    "cuDNN": lambda y: 1 if torch._C._get_cudnn_benchmark() else 2,
    "deterministic mode": lambda y: 1 if torch.get_deterministic_debug_mode() else 2,
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_refused(name: str) -> None:
    fused, stock, [told] = fused_and_stock(
        Small(lambda self, x: (y := F.relu(self.bn(x))) * QUESTIONS[name](y)).double()
    )
    assert told.startswith(("forward()", "torch.fx cannot trace it"))
    x = x_of()
    torch.testing.assert_close(fused(x), stock(x))


def test_identity_of_values_is_refused() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        y = F.relu(self.bn(x))
        z = self.act(y) if self.act.inplace else y.contiguous()
        return y if z is y else z + 1

    fused, stock, [told] = fused_and_stock(Small(body).double())
    assert told == "forward() tests whether two values are the same object"
    x = x_of()
    torch.testing.assert_close(fused(x), stock(x))


class Sometimes(nn.Module):
    """Returns None at some calls; torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, None if x.shape[0] else x


def caught(self: Small, x: Tensor) -> Tensor:
    y = self.act(self.bn(x))
    try:
        return self.linear(y)
    except RuntimeError:
        return y


def caught_at_last(self: Small, x: Tensor) -> Tensor:
    y = self.act(self.bn(x))
    try:
        return self.linear(y)
    except (KeyError, AttributeError):
        return x
    except:  # noqa: E722
        return y


def ended(self: Small, x: Tensor) -> Tensor:
    y = self.act(self.bn(x))
    try:
        y = self.linear(y)
    finally:
        return y  # noqa: B012


def compared_with_none(self: Small, x: Tensor) -> Tensor:
    y = self.act(self.bn(x))
    _, other = self.sometimes(x)
    return y if other is None else y + other


def given_and_compared(self: Small, x: Tensor) -> Tensor:
    def add(y: Tensor, other: Tensor | None = None) -> Tensor:
        return y + other if other is not None else y

    return add(self.act(self.bn(x)), self.sometimes(x)[1])


CATCHES = "forward() catches exceptions that an operation may raise in a later call"
NONE = "forward() tests for None, which a module or function that is not traced may return"
OF_MODELS: dict[str, tuple[Callable[..., Any], str]] = {
    "an error is caught": (caught, CATCHES),
    "any error is caught": (caught_at_last, CATCHES),
    "an error is dropped": (ended, CATCHES),
    "None": (compared_with_none, NONE),
    "None in a function": (given_and_compared, NONE),
    "a list of names": (lambda self, x: self.act(self.bn(x)) * len(dir(self)), "forward() calls dir()"),
    "a parameter": (
        lambda self, x: self.act(self.bn(x)) * (2 if isinstance(self.bn.weight, nn.Parameter) else 1),
        "forward() reads the type of a value",
    ),
    "its class": (
        lambda self, x: self.act(self.bn(x)) * (2 if type(self) == Small else 1),  # noqa: E721
        "forward() uses its own class",
    ),
    "what its class is made of": (
        lambda self, x: self.act(self.bn(x)) * len(type(self).__mro__),
        "forward() uses its own class",
    ),
    "its class, by an attribute": (
        lambda self, x: self.act(self.bn(x)) * {Small: 2}.get(self.__class__, 1),
        "forward() uses its own class",
    ),
    "identity of state": (
        lambda self, x: self.act(self.bn(x)) * (2 if self.last is x else 1),
        "forward() tests whether two values are the same object",
    ),
}


@pytest.mark.parametrize("name", OF_MODELS)
def test_questions_about_models_are_refused(name: str) -> None:
    body, reason = OF_MODELS[name]
    model = Small(body)
    model.linear, model.sometimes, model.last = nn.Linear(9, 9), Sometimes(), torch.zeros(())
    fused, stock, [told] = fused_and_stock(model.double())
    assert told.startswith(reason)
    x = x_of()
    fused.last = stock.last = x
    torch.testing.assert_close(fused(x), stock(x))
    torch.testing.assert_close(fused(x=x), stock(x=x))


def looked_up(self: Small, x: Tensor) -> Tensor:
    try:
        scale = self.scale
    except (AttributeError, KeyError):
        scale = 2
    return self.act(self.bn(x)) * scale


def optional(self: Small, x: Tensor, other: Tensor | None = None) -> Tensor:
    y = self.act(self.bn(x))
    last = getattr(self, "last", None)
    y = self.sometimes(y if other is None else y + other)[0]
    return y if last is None else self.last(y)


@pytest.mark.parametrize("body", [looked_up, optional])
def test_questions_that_guards_ask_again_are_fused(body: Callable[..., Any]) -> None:
    model = Small(body)
    model.sometimes = Sometimes()
    fused, stock, _ = fused_and_stock(model.double())
    x = x_of()
    assert seen_of(fused, x) == [("relu", False)]
    fused.scale = stock.scale = 3
    stock.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(x), stock(x))


def test_parts_are_as_many_as_unpacked() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        first, second = self.act(self.bn(x)).split(2)
        return first + second

    fused, stock, _ = fused_and_stock(Small(body).double())
    x = x_of()
    assert seen_of(fused, x) == [("relu", False)]
    stock.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(x), stock(x))
    for count, message in ((6, "too many values to unpack"), (1, "not enough values to unpack")):
        for model in (fused, stock):
            with pytest.raises(ValueError, match=message):
                model(x_of(count, 3, 5, 6))


class Called(nn.Module):
    """Its class does something around forward()."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_module_with_a_call_of_its_own_is_called_once() -> None:
    model = Small(lambda self, x: self.child(F.relu(self.bn(x))))
    model.child = Called()
    fused, stock, [told] = fused_and_stock(model.double())
    assert told == "forward() calls a Called, whose class defines its own __call__"
    x = x_of()
    torch.testing.assert_close(fused(x), stock(x))


class Unseen(Small):
    """Reads past what is recorded."""

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)


def test_reads_past_the_record_are_refused() -> None:
    for model in (Unseen(), Small(lambda self, x: self.act(self.bn(x)) * object.__getattribute__(self, "training"))):
        _, _, [told] = fused_and_stock(model.double())
        assert "__getattribute__" in told


def test_threads_fuse_at_the_same_time() -> None:
    calls = vars(nn.Module)["__call__"], vars(nn.Module)["__getattr__"]
    models = [Small() for _ in range(8)]
    threads = [threading.Thread(target=fused_and_stock, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (vars(nn.Module)["__call__"], vars(nn.Module)["__getattr__"]) == calls
    assert all(seen_of(model, x_of(dtype=torch.float32)) == [("relu", False)] for model in models)
