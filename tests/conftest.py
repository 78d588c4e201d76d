"""What all tests share: the devices of this machine, and a fixed seed for each test."""

import pytest
import torch

from bn_ext import testing


@pytest.fixture(params=testing.devices())
def device(request: pytest.FixtureRequest) -> str:
    """A device that bn_ext has kernels for."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
