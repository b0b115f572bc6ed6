"""Triton's kernels at their edges: addresses and sizes that allow no vectors, extreme numbers, the same bits."""

import importlib
import subprocess
import sys

import architectures
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from compiled import simulated
from kernel_calls import BF16, F32, LAYOUTS, images, make_keys

from ddpm_fast import ops
from ddpm_fast.ops import reference

everywhere = pytest.mark.parametrize("cc", architectures.chosen)


@everywhere
def test_odd_sizes_and_odd_addresses_are_served(cc):
    x = torch.randn(2 * 3 * 7 * 9 + 1)[1:].view(2, 3, 7, 9)
    assert x.data_ptr() % 16
    t, rows = torch.tensor([1, 0]), torch.rand(2, 2)
    with simulated(cc):
        x_t = ops.q_sample(x, t, rows, noise=x)
    assert torch.equal(x_t, reference.q_sample(x, x, t, rows, F32))


@everywhere
def test_noise_is_right_near_u_of_one_and_where_the_counter_wraps(cc):
    """sqrt(-2 ln u) at u = 1 - 2^-24 is 3.5e-4: an error of an ulp in ln u would be of the same size."""
    keys = make_keys(16)
    keys[0, 1] = -2
    exact = reference.normal(keys, 40_000)
    assert exact.view(16, -1, 2).square().sum(-1).sqrt().min() < 4e-3
    with simulated(cc):
        torch.testing.assert_close(ops.normal(keys, 40_000), exact, rtol=0, atol=4e-6)


