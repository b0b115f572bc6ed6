"""The same bits in every run, whatever the threads and the batch; and numbers at the edge of what float32 can do."""

import pytest
import torch
from calls import OPS, SHAPE, arguments, call
from harness import T, data, make_keys, schedule

from ddpm_fast import ops

BIG = (3, 3, 123, 131)  # several tiles, an odd size


def big(op):
    x, y = (data(BIG, torch.float32, "channels last", i) for i in range(2))
    t, keys = torch.tensor([0, 7, T - 1]), make_keys(3)
    learned = torch.randn(BIG[1]).requires_grad_()
    return {
        "q_sample": lambda: ops.q_sample(x, t, schedule(2), keys=keys),
        "weighted_loss": lambda: ops.weighted_loss(x, t, schedule(3), x_start=y, keys=keys),
        "reverse_step": lambda: ops.reverse_step(x, y, t, schedule(6), keys=keys).x,
        "vlb_terms": lambda: ops.vlb_terms(x, x + 0.1 * y, y, t, schedule(6)),
        "group_norm_silu": lambda: torch.autograd.grad(
            ops.group_norm_silu(x, learned, learned, 1).sum() * 3, learned, retain_graph=True
        )[0],
        "add_group_norm_silu": lambda: torch.autograd.grad(
            ops.add_group_norm_silu(x, learned, learned, 1, residual=y)[0].sum() * 3, learned, retain_graph=True
        )[0],
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_the_number_of_threads(op):
    function, threads = big(op), torch.get_num_threads()
    expected = function()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(function(), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("op", OPS)
def test_a_sample_is_the_same_alone_and_in_a_batch(op, layout, dtype):
    args, kwargs = arguments(op, dtype, layout)
    result = call(op, args, kwargs)
    for n in range(SHAPE[0]):

        def own(x, n=n):
            batched = isinstance(x, torch.Tensor) and len(x) == SHAPE[0] and x.shape != (SHAPE[1],)
            return x[n : n + 1] if batched else x

        alone = call(op, tuple(map(own, args)), {k: own(v) for k, v in kwargs.items()})
        assert torch.equal(alone[0], result[n])


@pytest.mark.parametrize("op", OPS)
def test_a_run_gives_the_bits_of_the_last(op):
    function = big(op)
    expected = function()
    assert all(torch.equal(function(), expected) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_right_where_the_mean_is_far_larger_than_the_spread(dtype):
    """mean / std = 1e5 in float32; in bfloat16, whose steps are coarser than that, the largest that it can hold."""
    ratio = 1e5 if dtype == torch.float32 else 200
    x = (ratio + torch.randn(2, 8, 32, 33, dtype=torch.float64)).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    ones, zeros = torch.ones(8), torch.zeros(8)
    y = ops.group_norm_silu(x, ones, zeros, 4, silu=False)
    expected = torch.nn.functional.group_norm(x.double(), 4, ones.double(), zeros.double())
    # One rounding of the mean moves all by this much; sums of squares would be off by ratio^2 eps, a thousand fold.
    bound = 2 * ratio * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * 4
    assert (y.double() - expected).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_of_what_is_far_below_zero_is_zero(dtype):
    x = torch.randn(2, 8, 5, 7).to(dtype, memory_format=torch.channels_last)
    for bias in (-100.0, -1e4, -1e30):
        y = ops.group_norm_silu(x, torch.ones(8), torch.full((8,), bias), 4)
        assert y.abs().max() < 1e-30


def test_the_counter_of_a_stream_is_64_bits_wide():
    """Block 2^33 of a stream holds element 2^35."""
    far = ops.normal(torch.tensor([[5, 2**33]]), 8)
    near = ops.normal(torch.tensor([[5, 2**33 - 1]]), 12)
    assert torch.equal(far[0], near[0, 4:])
