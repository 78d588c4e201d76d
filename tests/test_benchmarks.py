"""The benchmarks themselves: that they refuse wrong results, and that they count what they say they count."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bn_ext
from benchmarks import machine
from benchmarks.check import WrongResultError, check, reference
from benchmarks.inputs import DTYPES, LAYOUTS, ROWS_LAYOUT, Case, make_inputs
from benchmarks.measure import Effort, in_turns
from benchmarks.names import OURS, RIVAL
from benchmarks.operations import OPERATIONS, least_bytes
from benchmarks.providers import Subject
from benchmarks.training.memory import LiveBytes
from benchmarks.training.models import MODELS

CPU = torch.device("cpu")
SIZE = (4, 3, 9, 7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_results_pass(operation: str, dtype: str, layout: str) -> None:
    case = Case("small", SIZE, dtype, layout, operation)
    inputs = make_inputs(case, CPU)
    expected = reference(case, inputs)
    for provider in (RIVAL, OURS):
        check(provider, case, inputs, Subject(provider, operation, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_of_rows_pass(dtype: str) -> None:
    case = Case("small", (50, 7), dtype, ROWS_LAYOUT)
    inputs = make_inputs(case, CPU)
    expected = reference(case, inputs)
    for provider in (RIVAL, OURS):
        check(provider, case, inputs, Subject(provider, case.operation, inputs), expected)


@pytest.mark.parametrize(("index", "name"), list(enumerate(["dx", "dweight", "dbias", "dz"])))
def test_wrong_gradients_are_refused(index: int, name: str) -> None:
    case = Case("small", SIZE, "float32", "contiguous", "bn+add+relu")
    inputs = make_inputs(case, CPU)
    expected = reference(case, inputs)
    subject = Subject("bn_ext", case.operation, inputs)
    right = subject.calls["forward+backward"][0]

    def wrong() -> tuple[Tensor, ...]:
        gradients = right()
        assert isinstance(gradients, tuple)
        gradients[index].view(-1)[1] += 0.1 if name in ("dx", "dz") else 1.0
        return gradients

    subject.calls["forward+backward"][0] = wrong
    with pytest.raises(WrongResultError, match=rf"^bn_ext is wrong on bn\+add\+relu small .*: {name} is"):
        check("bn_ext", case, inputs, subject, expected)


@pytest.mark.parametrize(
    ("device", "name", "slug"),
    [
        ("cuda", "NVIDIA H200", "h200"),
        ("cuda", "NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("cpu", "AMD EPYC", "cpu-amd-epyc-3-threads"),
        ("cpu", "Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu-intel-xeon-2.20ghz-3-threads"),
    ],
)
def test_folder_of_results(device: str, name: str, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert machine.device_slug(torch.device(device)) == slug


def test_least_bytes() -> None:
    """By hand, for 1024 values: tensors of 4 or 2 bytes a value, and one bit that is written and one that is read."""
    size = (2, 8, 8, 8)
    assert least_bytes("batch_norm", size, 4, "forward+backward") == 5 * 4096
    assert least_bytes("bn+relu", size, 2, "forward+backward") == 5 * 2048
    assert least_bytes("bn+add+relu", size, 4, "forward+backward") == 3 * 4096 + 128 + 4 * 4096 + 128
    assert least_bytes("bn+add+relu", size, 2, "eval") == 3 * 2048


@pytest.mark.parametrize(
    ("name", "count"),
    [  # as published, and as torchvision has them
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("densenet121", 7_978_856),
        ("mobilenet_v3_large", 5_483_032),
        ("efficientnet_b0", 5_288_548),
    ],
)
def test_parameters_of_the_models(name: str, count: int) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.slow
def test_live_bytes() -> None:
    """By hand: y = relu(conv(x)), a 1x1 convolution of 2 to 3 channels without bias on a plane of 100 values."""
    x = torch.randn(1, 2, 10, 10)
    convolution = torch.nn.Conv2d(2, 3, 1, bias=False)
    with LiveBytes() as memory:
        y = convolution(x).relu()  # of 1200 bytes, as is what relu was given
        assert memory.peak == 2 * 1200
        assert memory.alive() == 1200  # relu keeps its result, convolution x and its weight
        view = y.view(-1)[3:]  # no memory of its own
        x.add_(1)
        y.detach().add_(1)
        assert memory.alive() == 1200
        del y
        assert memory.alive() == 1200
        del view
        assert memory.alive() == 0


def test_live_bytes_in_backward() -> None:
    x = torch.randn(1000, requires_grad=True)
    with LiveBytes() as memory:
        loss = x.exp().sum()
        assert memory.alive() == 4000 + 4  # exp keeps its result
        loss.backward()
        assert memory.alive() == 4000 + 4  # x.grad and the loss
        # The results of exp, and of exp's backward; sum's gradient is one value that is expanded.
        assert memory.peak == 2 * 4000 + 4 + 4


@pytest.mark.parametrize(("batch_norm", "vectors"), [(torch.nn.BatchNorm2d, 2), (bn_ext.BatchNorm2d, 4)])
def test_live_bytes_of_batch_norm(batch_norm: type[torch.nn.BatchNorm2d], vectors: int) -> None:
    """Both keep their input and some values per channel, and make no other copy of it."""
    module = batch_norm(5)
    x = torch.randn(2, 5, 8, 8, requires_grad=True)
    with LiveBytes() as memory:
        y = module(x)
        assert memory.alive() == memory.peak == y.nbytes + vectors * 20
        del y
        assert memory.alive() == 0


def test_live_bytes_with_saved_tensor_hooks() -> None:
    """A checkpoint keeps its input alone; backward makes what is between anew."""
    x = torch.randn(1000, requires_grad=True)
    with LiveBytes() as memory:
        y = checkpoint(lambda x: x.exp().sin(), x, use_reentrant=False)
        assert memory.alive() == y.nbytes
        del y
        y = x.exp().sin()  # exp's result is kept, by exp and by sin
        assert memory.alive() == y.nbytes + 4000


def test_the_copy_is_timed_in_the_same_rounds() -> None:
    """Last in every round, so that of the two sides each follows the other as often as it follows the copy."""
    order = []

    class Recorder:
        count = 1

        def __init__(self, name: str):
            self.name = name

        def round(self, repeats: int) -> float:
            order.append(self.name)
            return 1.0

    effort = Effort(seconds=0.0, min_rounds=3, max_rounds=3, round_seconds=1e-3)
    times = in_turns({"torch": Recorder("torch"), "ours": Recorder("ours")}, effort, {"copy": Recorder("copy")})
    warm_up = len(order) - 9
    assert order[warm_up:] == ["torch", "ours", "copy", "ours", "torch", "copy", "torch", "ours", "copy"]
    assert {name: side.seconds for name, side in times.items()} == dict.fromkeys(("torch", "ours", "copy"), [1.0] * 3)


def test_rounds_are_as_long_as_they_shall_be() -> None:
    """However many calls a side makes at a time: ten of a second fill ten seconds, and one of 16 at a time does too."""
    made: dict[str, list[int]] = {}

    class Recorder:
        def __init__(self, name: str, count: int):
            self.count = count
            self.repeats = made.setdefault(name, [])

        def round(self, repeats: int) -> float:
            self.repeats.append(repeats)
            return 1.0

    effort = Effort(seconds=0.0, min_rounds=3, max_rounds=3, round_seconds=10.0)
    in_turns({"one": Recorder("one", 1), "some": Recorder("some", 4), "many": Recorder("many", 16)}, effort)
    assert {name: repeats[-1] for name, repeats in made.items()} == {"one": 10, "some": 3, "many": 1}
