"""group_norm_silu's C++ kernels for the CPU: what follows from how they walk over samples, and their last digits.

That they compute the right values, in every dtype, layout and shape, is in tests/ops.
"""

import pytest
import torch
from harness import Case, assert_true, data

from ddpm_fast.ops import native, reference

pytestmark = pytest.mark.skipif(not native.modules["cpu"].available, reason="the CPU module is not built")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels last"])


def call(case):
    return getattr(torch.ops.ddpm_fast, case.op)(*case.arguments)


def cases(shape, dtype, layout, groups=4, silu=True):
    """The forward and the backward pass with a scale and a shift, which are different for each sample."""
    n, c = shape[:2]
    x, grad = data(shape, dtype, layout, 0), data(shape, dtype, layout, 1)
    parameters = [data(size, dtype, layout, 2 + i) for i, size in enumerate([(c,), (c,), (n, c), (n, c)])]
    _, mean, rstd = reference.group_norm_silu(x, *parameters, groups, 1e-5, silu)
    yield Case("group_norm_silu", (x, *parameters, groups, 1e-5, silu))
    yield Case("group_norm_silu_backward", (grad, x, mean, rstd, *parameters, groups, silu))


# The kernels take as many samples at once as fit in 1 MiB of cache for each thread; tests have one thread.
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 16, 40, 40), id="two or three samples at once, and one at the end"),
        pytest.param((3, 16, 68, 70), id="one sample at once, the gradient before the SiLU kept"),
        pytest.param((2, 16, 127, 129), id="a sample of several tiles, nothing kept"),
        pytest.param((23, 4, 21, 25), id="many samples, whose last row is short"),
        pytest.param((23, 3, 21, 25), id="many samples, whose last row is short and odd"),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@LAYOUTS
def test_every_sample_of_a_large_batch_is_computed_with_its_own_scale(shape, dtype, layout):
    for case in cases(shape, dtype, layout, groups=1 if shape[1] == 3 else 4):
        assert_true(case, call(case))


@LAYOUTS
def test_the_rounding_of_a_large_mean_does_not_reach_the_output(layout):
    """The mean is subtracted as a float32 number, and what it lost in rounding is added to the offset."""
    x = data((4, 8, 24, 24), F32, layout) + 1e5
    ones, zeros = torch.ones(8), torch.zeros(8)
    y, mean, rstd = torch.ops.ddpm_fast.group_norm_silu(x, ones, zeros, None, None, 4, 1e-5, False)
    exact, exact_mean, exact_rstd = reference.group_norm_silu(x.double(), ones, zeros, None, None, 4, 1e-5, False)
    rounding = ((mean.double() - exact_mean).abs() * exact_rstd).max()
    assert rounding > 1e-3  # of the mean, in units of the deviation: what y would be off by
    # The deviations are exact, and each of at most 144 additions to a sum of them rounds it by 2^-24 at most.
    assert (y - exact).abs().max() < 144 * 2.0**-24 * exact.abs().max()
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=144 * 2.0**-24, atol=0)


@LAYOUTS
def test_the_mean_of_bfloat16_numbers_is_exact_to_its_last_bit(layout):
    """Sums are of deviations from a centre that is itself a bfloat16 number, so that they and their sums are exact."""
    # The centre is a mean of 3 or 24 numbers here, which float32 does not hold exactly.
    x = (data((3, 8, 32, 48), F32, layout) * 8).round().clamp(-20, 20).div(8).to(BF16)
    ones, zeros = torch.ones(8), torch.zeros(8)
    _, mean, _ = torch.ops.ddpm_fast.group_norm_silu(x, ones, zeros, None, None, 4, 1e-5, False)
    grouped = x.double().reshape(3, 4, -1)
    assert torch.equal(mean, grouped.mean(2).float())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("bias", [-80.0, -100.0, -1e4, -1e30, 100.0, 1e4])
@LAYOUTS
def test_the_slope_of_silu_far_from_zero_is_0_or_1(layout, bias, dtype):
    """Exponents are limited, so that no infinity is multiplied by 0."""
    x, grad = data((2, 8, 9, 7), dtype, layout, 0), data((2, 8, 9, 7), dtype, layout, 1)
    weight, bias_ = torch.ones(8), torch.full((8,), bias)
    _, mean, rstd = torch.ops.ddpm_fast.group_norm_silu(x, weight, bias_, None, None, 4, 1e-5, True)
    grads = torch.ops.ddpm_fast.group_norm_silu_backward(grad, x, mean, rstd, weight, bias_, None, None, 4, True)
    if bias < 0:
        assert all(g.abs().max() < 1e-25 for g in grads[:3])
    else:
        plain = torch.ops.ddpm_fast.group_norm_silu_backward(grad, x, mean, rstd, weight, bias_, None, None, 4, False)
        for g, expected in zip(grads[:3], plain, strict=False):
            torch.testing.assert_close(g, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
