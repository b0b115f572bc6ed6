"""Results are rounded to the nearest number of their dtype, ties to even, as PyTorch rounds."""

import pytest
import torch
from runners import runners


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("runner", runners())
def test_ties_are_rounded_to_even(runner, dtype):
    """x_t = 1 x_0 + 0 eps is x_0, here every float32 number halfway between two neighbours in a binade, and others."""
    bits = 16 if dtype == torch.bfloat16 else 13  # that are dropped
    below = torch.arange(0x3F800000, 0x40000000, 1 << bits, dtype=torch.int64)  # [1, 2)
    ties = torch.cat([below + (1 << bits - 1) + off for off in (-1, 0, 1)]).to(torch.int32).view(torch.float32)
    x = torch.cat([ties, -ties, ties * 2.0**-10, ties * 2.0**10]).view(1, -1)
    t, rows = torch.zeros(1, dtype=torch.int64), torch.tensor([[1.0, 0.0]])
    (found,) = runner.call("q_sample", (x, torch.zeros_like(x), None, t, rows, dtype))
    assert torch.equal(found, x.to(dtype))
