"""torch.compile in a training loop, with checkpoints, compiled autograd and freezing: for both libraries, as eager."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.compiling import LIBRARIES, activated
from helpers.derivatives import leaf, loss, normal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("device", "fresh_compiler")


def networks(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, nn.Sequential]:
    """Convolution, batch norm with relu and residual, convolution, batch norm: the same of both libraries."""
    made = {library: nn.Sequential() for library in LIBRARIES}
    for activation, has_residual in (("relu", True), (None, False)):
        conv = nn.Conv2d(3, 3, 3, padding=1, dtype=dtype, device=device)
        for library, norm in activated(activation, has_residual, dtype=dtype, **options).items():
            made[library] += nn.Sequential(copy.deepcopy(conv), norm)
    return made


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dynamic", [False, True])
def test_training_compiles_once(device: str, dynamic: bool, momentum: float | None) -> None:
    """With data that change and an optimizer, for some epochs with an evaluation in between: once for each mode."""
    counter, counts = CompileCounterWithBackend("aot_eager"), []

    def train(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        optimizer, results = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
        torch.manual_seed(1)
        for epoch in range(3):
            model.train()
            for n in (4, 6, 3) if dynamic else (4, 4, 4):
                optimizer.zero_grad()
                value = loss(run(normal(n, 3, 5, 6) + epoch))
                value.backward()
                optimizer.step()
                results.append(value.detach())
                counts.append(counter.frame_count)
            model.eval()
            results.append(run(normal(4, 3, 5, 6)).detach())
            counts.append(counter.frame_count)
        return [*results, *model.state_dict().values()]

    both = networks(device, momentum=momentum)
    ours = both["bn_ext"]
    actual = train(ours, torch.compile(ours, backend=counter, fullgraph=True, dynamic=dynamic))
    # With symbolic sizes torch compiles a module that has numbers, as eps, twice at the first call, torch.nn's too.
    first = 2 if dynamic else 1
    assert counts == [first] * 3 + [first + 1] * 9
    torch.testing.assert_close(actual, train(both["torch.nn"], both["torch.nn"]))


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


ORDERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "compiled in checkpoint": lambda model: lambda x: checkpoint(compiled(model), x, use_reentrant=False),
    "compiled in reentrant checkpoint": lambda model: lambda x: checkpoint(compiled(model), x, use_reentrant=True),
    "checkpoint in compiled": lambda model: compiled(lambda x: checkpoint(model, x, use_reentrant=False)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", ORDERS)
def test_checkpoints(device: str, order: str, layout: str, training: bool) -> None:
    """Gradients as without checkpoints; batches are counted as torch.nn's are, which a checkpoint counts twice."""
    both = networks(device)
    eager = copy.deepcopy(both["torch.nn"]).train(training)
    x = normal(4, 3, 5, 6, layout=layout)

    def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Any]:
        leaf_of_x = leaf(x)
        y = run(leaf_of_x)
        loss(y).backward()
        return [y.detach(), leaf_of_x.grad, *(parameter.grad for parameter in model.parameters())]

    expected = gradients(eager, eager)
    for model in both.values():
        torch.testing.assert_close(gradients(model, ORDERS[order](model.train(training))), expected)
    ours, stock = both["bn_ext"].state_dict(), both["torch.nn"].state_dict()
    torch.testing.assert_close(ours, stock)
    recomputed = 1 if order == "checkpoint in compiled" else 2
    assert ours["1.norm.num_batches_tracked"].item() == recomputed * training


@pytest.mark.parametrize("library", LIBRARIES)
def test_compiled_autograd_of_a_compiled_step(device: str, library: str) -> None:
    both = networks(device)
    model, eager, x = both[library], copy.deepcopy(both["torch.nn"]), normal(4, 3, 5, 6)

    def train(x: Tensor) -> Tensor:
        value = loss(model(x))
        value.backward()
        return value.detach()

    with torch._dynamo.config.patch(compiled_autograd=True):
        value = torch.compile(train, backend="aot_eager")(x)
    expected = loss(eager(x))
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    for actual, parameter in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, parameter.grad)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("library", ["bn_ext", "torch.nn"])
def test_compiled_autograd_of_an_eager_forward(device: str, library: str, training: bool) -> None:
    both = networks(device)
    model, eager = both[library].train(training), copy.deepcopy(both["torch.nn"]).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    for _ in range(3):
        x = normal(4, 3, 5, 6)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter)):
            loss(model(x)).backward()
        loss(eager(x)).backward()
    for actual, parameter in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, parameter.grad)
    assert counter.frame_count > 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_freezing(device: str, library: str) -> None:
    """Inductor may fold parameters then."""
    both = networks(device, torch.float32)
    model, eager = both[library].eval(), copy.deepcopy(both["torch.nn"]).eval()
    x = normal(4, 3, 5, 6, dtype=torch.float32)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        # The tolerance is that of a few float32 sums behind each other, in another order.
        torch.testing.assert_close(torch.compile(model)(x), eager(x), rtol=1e-4, atol=1e-4)
