"""Higher derivatives, forward mode and the transforms of torch.func: those of float64, to rounding, for every op."""

import pytest
import torch
from calls import OPS, arguments, split
from torch.autograd import forward_ad

from ddpm_fast import ops
from ddpm_fast.ops.noise import noise_of

# PyTorch compiles decompositions for forward mode when it first needs them
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# What a derivative may be off by, relative to its largest element. Inputs are the same numbers in every dtype. A
# bfloat16 result is rounded at each of the at most three passes that make it (2^-8 each, of terms that may cancel to a
# quarter); float32 sums at most 120 terms of 2^-24 one after the other, three times.
BOUND = {torch.float32: 3 * 120 * 2.0**-24, torch.bfloat16: 3 * 4 * 2.0**-8, torch.float64: 1e-12}


def with_noise(op, dtype):
    """A call with the noise of its keys in their place: the same numbers in every dtype and in every transform."""
    args, kwargs = arguments(op, dtype)
    if "keys" in kwargs:
        shape = args[0].shape
        kwargs["noise"] = noise_of(kwargs.pop("keys"), shape).bfloat16().to(dtype)
    return args, kwargs


def directions(leaves, seed):
    """A vector for each leaf, the same numbers in every dtype."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g).bfloat16().to(x.dtype) for x in leaves]


def inner(xs, ys):
    return sum((x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True))


def loss_of(function):
    """A curved function of the result, so that second derivatives are not zero where the op is linear."""
    return lambda *leaves: function(*leaves).double().square().sum()


def gradient_of_gradient(function, leaves):
    loss = loss_of(function)
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(inner(first, directions(leaves, 1)), leaves)


def forward_mode(function, leaves):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), d) for x, d in zip(leaves, directions(leaves, 2), strict=True)]
        return [forward_ad.unpack_dual(function(*duals)).tangent]


def jvp(function, leaves):
    leaves = tuple(x.detach() for x in leaves)
    return [torch.func.jvp(function, leaves, tuple(directions(leaves, 2)))[1]]


def jvp_of_vjp(function, leaves):
    leaves = tuple(x.detach() for x in leaves)
    gradient = torch.func.grad(loss_of(function), argnums=tuple(range(len(leaves))))
    return torch.func.jvp(gradient, leaves, tuple(directions(leaves, 1)))[1]


def gradient_by_transform(function, leaves):
    leaves = [x.detach() for x in leaves]
    return torch.func.grad(loss_of(function), argnums=tuple(range(len(leaves))))(*leaves)


def jacobian(function, leaves):
    return [torch.func.jacrev(lambda x: function(x, *leaves[1:]).flatten()[:5])(leaves[0].detach())]


def mapped(function, leaves):
    stacked = [torch.stack([x.detach(), d]) for x, d in zip(leaves, directions(leaves, 3), strict=True)]
    return [torch.vmap(function)(*stacked)]


def mapped_over_gradients(function, leaves):
    result = function(*leaves)
    weights = torch.stack([torch.ones_like(result), torch.full_like(result, 0.5)])
    return torch.autograd.grad(result, leaves, weights, is_grads_batched=True)


WAYS = (
    gradient_of_gradient,
    forward_mode,
    jvp,
    jvp_of_vjp,
    gradient_by_transform,
    jacobian,
    mapped,
    mapped_over_gradients,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_every_kind_are_those_of_float64(op, way, dtype):
    rounded, places, exact = (split(op, *with_noise(op, d)) for d in (torch.bfloat16, dtype, torch.float64))
    leaves = [x.detach().to(y.dtype).requires_grad_() for x, y in zip(rounded[0], places[0], strict=True)]
    truths = [x.detach().double().requires_grad_() for x in leaves]
    for value, truth in zip(way(places[1], leaves), way(exact[1], truths), strict=True):
        error = (value.double() - truth).abs().max()
        assert error <= BOUND[dtype] * truth.abs().max().clamp(min=1e-3), error / truth.abs().max()


def test_a_hessian_is_the_second_derivative():
    (pred, t, rows), _ = arguments("weighted_loss")
    pred, t = pred[:1, :1, :2, :2].contiguous(), t[:1]
    hessian = torch.func.hessian(lambda p: ops.weighted_loss(p, t, rows, noise=torch.zeros_like(p)).sum())(pred)
    weight = rows[t[0], 2]
    torch.testing.assert_close(hessian.view(4, 4), torch.eye(4) * 2 * weight / 4)


def test_noise_can_be_mapped():
    keys, data = torch.arange(12).view(3, 2, 2), torch.arange(6).view(3, 2)
    assert torch.equal(torch.vmap(ops.fold_in)(keys, data)[1], ops.fold_in(keys[1], data[1]))
    mapped = torch.vmap(lambda k: ops.normal(k, 5))(keys)
    torch.testing.assert_close(mapped[2], ops.normal(keys[2], 5), rtol=0, atol=1e-5)


def test_a_step_in_place_inside_a_transform_is_an_error():
    (x, pred, step, rows), kwargs = arguments("reverse_step")
    out = ops.ReverseStep(x.clone(), None, None)
    with pytest.raises(ValueError, match=r"outside the transforms of torch\.func"):
        torch.func.jvp(lambda p: ops.reverse_step(x, p, step, rows, **kwargs, out=out).x, (pred,), (pred,))