@pytest.mark.parametrize("size", [20, 80], ids=["slab", "large plane"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@everywhere
def test_group_norm_of_a_mean_far_larger_than_the_spread(cc, layout, size):
    x = images(2, 12, size, size, layout=layout) + 1e5
    weight, bias = torch.randn(12), torch.randn(12)
    with simulated(cc):
        y, mean, rstd = torch.ops.ddpm_fast_triton.group_norm_silu(x, weight, bias, None, None, 4, 1e-5, True)
    exact, exact_mean, exact_rstd = reference.group_norm_silu(x.double(), weight, bias, None, None, 4, 1e-5, True)
    half_ulp = 2.0**-8  # of 1e5, to which the mean is rounded
    assert (mean - exact_mean).abs().max() <= half_ulp
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-6, atol=0)
    # SiLU's slope is at most 1.1
    bound = 1.1 * half_ulp * exact_rstd.max() * weight.abs().max() + 1e-5
    assert (y - exact).abs().max() <= bound


def test_elements_past_two_to_the_31_are_reached():
    extent = 2**30 + 1024
    x_start = torch.from_numpy(np.zeros(2 * extent + 1024, np.uint8))  # whose pages come when they are touched
    out = torch.from_numpy(np.zeros(2 * extent + 1024, np.uint16)).view(BF16)
    x_start[2 * extent :] = torch.arange(1024) % 256
    t, rows, keys = torch.zeros(3, dtype=torch.int64), torch.tensor([[1.0, 0.0]]), make_keys(3)
    kernel = importlib.import_module("ddpm_fast.ops.triton.q_sample")._q_sample
    constants = {"LAYOUT": "linear", "LANES": 1, "BLOCK": 1024, "VECTOR": 8, "num_warps": 2, "enable_fp_fusion": False}
    with simulated(90):
        kernel[(3, 1, 1)](x_start, None, keys, t, rows, out, 1, extent, 1, **constants)
    expected = ((torch.arange(1024) % 256).float() * (2 / 255) - 1).bfloat16()
    assert torch.equal(out[2 * extent :], expected)


def test_slabs_past_two_to_the_31_elements_are_reached():
    """Three samples of a pixel each, of which the kernel is to take the first 32 channels."""
    extent = 2**30 + 1024
    x, y, h = (torch.from_numpy(np.zeros(2 * extent + 1024, np.uint16)).view(BF16) for _ in range(3))
    x[2 * extent :] = torch.arange(1024).bfloat16()
    mean, rstd, ones = torch.empty(3), torch.empty(3), torch.ones(32)
    kernel = importlib.import_module("ddpm_fast.ops.triton.group_norm_slab")._norm_of_slab
    sizes = {"PLANE": 1, "CHANNELS": extent, "OF_X": extent, "WIDTH": extent, "BLOCK": extent}
    constants = {"VECTOR": 8, "TOGETHER": 1, "ROWS": 1, "COLUMNS": 32, "num_warps": 1, "enable_fp_fusion": False}
    with simulated(90):
        tensors = (x, None, None, None, ones, ones, None, None, y, h, mean, rstd)
        kernel[(3,)](*tensors, 0, 1e-5, SILU=False, **sizes, **constants)
    assert torch.equal(h[2 * extent :][:32], torch.arange(32).bfloat16())
    assert (y[2 * extent :][:32] > 0).all()


@everywhere
def test_a_norm_of_odd_addresses_is_served(cc):
    x, skip = (torch.randn(2 * 5 * 5 * 8 + 1)[1:].view(2, 5, 5, 8).permute(0, 3, 1, 2) for _ in range(2))
    assert x.data_ptr() % 16
    weight, bias = torch.randn(16), torch.randn(16)
    with simulated(cc):
        y, h = ops.add_group_norm_silu(x, weight, bias, 4, skip=skip)
    assert torch.equal(h, torch.cat([x, skip], 1))
    torch.testing.assert_close(y, reference.group_norm_silu(h, weight, bias, None, None, 4, 1e-5, True)[0])


@everywhere
def test_a_timestep_outside_the_table_reads_nothing_and_gives_nan(cc):
    x, keys, rows = images(3, 3, 8, 8), make_keys(3), torch.rand(5, 6)
    t, op = torch.tensor([4, 5, -1]), torch.ops.ddpm_fast_triton
    x_next = torch.zeros_like(x)
    with simulated(cc):
        op.reverse_step(x, x, None, make_keys(5, 3), None, None, None, t, rows, -1.0, 1.0, x_next, None, None)
        results = (
            x_next,
            op.q_sample(x, None, keys, t, rows[:, :2].contiguous(), F32),
            op.weighted_loss(x, None, None, keys, t, rows[:, :3].contiguous(), None, 0, 1.0, False)[0],
            op.weighted_loss(x, x, None, None, t, rows[:, :3].contiguous(), None, 1, 1.0, True)[1],
            op.vlb_terms(x, x, x, None, t, rows, -1.0, 1.0),
        )
    for result in results:
        assert result[0].isfinite().all()
        assert result[1:].isnan().all()


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, ddpm_fast; assert 'triton' not in sys.modules, sorted(m for m in sys.modules if 'triton' in m)[:9]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def every_op(layout):
    """A function that calls each op on some of three samples, whose sums have several parts; norms of slabs too."""
    x, pred, grad = (images(3, 12, 56, 56, layout=layout) for _ in range(3))
    keys, t, rows, op = make_keys(3), torch.tensor([2, 0, 1]), torch.rand(3, 6), torch.ops.ddpm_fast_triton
    weight = torch.randn(12)

    def results(samples=slice(None)):
        x_, pred_, grad_, keys_, t_ = (y[samples] for y in (x, pred, grad, keys, t))
        x_next = torch.empty_like(x_)
        op.reverse_step(x_, pred_, None, keys_[None], None, None, None, t_, rows, -1.0, 1.0, x_next, None, None)
        y, mean, rstd = op.group_norm_silu(x_, weight, weight, None, None, 1, 1e-5, True)
        gradients = op.group_norm_silu_backward(grad_, x_, mean, rstd, weight, weight, None, None, 1, True)
        loss = op.weighted_loss(pred_, x_, None, keys_, t_, rows[:, :3].contiguous(), None, 2, 1.0, True)
        x_t = op.q_sample(x_, None, keys_, t_, rows[:, :2].contiguous(), BF16)
        bound = op.vlb_terms(x_, x_, pred_, None, t_, rows, -1.0, 1.0)
        of_samples, sums = slabs(samples)
        return (x_t, *loss, x_next, bound, y, mean, rstd, gradients[0], *of_samples), (*gradients[1:3], *sums)

    small, others, bias = images(3, 16, 8, 8), images(3, 16, 8, 8), torch.randn(3, 16)
    ones = torch.ones(16)

    def slabs(samples):
        x_, grad_, bias_ = small[samples], others[samples], bias[samples]
        given = (ones, ones, bias_, bias_, 2)
        y, h, mean, rstd = op.add_group_norm_silu(x_, bias_, grad_, None, *given, 1e-5, True, True)
        gradients = op.add_group_norm_silu_backward(grad_, x_, h, bias_, mean, rstd, *given, True, True, 16)
        grad_x, _, grad_bias, *of_parameters, grad_scale, grad_shift = gradients
        return (y, h, mean, rstd, grad_x, grad_bias, grad_scale, grad_shift), of_parameters

    return results


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_sample_has_the_same_bits_in_any_batch_and_in_every_run(layout):
    results = every_op(layout)
    with simulated(90) as launched:
        (together, sums), (again, sums_again), (alone, _) = results(), results(), results(slice(1, 2))
    assert {"_add_parts", "_merge", "_norm_of_slab", "_gradients_of_slab"} <= {one.stats.kernel for one in launched}
    assert all(map(torch.equal, sums, sums_again))
    for first, second, third in zip(together, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[1:2], third)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_op_has_the_same_bits_in_every_order_of_blocks_and_warps(layout):
    results = every_op(layout)
    with simulated(90):
        expected, sums = results()
    for seed in range(3):
        with simulated(90, order_seed=seed):
            again, sums_again = results()
        assert all(map(torch.equal, (*again, *sums_again), (*expected, *sums))), f"order {seed}"
