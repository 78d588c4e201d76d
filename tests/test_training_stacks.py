"""What a training loop puts around a model: optimizers, scaling, autocast, checkpoints, averages, modes, hooks."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import devices
from helpers.libraries import Net, both, images, norm, norms, state, step, steps
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

pytestmark = pytest.mark.usefixtures("device")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 5)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str) -> None:
    def run(library: str) -> Any:
        model = Net(library)
        stepper = OPTIMIZERS[optimizer](model.parameters())
        for i in range(4):
            stepper.zero_grad()
            loss_of(model, images(4 + i)).backward()
            stepper.step()
        return state(model)

    both(run, rtol=1e-6, atol=1e-6)  # Adam divides by gradients


def test_accumulated_and_clipped_gradients() -> None:
    def run(library: str) -> Any:
        model, lengths = Net(library), []
        stepper = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            for count in (4, 5, 6):
                (loss_of(model, images(count)) / 3).backward()
            lengths.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=True))
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            stepper.step()
            stepper.zero_grad()
        return state(model), lengths

    both(run)


def test_scaler_skips_a_step_of_infinite_gradients() -> None:
    """Parameters stay, running statistics have moved on."""

    def run(library: str) -> Any:
        model, scales = Net(library, torch.float32), []
        stepper = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler(devices.current(), init_scale=1024.0, growth_interval=2)
        for i in range(5):
            stepper.zero_grad()
            value = loss_of(model, images(4, torch.float32)) * (float("inf") if i == 2 else 1)
            scaler.scale(value).backward()
            scaler.unscale_(stepper)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = model.norm1.weight.detach().clone()
            scaler.step(stepper)
            scaler.update()
            assert torch.equal(before, model.norm1.weight) == (i == 2)
            scales.append(scaler.get_scale())
        assert model.norm1.num_batches_tracked == 5
        return state(model), scales

    _, scales = both(run, rtol=1e-4, atol=1e-5)  # float32, five steps
    assert scales == [1024, 2048, 1024, 1024, 2048]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Memory that nobody wrote to is filled with NaN, too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "deterministic": deterministic,
    "detect_anomaly": torch.autograd.detect_anomaly,
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "flop_counter": lambda: FlopCounterMode(display=False),
    "module_tracker": ModuleTracker,
    "function_mode": BaseTorchFunctionMode,
    "default_device": lambda: torch.device(devices.current()),
    "one_thread_backward": lambda: torch.autograd.set_multithreading_enabled(False),
    "profiler": lambda: torch.profiler.profile(record_shapes=True),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_contexts_around_a_step(name: str) -> None:
    def run(library: str) -> Any:
        model = Net(library)
        x = images()
        with CONTEXTS[name]() as context:
            results = step(model, x)
        counted = context.get_total_flops() if name == "flop_counter" else 0
        return results, counted

    both(run)


def test_profiler_names_the_operators() -> None:
    model = Net("bn_ext")
    with torch.profiler.profile() as profile:
        step(model, images())
    names = {event.key for event in profile.key_averages()}
    assert {"bn_ext::batch_norm_forward", "bn_ext::batch_norm_backward"} <= names


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    """The statistics of what is computed twice are updated twice, as torch.nn's."""

    def run(library: str) -> Any:
        model, x = Net(library), images().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        layers = nn.Sequential(model.conv1, model.norm1, model.conv2, model.norm2, model.norm3, model.norm4)
        checkpoint_sequential(layers, 3, x, use_reentrant=reentrant).pow(3).sum().backward()
        assert model.norm1.num_batches_tracked == 4
        return x.grad, gradients(model), state(model)

    both(run)


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_model_and_update_bn(average: str, use_buffers: bool) -> None:
    def run(library: str) -> Any:
        model = Net(library)
        averaged = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[average])
        stepper = torch.optim.SGD(model.parameters(), 0.1)
        for i in range(3):
            stepper.zero_grad()
            loss_of(model, images(4 + i)).backward()
            stepper.step()
            averaged.update_parameters(model)
        before = state(averaged)
        averaged.eval()
        update_bn([images(5), [images(6)], (images(7), "label")], averaged)
        assert [module.momentum for module in norms(averaged)] == [0.1, None, 0.1, 0.1]
        assert not averaged.module.norm1.training
        assert averaged.module.norm1.num_batches_tracked == 3
        return before, state(averaged), averaged(images(9))

    both(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_of_one_module(training: bool, given: torch.dtype, dtype: torch.dtype) -> None:
    """Batch norm keeps its input's dtype; within a region where autocast is off, too."""

    def run(library: str) -> Any:
        module = norm(library, dtype=torch.float32).train(training)
        x = images(8, given)
        with torch.autocast(devices.current(), dtype):
            results = [step(module, x)]
            with torch.autocast(devices.current(), enabled=False):
                results.append(step(module, x.float()))
        assert [r[0].dtype for r in results] == [given, torch.float32]
        return results

    eps = torch.finfo(given).eps
    both(run, rtol=4 * eps if given != torch.float32 else 1e-4, atol=8 * eps if given != torch.float32 else 1e-5)


def test_autocast_of_a_model() -> None:
    """Half-precision convolutions between batch norms with activation and residual; parameters are float32."""

    def run(library: str) -> Any:
        model = Net(library, torch.float32)
        with torch.autocast(devices.current(), torch.bfloat16):
            y = model.features(images(8, torch.float32))
        assert y.dtype == torch.bfloat16
        y.float().pow(3).mean().backward()
        assert model.norm1.weight.grad.dtype == torch.float32
        return y.float(), state(model)

    # Roundings to bfloat16 of values of a few units, of which torch's separate operators make more.
    both(run, rtol=0.03, atol=0.06)


def test_frozen_batch_norms_in_a_model_that_trains() -> None:
    def run(library: str) -> Any:
        model = Net(library).train()
        for module in norms(model):
            module.eval().requires_grad_(False)
        before = state(model.norm1)
        stepper = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for i in range(3):
            stepper.zero_grad()
            loss_of(model, images(4 + i)).backward()
            stepper.step()
        torch.testing.assert_close(state(model.norm1), before, rtol=0, atol=0)
        return state(model), gradients(model)

    both(run)


def test_weights_and_modules_that_are_shared() -> None:
    def run(library: str) -> Any:
        model = Net(library)
        model.norm3.weight = model.norm1.weight
        model.norm4 = model.norm1
        return step(model, images())

    both(run)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_statistics_are_learnt_without_gradients(context: Callable[[], Any]) -> None:
    """And a training step or an evaluation comes after that, or before."""

    def run(library: str) -> Any:
        model, x = Net(library), images()
        with context():
            y = model(x).clone()
        results = [y, state(model), step(model, x)]
        model.eval()
        with context():
            return [*results, model(x).clone()]

    both(run)


def test_hooks_of_all_modules() -> None:
    def run(library: str) -> Any:
        model, seen = Net(library), []
        is_norm = nn.modules.batchnorm._BatchNorm

        def look(module: nn.Module, *values: Any) -> None:
            if isinstance(module, is_norm):
                seen.extend(t.detach() for value in values for t in value if t is not None)

        handles = [
            register_module_forward_pre_hook(look),
            register_module_forward_hook(lambda m, inputs, y: y * 2 if isinstance(m, is_norm) else None),
            register_module_full_backward_hook(look),
        ]
        try:
            return step(model, images()), seen
        finally:
            for handle in handles:
                handle.remove()

    both(run)


def test_channels_last_model() -> None:
    def run(library: str) -> Any:
        model = Net(library).to(memory_format=torch.channels_last)
        y = model.features(images().contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        return y, grad(y.pow(3).sum(), list(model.conv1.parameters())), state(model)

    both(run)


def test_model_moved_between_dtypes() -> None:
    def run(library: str) -> Any:
        model = Net(library)
        return [
            [t.float() for t in (y, *gradients)]
            for cast, dtype in ((model.float, torch.float32), (model.double, torch.float64))
            for y, *gradients, _ in steps(cast(), images(4, dtype))
        ]

    both(run, rtol=1e-3, atol=1e-3)
