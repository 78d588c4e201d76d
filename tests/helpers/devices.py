"""The device that a test runs on: what helpers put their tensors on."""

import contextlib
from collections.abc import Iterator

import torch

_current = "cpu"


def current() -> str:
    """The device of the test that runs."""
    return _current


@contextlib.contextmanager
def use(device: str) -> Iterator[None]:
    """Make a device the current one for a while.

    On a GPU torch.nn does without cuDNN meanwhile: the model to compare with is then torch's own arithmetic, in float64
    too, and not that of whichever library takes the call. test_cuda.py compares with cuDNN.
    """
    global _current
    _current = device
    flags = torch.backends.cudnn.flags(enabled=False) if device == "cuda" else contextlib.nullcontext()
    try:
        with flags:
            yield
    finally:
        _current = "cpu"
