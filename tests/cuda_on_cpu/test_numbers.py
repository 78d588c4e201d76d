"""The harness's 16-bit number types convert as torch's do."""

from pathlib import Path

import pytest
import torch

from cuda_on_cpu import build
from cuda_on_cpu.device import Device

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
FAULTY = Path(__file__).parent / "faulty.cu"
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(build.library([FAULTY]))


def convert(device: Device, function: str, values: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    result = torch.empty(values.shape, dtype=to)
    device.call(function, values.data_ptr(), result.data_ptr(), values.numel())
    return result


@pytest.mark.parametrize("name", DTYPES)
def test_number_types(device: Device, name: str) -> None:
    """All 65,536 values there and back; ties, overflow, subnormal numbers and random floats round as torch does."""
    dtype = DTYPES[name]
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    floats = convert(device, f"{name}_to_float", every, torch.float32)
    torch.testing.assert_close(floats, every.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(floats.signbit(), every.signbit())
    numbers = ~every.isnan()
    back = convert(device, f"float_to_{name}", floats, dtype)
    assert torch.equal(back.view(torch.int16)[numbers], every.view(torch.int16)[numbers])
    assert back[~numbers].isnan().all()

    # Halfway between all neighbours, and where infinity begins; just below and just above; and any bits at all.
    finite = floats[floats.isfinite()].double().sort().values
    ties = torch.cat([(finite[1:] + finite[:-1]) / 2, finite[-1:] + (finite[-1:] - finite[-2:-1]) / 2]).float()
    ties = torch.cat([ties, -ties[-1:]])
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,)).to(torch.int32).view(torch.float32)
    normal = torch.randn(1 << 20) * torch.exp2(torch.randint(-30, 18, (1 << 20,)).float())
    infinity = torch.tensor([torch.inf, torch.nan, 0.0])
    near = [ties, ties.nextafter(infinity[0]), ties.nextafter(-infinity[0])]
    x = torch.cat([*near, bits, normal, infinity, -infinity])
    rounded = convert(device, f"float_to_{name}", x, dtype)
    expected = x.to(dtype)
    assert torch.equal(rounded.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(rounded.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
