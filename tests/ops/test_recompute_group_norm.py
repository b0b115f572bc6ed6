"""A norm's output that is recomputed from its statistics has the bits that it had, on every backend."""

import pytest
import torch
from harness import data
from runners import runners

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RUNNERS = pytest.mark.parametrize("runner", runners())


def call(runner, x, input_bias, groups, *, residual=None, skip=None, parameters=F32, silu=True):
    """The output, and the one recomputed of the sum (of x and input_bias where it is not kept)."""
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    weight, bias = (data((channels,), parameters, "contiguous", i) for i in (2, 3))
    keep = residual is not None or skip is not None
    given = (x, input_bias, residual, skip, weight, bias, None, None, groups, 1e-5, silu, keep)
    y, h, mean, rstd = runner.call("add_group_norm_silu", given)
    again = (h, None) if keep else (x, input_bias)
    return y, *runner.call("recompute_group_norm_silu", (*again, mean, rstd, weight, bias, groups, silu))


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        pytest.param((2, 64, 16, 16), 32, BF16, id="a slab"),
        pytest.param((1, 24, 8, 8), 2, F32, id="a slab whose vectors are of two groups"),
        pytest.param((2, 64, 33, 32), 32, BF16, id="a few slices"),
        pytest.param((1, 128, 64, 34), 4, F16, id="slices that a kernel of its own joins"),
        pytest.param((2, 6, 5, 7), 3, F32, id="no vectors"),
        pytest.param((1, 1280, 2, 2), 32, BF16, id="more channels than a block of the output has"),
    ],
)
@RUNNERS
def test_the_output_is_recomputed_in_the_same_bits(runner, shape, groups, dtype):
    n, c = shape[:2]
    x, residual = (data(shape, dtype, "channels last", i) for i in (0, 1))
    skip = data((n, c, *shape[2:]), dtype, "channels last", 4)
    biases = data((n, c), F32, "contiguous", 5), data((c,), dtype, "contiguous", 6)
    for first, second in (
        call(runner, x, biases[0], groups),
        call(runner, x, biases[1], groups, parameters=dtype, silu=False),
        call(runner, x, None, groups),
        call(runner, x, biases[0], groups, residual=residual, skip=skip),
    ):
        assert first.isfinite().all()
        assert first.stride() == second.stride()
        assert torch.equal(first, second)


@RUNNERS
def test_a_mean_far_larger_than_the_spread_and_what_is_not_finite_change_no_bit(runner):
    x = data((2, 16, 8, 8), F32, "channels last", 0) + 1e5
    x[0, 3, 1, 1], x[1, 0, 0, 0] = torch.inf, torch.nan
    first, second = call(runner, x, None, 4)
    assert first[1, 4:].isfinite().all()
    assert torch.equal(first.isnan(), second.isnan())
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
