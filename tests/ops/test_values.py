"""Every op on every backend, against the float64 truth, over all that it may be called with."""

import pytest
import torch
from harness import assert_true
from hypothesis import HealthCheck, given, settings
from runners import runners
from strategies import STRATEGIES

from ddpm_fast.ops import backends


@pytest.mark.parametrize("op", STRATEGIES)
@pytest.mark.parametrize("runner", runners())
def test_results_lie_within_their_bounds_of_the_truth(runner, op):
    # A simulator is slow, and compiles Triton's kernels for every combination.
    examples, most = (12, 600) if runner.simulated else (150, 6000)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=STRATEGIES[op](most))
    def check(case):
        assert_true(case, runner.call(op, case.arguments))

    check()


@pytest.mark.parametrize("runner", runners())
def test_the_gradient_of_the_loss_is_the_one_that_autograd_finds(runner):
    from harness import data, make_keys, make_t, schedule

    shape = (3, 3, 6, 5)
    pred, x_start = (data(shape, torch.float32, "channels last", i) for i in range(2))
    keys, t, rows = make_keys(3), make_t(3), schedule(3)
    for kind, name in enumerate(("l2", "l1", "huber")):
        leaf = pred.double().requires_grad_()
        reference = backends.OPS["weighted_loss"].reference
        loss = reference(leaf, x_start.double(), None, keys, t, rows.double(), name)
        (expected,) = torch.autograd.grad(loss.sum(), leaf)
        _, grad = runner.call("weighted_loss", (pred, x_start, None, keys, t, rows, kind, 1.0, True))
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7)
