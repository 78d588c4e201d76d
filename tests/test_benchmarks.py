"""The benchmarks themselves: that they refuse wrong results, and that they count what they say they count."""

import pytest
import torch
from torch import Tensor

from benchmarks.check import WrongResultError, check, reference
from benchmarks.inputs import DTYPES, LAYOUTS, Case, make_inputs
from benchmarks.operations import OPERATIONS, least_bytes
from benchmarks.providers import PROVIDERS, Subject

CPU = torch.device("cpu")
SIZE = (4, 3, 9, 7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_results_pass(operation: str, dtype: str, layout: str) -> None:
    case = Case("small", SIZE, dtype, layout, operation)
    inputs = make_inputs(case, CPU)
    expected = reference(case, inputs)
    for provider in PROVIDERS:
        check(provider, case, inputs, Subject(provider, operation, inputs), expected)


@pytest.mark.parametrize(("index", "name"), enumerate(["dx", "dweight", "dbias", "dz"]))
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


def test_least_bytes() -> None:
    """By hand, for 1024 values: tensors of 4 or 2 bytes a value, and one bit that is written and one that is read."""
    size = (2, 8, 8, 8)
    assert least_bytes("batch_norm", size, 4, "forward+backward") == 5 * 4096
    assert least_bytes("bn+relu", size, 2, "forward+backward") == 5 * 2048
    assert least_bytes("bn+add+relu", size, 4, "forward+backward") == 3 * 4096 + 128 + 4 * 4096 + 128
    assert least_bytes("bn+add+relu", size, 2, "eval") == 3 * 2048
