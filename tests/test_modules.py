"""The modules' surface: everything a model sees of torch.nn.BatchNorm is there and behaves the same."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from torch import nn

import bn_ext

PAIRS = [
    (nn.BatchNorm1d, bn_ext.BatchNorm1d, (6, 4)),
    (nn.BatchNorm1d, bn_ext.BatchNorm1d, (6, 4, 9)),
    (nn.BatchNorm2d, bn_ext.BatchNorm2d, (6, 4, 5, 3)),
    (nn.BatchNorm3d, bn_ext.BatchNorm3d, (6, 4, 5, 3, 2)),
]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"momentum": -0.001},  # more would take a running variance to near 0, where roundings are large
    {"momentum": 2},
    {"affine": False},
    {"track_running_stats": False},
    {"track_running_stats": False, "momentum": None},
    {"affine": False, "track_running_stats": False},
    {"eps": 0.1},
    *([{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm2d).parameters else []),
]


def assert_same_state(ours: nn.Module, stock: nn.Module) -> None:
    """Parameters, buffers, their names and dtypes."""
    mine, theirs = ours.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype
        torch.testing.assert_close(mine[name].cpu(), value.cpu(), msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize(("stock_class", "our_class", "shape"), PAIRS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_and_evaluation_as_stock(
    device: str, stock_class: type, our_class: type, shape: tuple[int, ...], options: dict
) -> None:
    stock = stock_class(4, **options, device=device)
    ours = our_class(4, **options, device=device)
    assert isinstance(ours, stock_class)
    assert repr(ours) == repr(stock)
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    for step in range(6):
        stock.train(step not in (2, 5)), ours.train(step not in (2, 5))
        x = torch.randn(shape, device=device) * (step + 1) + step
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        y1, y2 = stock(x1), ours(x2)
        torch.testing.assert_close(y2, y1)
        dy = torch.randn_like(y1)
        y1.backward(dy), y2.backward(dy)
        torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        assert_same_state(ours, stock)


def test_constructor_is_that_of_the_torch_in_use() -> None:
    for stock, ours, _ in PAIRS:
        *theirs, activation, skip_nonfinite, skip_recomputed = inspect.signature(ours).parameters.values()
        assert theirs == list(inspect.signature(stock).parameters.values())
        assert [activation.name, activation.default] == ["activation", None]
        assert [skip_nonfinite.name, skip_nonfinite.default] == ["skip_nonfinite", False]
        assert [skip_recomputed.name, skip_recomputed.default] == ["skip_recomputed", False]
        with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
            ours(4, foo=1)
        assert inspect.getfullargspec(ours.__init__).args == inspect.getfullargspec(stock.__init__).args


def test_signature_of_a_subclass_is_its_own() -> None:
    class Scaled(bn_ext.BatchNorm2d):
        def __init__(self, scale: float) -> None:
            super().__init__(4, eps=scale, activation="relu")

    assert list(inspect.signature(Scaled).parameters) == ["scale"]
    assert vars(Scaled(0.5))["eps"] == 0.5
    assert Scaled(0.5).activation == ("relu", 0.0)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_track_running_stats_flipped_later(device: str, flag: bool, training: bool) -> None:
    options = {"track_running_stats": not flag, "device": device}
    stock, ours = (module(4, **options) for module in (nn.BatchNorm2d, bn_ext.BatchNorm2d))
    for module in (stock, ours):
        module.track_running_stats = flag
        module.train(training)
    x = torch.randn(3, 4, 5, 5, device=device) + 1
    torch.testing.assert_close(ours(x), stock(x))
    assert_same_state(ours, stock)


def test_statistics_removed_later(device: str) -> None:
    """Without num_batches_tracked, momentum=None leaves the statistics as they are, as in torch."""
    stock, ours = (module(4, momentum=None, device=device) for module in (nn.BatchNorm2d, bn_ext.BatchNorm2d))
    for module in (stock, ours):
        module.num_batches_tracked = None
    x = torch.randn(3, 4, 5, 5, device=device) + 1
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours.running_mean.cpu(), torch.zeros(4))
    for module in (stock, ours):
        module.running_mean = module.running_var = None
        module.eval()
    torch.testing.assert_close(ours(x), stock(x))


def test_num_batches_tracked_stays_the_same_int64_tensor(device: str) -> None:
    ours = bn_ext.BatchNorm2d(4, device=device).half()
    tracked = ours.num_batches_tracked
    version = tracked._version
    for _ in range(3):
        ours(torch.randn(2, 4, 3, 3, device=device).half())
    assert ours.num_batches_tracked is tracked
    assert tracked.dtype == torch.int64
    assert tracked.item() == 3
    assert tracked._version == version + 3


@pytest.mark.parametrize("count", [torch.tensor(2.0), torch.tensor([2]), torch.tensor(2, dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_count_of_another_kind(device: str, count: torch.Tensor, momentum: float | None) -> None:
    """Averaging code replaces buffers; torch counts in whatever it finds."""
    stock, ours = (module(4, momentum=momentum, device=device) for module in (nn.BatchNorm2d, bn_ext.BatchNorm2d))
    for module in (stock, ours):
        module.num_batches_tracked = count.to(device, copy=True)
    x = torch.randn(3, 4, 5, 5, device=device) + 1
    torch.testing.assert_close(ours(x), stock(x))
    assert_same_state(ours, stock)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_empty_batch(device: str, shape: tuple[int, ...]) -> None:
    our_class, stock_class = (
        (bn_ext.BatchNorm2d, nn.BatchNorm2d) if len(shape) == 4 else (bn_ext.BatchNorm1d, nn.BatchNorm1d)
    )
    ours, stock = our_class(4, device=device), stock_class(4, device=device)
    x1, x2 = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    y1, y2 = stock(x1), ours(x2)
    assert y2.shape == y1.shape
    y1.sum().backward(), y2.sum().backward()
    assert x2.grad.shape == shape
    assert ours.weight.grad.tolist() == ours.bias.grad.tolist() == [0.0] * 4
    assert_same_state(ours, stock)
    assert ours.eval()(x2).shape == shape


def test_checkpoints_load_both_ways_also_old_ones(device: str) -> None:
    stock, ours = nn.BatchNorm2d(4), bn_ext.BatchNorm2d(4, device=device)
    stock(torch.randn(3, 4, 5, 5))
    ours.load_state_dict(stock.state_dict())
    assert_same_state(ours, stock)
    ours(torch.randn(3, 4, 5, 5, device=device))
    stock.load_state_dict(ours.state_dict())
    assert_same_state(ours, stock)
    assert ours._version == stock._version
    version_1 = {k: v for k, v in stock.state_dict().items() if k != "num_batches_tracked"}
    ours.load_state_dict(version_1)
    assert ours.state_dict()._metadata == stock.state_dict()._metadata


def test_pickle_and_deepcopy(device: str) -> None:
    ours = bn_ext.BatchNorm2d(4, device=device)
    x = torch.randn(3, 4, 5, 5, device=device)
    ours(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is bn_ext.BatchNorm2d
        assert_same_state(twin, ours)
        torch.testing.assert_close(twin.eval()(x), copy.deepcopy(ours).eval()(x))


def test_meta_device_and_to_empty(device: str) -> None:
    ours = bn_ext.BatchNorm2d(4, device="meta")
    y = ours(torch.empty(3, 4, 5, 5, device="meta").contiguous(memory_format=torch.channels_last))
    assert y.device.type == "meta"
    assert y.is_contiguous(memory_format=torch.channels_last)
    ours = ours.to_empty(device=device)
    ours.reset_parameters()
    x = torch.randn(3, 4, 5, 5, device=device)
    torch.testing.assert_close(ours(x), nn.BatchNorm2d(4, device=device)(x))


def test_model_moved_between_dtypes(device: str) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        ours, stock = bn_ext.BatchNorm2d(4, device=device).to(dtype), nn.BatchNorm2d(4, device=device).to(dtype)
        x = torch.randn(3, 4, 5, 5, device=device).to(dtype)
        eps = torch.finfo(dtype).eps  # torch rounds more than once to 16 bits
        torch.testing.assert_close(ours(x), stock(x), rtol=4 * eps, atol=4 * eps)
        assert_same_state(ours, stock)


def test_threads_share_an_eval_module(device: str) -> None:
    ours = bn_ext.BatchNorm2d(8, device=device).eval()
    inputs = [torch.randn(4, 8, 30, 30, device=device) for _ in range(8)]
    expected = [ours(x) for x in inputs]
    results: list[torch.Tensor | None] = [None] * len(inputs)

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = ours(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)
