"""What `add_group_norm_silu` registers with autograd, on tensors that no fused kernel serves here."""

import itertools
import sys

import pytest
import torch
from harness import data

from ddpm_fast import ops
from ddpm_fast.ops import reference
from ddpm_fast.ops.add_group_norm_silu import add_and_normalise

SHAPE, CHANNELS = (2, 4, 3, 5), 6


@pytest.fixture
def fused(monkeypatch):
    """As on a GPU: the registered op, of which plain PyTorch is the kernel here."""
    monkeypatch.setattr(sys.modules["ddpm_fast.ops.add_group_norm_silu"], "fuses", lambda x: True)


def leaves(*, skip: bool, bias_dims: int | None, residual: bool, dtype=torch.float64):
    """(x, input_bias, residual, skip, weight, bias, scale, shift), channels-last."""
    n, c = SHAPE[:2]
    total = CHANNELS if skip else c

    def leaf(i, *shape):
        return data(shape, dtype, "channels last", i).requires_grad_()

    input_bias = None if bias_dims is None else leaf(1, *SHAPE[2 - bias_dims : 2])
    return (
        leaf(0, *SHAPE),
        input_bias,
        leaf(2, *SHAPE) if residual else None,
        leaf(3, n, CHANNELS - c, *SHAPE[2:]) if skip else None,
        leaf(4, total),
        leaf(5, total),
        leaf(6, n, total),
        leaf(7, n, total),
    )


CASES = list(itertools.product([False, True], [None, 1, 2], [False, True]))


@pytest.mark.parametrize(("skip", "bias_dims", "residual"), CASES)
def test_gradients_are_those_of_finite_differences(skip, bias_dims, residual):
    given = leaves(skip=skip, bias_dims=bias_dims, residual=residual)
    for keep in (True,) if skip or residual else (True, False):

        def strict(*tensors, keep=keep):
            y, h, _, _ = torch.ops.ddpm_fast.add_group_norm_silu(*tensors, 2, 1e-5, True, keep)
            return (y, h) if keep else y

        assert torch.autograd.gradcheck(strict, given)


@pytest.mark.parametrize(("skip", "bias_dims", "residual"), CASES)
def test_the_registered_gradient_is_that_of_the_composition(fused, monkeypatch, skip, bias_dims, residual):
    x, input_bias, residual, skip, weight, bias, scale, shift = given = leaves(
        skip=skip, bias_dims=bias_dims, residual=residual, dtype=torch.float32
    )
    how = {"scale": scale, "shift": shift, "input_bias": input_bias, "residual": residual, "skip": skip}
    wanted = [v for v in given if v is not None]
    results = ops.add_group_norm_silu(x, weight, bias, 2, **how)
    h = reference.add_inputs(x, input_bias, residual, skip)
    expected = reference.group_norm_silu(h, weight, bias, scale, shift, 2, 1e-5, True)[0], h
    for used in ((0,), (1,), (0, 1)):  # y alone, h alone, both

        def grads(pair, used=used, create_graph=False):
            total = sum(((i + 1) * pair[i].square()).sum() for i in used)
            return torch.autograd.grad(
                total, wanted, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )

        for create_graph in (False, True):
            for found, true in zip(grads(results, create_graph=create_graph), grads(expected), strict=True):
                torch.testing.assert_close(found, true, rtol=2e-5, atol=2e-5)
        # Second derivatives go through the reference.
        first, second = (
            torch.autograd.grad(grads(pair, create_graph=True)[0].square().sum(), x, retain_graph=True)[0]
            for pair in (results, expected)
        )
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_what_is_kept_for_the_gradient_is_the_sum_or_x_but_not_both(fused):
    x, input_bias, residual, _, weight, bias, *_ = leaves(skip=False, bias_dims=1, residual=True, dtype=torch.float32)
    y, h = ops.add_group_norm_silu(x, weight, bias, 2, input_bias=input_bias, residual=residual)
    (saved,) = [v for v in y.grad_fn.saved_tensors if v is not None and v.ndim == 4]
    assert saved.data_ptr() == h.data_ptr()
    y = add_and_normalise(x, weight, bias, 2, 1e-5, silu=True, input_bias=input_bias, keep=False).y
    (saved,) = [v for v in y.grad_fn.saved_tensors if v is not None and v.ndim == 4]
    assert saved.data_ptr() == x.data_ptr()


def test_the_sum_is_rounded_once():
    # 1 + 2^-8 + 2^-8 is a number of bfloat16, but 1 + 2^-8 is not, and would be rounded to 1.
    x = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    step = torch.full_like(x, 2.0**-8)
    one = torch.ones(1)
    _, h = ops.add_group_norm_silu(x, one, one, 1, input_bias=step[0, :, 0, 0].float(), residual=step)
    assert (h == 1 + 2.0**-7).all()
