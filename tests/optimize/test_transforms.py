"""torch.func and forward-mode differentiation of optimised networks."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ddpm_fast import optimize


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.time, self.conv_out = nn.Linear(4, 16), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        scale, shift = self.time(x.mean((1, 3))).view(len(x), 16, 1, 1).chunk(2, dim=1)
        return self.conv_out(nn.functional.silu(self.norm(self.conv_in(x)) * (1 + scale) + shift))


def jvp(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


def dual(model, x):
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(x, torch.ones_like(x)))
        return [v.clone() for v in forward_ad.unpack_dual(y)]


def per_sample_gradients(model, x):
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)


def vmap(model, x):
    with torch.no_grad():
        return torch.func.vmap(lambda image: model(image[None]))(x)


def other_weights(model, x):
    parameters = {k: 2 * p.detach() for k, p in model.named_parameters()}
    with torch.no_grad():
        return torch.func.functional_call(model, parameters, (x,)), model(x)


def jacobian(model, x):
    return torch.func.jacrev(lambda image: model(image[None]))(x[0])


def hessian(model, x):
    return torch.func.hessian(lambda row: model(torch.cat([row, x[:1, :, 1:]], dim=2)).square().sum())(x[:1, :, :1])


def second_derivatives(model, x):
    return torch.func.jvp(torch.func.grad(lambda x: model(x).square().sum()), (x,), (torch.ones_like(x),))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "transform",
    [jvp, dual, per_sample_gradients, vmap, other_weights, jacobian, hessian, second_derivatives],
    ids=lambda f: f.__name__,
)
def test_transforms_of_an_optimised_network_are_those_of_the_plain_one(transform):
    plain, x = Block(), torch.randn(2, 3, 4, 4)
    fast = optimize(copy.deepcopy(plain), torch.float32)
    torch.testing.assert_close(transform(fast, x), transform(plain, x), rtol=1e-3, atol=1e-4)
