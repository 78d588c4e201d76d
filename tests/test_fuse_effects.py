"""bn_ext.fuse: forwards with contexts or effects are left alone, and the attempt has no effect."""

import contextlib
import cProfile
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fusing import Small, seen_of, x_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bn_ext

FEATURES: list[Any] = []
BY_NAME: dict[str, Any] = {}
HOLDER = SimpleNamespace(last=None)
COUNT = 0
NUMBERS = iter(range(100))
LOG = logging.getLogger(__name__)


class Own:
    """A user's context manager."""

    def __enter__(self) -> None:
        FEATURES.append(1)

    def __exit__(self, *_: object) -> None:
        FEATURES.pop()


def within(make: Callable[[], Any]) -> Callable[..., Any]:
    def body(self: Small, x: Tensor) -> Tensor:
        with make():
            return self.act(self.bn(x))

    return body


def before(effect: Callable[[Any], Any]) -> Callable[..., Any]:
    def body(self: Small, x: Tensor) -> Tensor:
        effect(x)
        return self.act(self.bn(x))

    return body


def entered_by_hand(self: Small, x: Tensor) -> Tensor:
    context = Own()
    context.__enter__()
    y = self.act(self.bn(x))
    context.__exit__()
    return y


def entered_by_a_stack(self: Small, x: Tensor) -> Tensor:
    stack = contextlib.ExitStack()
    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
    y = self.act(self.bn(x))
    stack.close()
    return y


def set_and_reset(name: str, value: Any, reset: Any) -> Callable[..., Any]:
    def body(self: Small, x: Tensor) -> Tensor:
        getattr(torch, name)(value)
        y = self.act(self.bn(x))
        getattr(torch, name)(reset)
        return y

    return body


