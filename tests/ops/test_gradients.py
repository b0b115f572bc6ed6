"""Gradients: exact in float64, and those of float64 to rounding elsewhere; eager, and in a compiled graph."""

import pytest
import torch
from calls import OPS, arguments, call, split

import ddpm_fast


@pytest.mark.parametrize("op", OPS)
def test_float64_gradients_are_those_of_finite_differences(op):
    leaves, function = split(op, *arguments(op, torch.float64))
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_float64_to_rounding(op, compiled):
    exact_leaves, exact = split(op, *arguments(op, torch.float64))
    leaves, function = split(op, *arguments(op))
    if compiled:
        function = torch.compile(function, fullgraph=True)
    result = exact(*exact_leaves)
    weights = torch.randn(result.shape, dtype=torch.float64)
    expected = torch.autograd.grad((weights * result).sum(), exact_leaves)
    grads = torch.autograd.grad((weights.float() * function(*leaves)).sum(), leaves)
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=2e-5, atol=2e-5 * truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_gradients_have_the_dtype_of_what_they_belong_to(op, dtype):
    leaves, function = split(op, *arguments(op, dtype))
    grads = torch.autograd.grad(function(*leaves).float().sum(), leaves)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    assert all(g.shape == leaf.shape and g.isfinite().all() for g, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("samples", [1, None])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_loss_may_be_scaled_and_gone_through_twice(reduction, samples):
    (pred, t, rows), kwargs = arguments("weighted_loss")
    pred, t, *tensors = (x[:samples] for x in (pred, t, *kwargs.values()))
    args, kwargs = (pred, t, rows), dict(zip(kwargs, tensors, strict=True))
    pred.requires_grad_()
    loss = ddpm_fast.ops.weighted_loss(*args, **kwargs, reduction=reduction)
    total = loss.sum() * 0.5
    (first,) = torch.autograd.grad(total, pred, retain_graph=True)
    (second,) = torch.autograd.grad(total, pred, retain_graph=True)
    (whole,) = torch.autograd.grad(loss.sum(), pred)
    assert torch.equal(first, second)
    torch.testing.assert_close(2 * first, whole)


def test_a_gradient_accumulated_onto_the_one_of_the_loss_leaves_it_alone():
    args, kwargs = arguments("weighted_loss")
    pred = args[0].requires_grad_()
    loss = ddpm_fast.ops.weighted_loss(*args, **kwargs, reduction="mean")
    loss.backward(retain_graph=True)
    once = pred.grad.clone()
    loss.backward()
    torch.testing.assert_close(pred.grad, 2 * once)


def test_the_loss_is_differentiable_by_its_target_too():
    args, kwargs = arguments("weighted_loss")
    kwargs["x_start"].requires_grad_()
    ddpm_fast.ops.weighted_loss(*args, **kwargs).sum().backward()
    assert kwargs["x_start"].grad.abs().max() > 0


def test_given_noise_has_a_gradient_too():
    args, _ = arguments("q_sample", torch.float64)
    noise = torch.randn_like(args[0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: call("q_sample", args, {"noise": z}), noise)


def test_group_norm_keeps_its_input_and_statistics_alone():
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ddpm_fast.ops.group_norm_silu(x, weight, bias, 4)
    own = {x.data_ptr(), weight.data_ptr(), bias.data_ptr()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 2 * 2 * 4 * 4  # mean and rstd, (N, groups)
