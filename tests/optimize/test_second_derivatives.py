"""Second derivatives of optimised networks are those of the plain ones."""

import copy

import pytest
import torch
from optimized_networks import NETWORKS, OpenAIBlock, inputs, make, tensor_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm_fast import optimize

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fused_in_training")]


class ScaleShift(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.time, self.conv = nn.GroupNorm(2, 8), nn.Linear(8, 16), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        scale, shift = self.time(x.mean((2, 3)))[..., None, None].chunk(2, dim=1)
        return self.conv(nn.functional.silu(self.norm(x) * (1 + scale) + shift))


class WithEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = OpenAIBlock(8, 16, 8, nn.SiLU, scale_shift=True).eval()

    def forward(self, x):
        return self.block(x, x.mean((2, 3)))


LAYERS = {
    "conv": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, stride=2)),
    "linear": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
    "norm": lambda: nn.Sequential(nn.GroupNorm(2, 8)),
    "norm-silu": lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()),
    "conv-norm-silu-conv": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)
    ),
    "scale-shift": ScaleShift,
    "openai-block": WithEmbedding,
}


def gradient_penalty(model, x, *rest):
    """The derivatives of |d loss / dx|^2 by the weights and by x."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tensor_of(model(x, *rest)).sin().sum(), x, create_graph=True)
    return differentiate(gradient.square().sum(), [x, *model.parameters()])


def hessian_vector_product(model, x, *rest):
    weights = [*model.parameters()]
    gradient = torch.autograd.grad(tensor_of(model(x, *rest)).sin().sum(), weights, create_graph=True)
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(w.shape, generator=generator) for w in weights]
    return differentiate(sum((g * v).sum() for g, v in zip(gradient, vectors, strict=True)), weights)


def differentiate(value, by):
    """None, for what the value does not depend on, is as good as 0."""
    found = torch.autograd.grad(value, by, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(b) if g is None else g for g, b in zip(found, by, strict=True))]


def check(derivatives, plain, *given):
    fast = optimize(copy.deepcopy(plain), torch.float32)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        expected, found = (derivatives(model, *given) for model in (plain, fast))
    largest = float(max(v.abs().max() for v in expected[1:]))
    assert largest > 0
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-5 * largest)


DERIVATIVES = pytest.mark.parametrize(
    "derivatives", [gradient_penalty, hessian_vector_product], ids=lambda f: f.__name__
)


@DERIVATIVES
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_of_layers(name, derivatives):
    torch.manual_seed(0)
    check(derivatives, LAYERS[name](), torch.randn(2, 8, 5, 5))


@DERIVATIVES
@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivatives_of_networks(name, derivatives):
    check(derivatives, make(name), *inputs())