def counted(self: Small, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return self.act(self.bn(x))


def class_attribute(self: Small, x: Tensor) -> Tensor:
    Small.last = 1
    return self.act(self.bn(x))


def imported(self: Small, x: Tensor) -> Tensor:
    import json

    return self.act(self.bn(x)) * len(json.dumps([]))


CONTEXT = "forward() enters a context, or reads or sets a mode"
EFFECTS: dict[str, tuple[Callable[..., Any], str]] = {
    "mkldnn flags": (within(lambda: torch.backends.mkldnn.flags(enabled=False)), CONTEXT),
    "cudnn flags": (within(lambda: torch.backends.cudnn.flags(enabled=False)), CONTEXT),
    "sdpa kernel": (within(lambda: sdpa_kernel(SDPBackend.MATH)), CONTEXT),
    "the user's context manager": (within(Own), CONTEXT),
    "record_function": (within(lambda: torch.profiler.record_function("block")), CONTEXT),
    "entered by hand": (entered_by_hand, CONTEXT),
    "entered by a stack": (entered_by_a_stack, "forward() calls __init__ of contextlib"),
    "a decorated forward": (
        sdpa_kernel(SDPBackend.MATH)(lambda self, x: self.act(self.bn(x))),
        "forward() reads body, whose state cannot be compared (generator)",
    ),
    "matmul precision": (set_and_reset("set_float32_matmul_precision", "high", "highest"), CONTEXT),
    "deterministic algorithms": (set_and_reset("use_deterministic_algorithms", True, False), CONTEXT),
    "a warning": (before(lambda x: warnings.warn("seen", stacklevel=1)), "forward() calls warn"),
    "a log": (before(lambda x: LOG.warning("seen")), "forward() calls warning of logging"),
    "a print": (before(lambda x: print("seen")), "forward() calls print"),
    "a file": (before(lambda x: open("seen", "w").close()), "forward() calls open"),
    "the time": (before(lambda x: time.time()), "forward() calls time"),
    "the environment": (before(lambda x: os.getenv("HOME")), "forward() calls getenv of os"),
    "a query of a device": (
        before(lambda x: torch.cuda.is_available()),
        CONTEXT,
    ),
    "a process group": (
        before(lambda x: torch.distributed.is_initialized()),
        CONTEXT,
    ),
    "values of a tensor": (
        lambda self, x: self.act(self.bn(x)) * self.sizes.tolist()[0],
        "forward() calls tolist() of a tensor that is not traced",
    ),
    "a list elsewhere": (before(lambda x: FEATURES.append(x)), "forward() sets FEATURES"),
    "a dict elsewhere": (before(lambda x: BY_NAME.update(x=x)), "forward() sets BY_NAME"),
    "an object elsewhere": (before(lambda x: setattr(HOLDER, "last", 1)), "forward() sets HOLDER"),
    "an iterator": (before(lambda x: next(NUMBERS)), "forward() reads NUMBERS, whose state cannot be compared"),
    "a global": (counted, "forward() sets COUNT"),
    "an attribute of a class": (class_attribute, "forward() sets last"),
    "an import": (imported, "forward() imports json"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_forward_with_effects_is_left_alone(
    name: str, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    body, reason = EFFECTS[name]
    settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    caplog.clear()
    model = Small(body)
    model.sizes = torch.ones(2)
    model, report = bn_ext.fuse(model, report=True)
    assert [row.reason[: len(reason)] for row in report.rows] == [reason]
    assert type(model) is Small
    assert FEATURES == []
    assert (BY_NAME, HOLDER.last, COUNT, hasattr(Small, "last")) == ({}, None, 0, False)
    assert (capsys.readouterr().out, [str(w.message) for w in recwarn], caplog.messages) == ("", [], [])
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == settings
    assert not os.path.exists("seen")


def test_an_iterator_is_not_advanced() -> None:
    bn_ext.fuse(Small(EFFECTS["an iterator"][0]))
    assert next(NUMBERS) == 0


def closure_that_counts() -> Callable[..., Any]:
    count = 0

    def body(self: Small, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return self.act(self.bn(x)) * count

    return body


def test_a_counter_in_a_closure_counts_the_calls_of_forward_only() -> None:
    body = closure_that_counts()
    model, report = bn_ext.fuse(Small(body), report=True)
    assert report.rows[0].reason == "forward() sets body"
    assert body.__closure__ is not None
    assert body.__closure__[0].cell_contents == 0
    assert seen_of(model, x_of(dtype=torch.float32)) == [(None, False)]
    assert body.__closure__[0].cell_contents == 1


def test_lists_of_forward_itself_are_no_effect() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        outputs, names = [], {}
        for number in range(2):
            outputs.append(x * number)
            names[number] = outputs[-1]
        return self.act(self.bn(sum(outputs[1:], outputs[0]) + names[1]))

    model = bn_ext.fuse(Small(body))
    assert seen_of(model, x_of(dtype=torch.float32)) == [("relu", False)]


@dataclass
class Slotted:
    """A counter without a dictionary."""

    __slots__ = ("count",)
    count: int


ON_STATE: dict[str, Callable[[Any, Any], Any]] = {
    "an object with slots": lambda self, x: setattr(self.counter, "count", self.counter.count + 1),
    "a NumPy array": lambda self, x: self.array.__setitem__(0, self.array[0] + 1),
    "an attribute of a function": lambda self, x: setattr(closure_that_counts, "calls", 1),
    "requires_grad of a parameter": lambda self, x: [setattr(p, "requires_grad", False) for p in self.parameters()],
    "requires_grad_() of a parameter": lambda self, x: self.bn.weight.requires_grad_(False),
    "requires_grad_() of a module": lambda self, x: self.bn.requires_grad_(False),
    "zero_grad()": lambda self, x: self.zero_grad(),
    "a hook on a parameter": lambda self, x: next(self.parameters()).register_hook(lambda g: g * 2),
    "anomaly detection": lambda self, x: torch.autograd.set_detect_anomaly(True),
    "threads": lambda self, x: torch.set_num_threads(torch.get_num_threads() + 1),
    "autocast": lambda self, x: torch.set_autocast_enabled("cpu", True),
}


@pytest.mark.parametrize("name", ON_STATE)
def test_a_forward_that_changes_state_is_left_alone_and_the_state_too(name: str) -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        ON_STATE[name](self, x)
        return self.act(self.bn(x))

    model = Small(body)
    model.counter, model.array = Slotted(0), np.zeros(2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    settings = torch.is_anomaly_enabled(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")
    _, report = bn_ext.fuse(model, report=True)
    assert report.rows[0].reason
    assert (torch.is_anomaly_enabled(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")) == settings
    assert (model.counter.count, model.array.tolist(), vars(closure_that_counts)) == (0, [0.0, 0.0], {})
    assert all(
        p.requires_grad and torch.equal(p.grad, torch.ones(3)) and not p._backward_hooks for p in model.parameters()
    )


class Rejecting(Small):
    """Takes no attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("is_frozen"):
            raise RuntimeError(f"{name} is frozen")
        super().__setattr__(name, value)


def test_training_flags_are_put_back_whatever_modules_reject() -> None:
    model = nn.Sequential(Small(), Rejecting(), Small()).eval()
    vars(model[1])["is_frozen"] = True
    bn_ext.fuse(model)
    assert not any(module.training for module in model.modules())
    assert seen_of(model, x_of(dtype=torch.float32)) == [("relu", False)] * 3


def test_a_profiler_of_python_goes_on() -> None:
    profiler, before = cProfile.Profile(), dict(vars(nn.Module))
    with profiler:
        model = bn_ext.fuse(Small())
        time.monotonic()
    assert any("monotonic" in str(entry.code) for entry in profiler.getstats())
    assert dict(vars(nn.Module)) == before
    assert sys.getprofile() is None
    assert seen_of(model, x_of(dtype=torch.float32)) == [("relu", False)]


def test_a_profiler_that_cannot_go_on_is_left_alone() -> None:
    with torch.profiler.profile(with_stack=True):
        before = sys.getprofile()
        _, report = bn_ext.fuse(Small(), report=True)
        assert sys.getprofile() is before
    assert [row.reason for row in report.rows] == [
        "it cannot be traced while a profiler is active (TraceContext)" if before is not None else ""
    ]
    assert "__getattribute__" not in vars(nn.Module)
