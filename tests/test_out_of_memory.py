"""Memory that runs out in the middle of a training step: torch's error, nothing changed, and the same call works later.

Memory is made to run out at each allocation in turn: a mode that sees the operators which the inner operators call
takes away what a chosen one of them has allocated. What a GPU says itself, test_cuda_faults.py tests.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import devices
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bn_ext


class OneFails(TorchDispatchMode):
    """Of the allocations of bn_ext's inner operators, lets the one of this number fail, counted from zero."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number
        self.failed = False
        self._is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; then its result may turn out to have had no memory."""
        kwargs = kwargs or {}
        if func.namespace == "bn_ext":
            return self._run_inside(func, args, kwargs)
        result = func(*args, **kwargs)
        if not self._is_inside or not isinstance(result, Tensor) or result.data_ptr() in addresses(args):
            return result
        self.left -= 1
        if self.left == -1:
            self.failed = True
            raise torch.OutOfMemoryError("out of memory, as the test has it")
        return result

    def _run_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = torch._C.DispatchKey.CUDA if devices.current() == "cuda" else torch._C.DispatchKey.CPU
        self._is_inside = True
        try:
            with self:  # torch takes the mode away while it handles an operator
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self._is_inside = False


def addresses(values: Any) -> list[int]:
    """Of the tensors among them."""
    return [value.data_ptr() for value in values if isinstance(value, Tensor)]


def until_it_works(call: Callable[[], Any], check: Callable[[], None]) -> tuple[Any, int]:
    """What the call returns when all its allocations succeed, and how many there are; check() after each failure."""
    for number in range(100):
        with OneFails(number) as mode:
            try:
                result = call()
            except torch.OutOfMemoryError:
                assert mode.failed
                check()
                continue
        assert not mode.failed
        return result, number
    raise AssertionError("it never works")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A call in training, and how many allocations its passes have at least."""

    forward: int = 3  # y, saved, mask
    backward: int = 4  # dx, dweight, dbias, dresidual, the last of no elements if it is not wanted
    activation: str | None = None
    has_residual: bool = False
    momentum: float | None = 0.1
    count: torch.dtype | str = torch.int64
    strided: tuple[str, ...] = ()
    """Of what is not contiguous, and copied."""


KINDS = {
    "plain": Kind(),
    "mean over all batches": Kind(momentum=None),
    "relu": Kind(activation="relu"),
    "residual and relu: a mask": Kind(activation="relu", has_residual=True),
    "residual and silu": Kind(activation="silu", has_residual=True),
    "strided tensors": Kind(7, 5, "relu", True, strided=("x", "residual", "running_mean", "running_var", "dy")),
    "a count of int32": Kind(4, count=torch.int32),
    "a count on the cpu": Kind(3, count="cpu"),
    "a mean by a count of int32": Kind(4, momentum=None, count=torch.int32),
}


@dataclasses.dataclass
class Call:
    """Arguments, and the tensors that a call changes."""

    kind: Kind
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    norm: nn.Module

    @classmethod
    def make(cls, kind: Kind, device: str, memory_format: torch.memory_format) -> "Call":
        def values(name: str) -> Tensor:
            tensor = torch.randn(6, 8, 5, 5, device=device).contiguous(memory_format=memory_format)
            return tensor.repeat_interleave(2, 3)[..., ::2] if name in kind.strided else tensor

        norm = bn_ext.BatchNorm2d(8, momentum=kind.momentum, device=device)
        norm.num_batches_tracked = norm.num_batches_tracked.fill_(7).to(kind.count)
        for name in {"running_mean", "running_var"} & set(kind.strided):
            setattr(norm, name, getattr(norm, name).repeat_interleave(2)[::2])
        residual = values("residual").requires_grad_() if kind.has_residual else None
        return cls(kind, values("x").requires_grad_(), residual, values("dy"), norm)

    def forward(self) -> Tensor:
        """As the module does it, with an activation and a residual."""
        norm, kind = self.norm, self.kind
        vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return bn_ext.batch_norm(
            self.x,
            *vectors,
            training=True,
            momentum=kind.momentum,
            num_batches_tracked=norm.num_batches_tracked,
            activation=kind.activation,
            residual=self.residual,
        )

    def buffers(self) -> list[Tensor]:
        """Copies of the statistics and the count."""
        return [buffer.clone() for buffer in self.norm.buffers()]

    def leaves(self) -> list[Tensor]:
        """What gets gradients."""
        leaves = [self.x, self.norm.weight, self.norm.bias, self.residual]
        return [leaf for leaf in leaves if leaf is not None]

    def gradients(self) -> list[Tensor | None]:
        """Of the leaves, as they have been accumulated."""
        return [leaf.grad for leaf in self.leaves()]


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    """Of x, residual and dy."""
    return request.param


@pytest.mark.parametrize("name", KINDS)
def test_forward(device: str, memory_format: torch.memory_format, name: str) -> None:
    """Statistics and count are as before, and advance once when there is memory again."""
    call = Call.make(KINDS[name], device, memory_format)
    twin = copy.deepcopy(call)
    before = call.buffers()

    def check() -> None:
        assert all(torch.equal(a, b) for a, b in zip(call.buffers(), before, strict=True))

    y, allocations = until_it_works(call.forward, check)
    assert allocations >= KINDS[name].forward
    assert torch.equal(y, twin.forward())
    assert all(torch.equal(a, b) for a, b in zip(call.buffers(), twin.buffers(), strict=True))
    assert call.norm.num_batches_tracked.item() == 8


@pytest.mark.parametrize("name", KINDS)
def test_backward(device: str, memory_format: torch.memory_format, name: str) -> None:
    """No gradient is accumulated in part, and the same graph gives them when there is memory again."""
    call = Call.make(KINDS[name], device, memory_format)
    twin = copy.deepcopy(call)
    for leaf in call.leaves() + twin.leaves():
        leaf.grad = torch.ones_like(leaf)
    y, after_forward = call.forward(), call.buffers()

    def check() -> None:
        assert all(grad is not None and bool((grad == 1).all()) for grad in call.gradients())
        assert all(torch.equal(a, b) for a, b in zip(call.buffers(), after_forward, strict=True))

    _, allocations = until_it_works(lambda: y.backward(call.dy), check)
    assert allocations >= KINDS[name].backward
    twin.forward().backward(twin.dy)
    assert all(torch.equal(a, b) for a, b in zip(call.gradients(), twin.gradients(), strict=True))


def test_in_a_model(device: str) -> None:
    """Each layer has counted the batch and updated its statistics, or neither; the step can be done again."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), bn_ext.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), bn_ext.BatchNorm2d(8)
    ).to(device)
    x, dy = torch.randn(4, 3, 9, 9, device=device), torch.randn(4, 8, 5, 5, device=device)

    def step(module: nn.Module) -> None:
        module.zero_grad()
        module(x).backward(dy)

    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    step(twin)

    def check() -> None:
        after, state = twin.state_dict(), model.state_dict()
        for layer in ("1", "4"):
            names = [f"{layer}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
            assert any(all(torch.equal(state[n], of[n]) for n in names) for of in (before, after))
        model.load_state_dict(before)

    _, allocations = until_it_works(lambda: step(model), check)
    assert allocations >= 2 * 3 + 2 * 4
    for (name, actual), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)
    for actual, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)
