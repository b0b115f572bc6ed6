"""Every op on every backend, against the float64 truth, over all that it may be called with."""

import pytest
import torch
from harness import T, assert_true, data, make_keys, make_t, schedule, targets
from hypothesis import given, settings
from runners import runners
from strategies import STRATEGIES

from ddpm_fast.ops import reference
from ddpm_fast.ops.noise import noise_of


@pytest.mark.parametrize("op", STRATEGIES)
@pytest.mark.parametrize("runner", runners())
def test_results_lie_within_their_bounds_of_the_truth(runner, op):
    # A simulator is slow, and compiles Triton's kernels for every combination.
    share, most = (12, 600) if runner.simulated else (1, 6000)

    @settings(max_examples=settings.default.max_examples // share)
    @given(case=STRATEGIES[op](most))
    def check(case):
        assert_true(case, runner.call(op, case.arguments))

    check()


@pytest.mark.parametrize("runner", runners())
def test_the_gradient_of_the_loss_is_the_one_that_autograd_finds(runner):
    shape = (3, 3, 6, 5)
    pred, x_start = (data(shape, torch.float32, "channels last", i) for i in range(2))
    keys, t, rows = make_keys(3), make_t(3), schedule(3)
    for kind, name in enumerate(("l2", "l1", "huber")):
        leaf = pred.double().requires_grad_()
        eps = noise_of(keys, shape)
        loss = reference.weighted_loss(leaf, x_start.double(), eps, t, rows.double(), name)
        (expected,) = torch.autograd.grad(loss.sum(), leaf)
        _, grad = runner.call("weighted_loss", (pred, x_start, None, keys, t, rows, None, kind, 1.0, True))
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)


TYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)]
SHAPES = [(3, 3, 6, 5), (2, 8, 16, 16), (2, 3, 40, 41)]


@pytest.mark.parametrize(("shape", "types"), list(zip(SHAPES, TYPES, strict=True)), ids=map(str, SHAPES))
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("runner", runners())
def test_a_step_in_place_has_the_bits_of_one_that_is_not(runner, layout, shape, types):
    # With a simulator each shape has dtypes of its own, since every combination is a kernel to compile.
    for dtype, pred_dtype in [types] if runner.simulated else TYPES:
        x, x_prev = (data(shape, dtype, layout, i) for i in (0, 2))
        pred, variance = (data(shape, pred_dtype, layout, i) for i in (1, 3))
        n = len(x)
        arguments = (None, make_keys(T, n), x_prev, variance, None, make_t(n), schedule(8), -1.0, 1.0)
        out = targets(x, pred, True, pred_dtype != dtype)
        expected = runner.call("reverse_step", (x, pred, *arguments, *out))
        state, x_start = (y.to(runner.device, copy=True) for y in (x, x_prev))
        arguments = (None, arguments[1], x_start, *arguments[3:])
        found = runner.call("reverse_step", (state, pred, *arguments, state, x_start, out[2]))
        assert all(map(torch.equal, found, expected))
