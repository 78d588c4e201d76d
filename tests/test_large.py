"""More elements than 32 bits can count: every offset is 64 bits wide. Of the CPU; test_cuda.py has those of a GPU."""

import os

import pytest
import torch

import bn_ext

POSITIONS = 2**30 + 8  # of each of two channels: 2^31 + 16 elements, 4.3 GB in bfloat16
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.slow
@pytest.mark.skipif(MEMORY < 12 * 2**30, reason="needs 12 GiB of memory")
@pytest.mark.parametrize("shape", [(1, 2, POSITIONS), (POSITIONS, 2)])
def test_more_than_2_to_the_31_elements(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    channel = x.view(2, POSITIONS)[1] if len(shape) == 3 else x[:, 1]
    channel[POSITIONS // 2 :] = 3.0
    mean, var = torch.zeros(2), torch.ones(2)
    y = bn_ext.batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, torch.tensor([0.0, 1.5]))
    torch.testing.assert_close(var, torch.tensor([0.0, 2.25]))
    result = y.view(2, POSITIONS)[1] if len(shape) == 3 else y[:, 1]
    half = POSITIONS // 2
    for begin, expected in ((0, -1.0), (half - 1000, -1.0), (half, 1.0), (POSITIONS - 1000, 1.0)):
        assert (result[begin : begin + 1000] == expected).all()
