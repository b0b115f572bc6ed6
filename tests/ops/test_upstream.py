"""weighted_loss multiplies its gradient by an upstream gradient of each sample before it rounds it."""

import pytest
import torch
from harness import data, make_keys, make_t, schedule
from runners import runners

SHAPE = (3, 3, 8, 6)


def gradient(runner, dtype, upstream, kind=0, scale=1.0):
    pred, x_start = (data(SHAPE, dtype, "channels last", i) for i in range(2))
    table = (make_keys(3), make_t(3), schedule(3), upstream)
    return runner.call("weighted_loss", (pred, x_start, None, *table, kind, scale, True))


@pytest.mark.parametrize("runner", runners())
def test_an_upstream_gradient_of_ones_changes_no_bit(runner):
    for dtype, kind in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)):
        plain, ones = (gradient(runner, dtype, upstream, kind, 0.3) for upstream in (None, torch.ones(3)))
        assert all(map(torch.equal, plain, ones))


@pytest.mark.parametrize("runner", runners())
def test_the_gradient_is_scaled_sample_by_sample_and_the_loss_is_not(runner):
    upstream = torch.tensor([4.0, -0.5, 0.0])
    loss, plain = gradient(runner, torch.float32, None)
    same_loss, scaled = gradient(runner, torch.float32, upstream)
    assert torch.equal(same_loss, loss)
    assert torch.equal(scaled, plain * upstream.view(3, 1, 1, 1))  # powers of two round nothing


@pytest.mark.parametrize("runner", runners())
def test_a_small_float16_gradient_is_scaled_before_it_is_rounded(runner):
    """As GradScaler needs it: unscaled, nearly all of these gradients round to 0 in float16."""
    scale, upstream = 2.0**-21, torch.full((3,), 2.0**19)
    _, unscaled = gradient(runner, torch.float16, None, scale=scale)
    assert (unscaled == 0).float().mean() > 0.9
    _, scaled = gradient(runner, torch.float16, upstream, scale=scale)
    _, direct = gradient(runner, torch.float16, None, scale=0.25)
    assert torch.equal(scaled, direct)


@pytest.mark.parametrize("runner", runners())
def test_slopes_below_the_normal_float32_numbers_keep_their_digits(runner):
    """The factors are multiplied first: no product on the way is smaller than both the slope and the result."""
    pred = torch.linspace(1.0, 2.0, 48).view(1, 48) * 2.0**-120
    noise, rows = torch.zeros(1, 48), torch.tensor([[0.0, 1.0, 1.0]])
    arguments = (pred, None, noise, None, torch.zeros(1, dtype=torch.int64), rows, torch.tensor([2.0**100]))
    _, grad = runner.call("weighted_loss", (*arguments, 0, 2.0**-60, True))
    expected = pred.double() * 2 / 48 * 2.0**40
    assert ((grad.double() - expected).abs() <= 2.0**-22 * expected).all()
