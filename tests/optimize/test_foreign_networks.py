"""Optimised networks whose layers are of other classes, are called by parts, or are moved by hooks."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import optimize, restore

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fused_in_training")]


class OwnLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class NormalisedConv(nn.Module):
    """A convolution whose filters have unit norm, as in Karras et al. (2023)."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, 3, 3))

    def forward(self, x):
        return F.conv2d(x, F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight), padding="same")


class Fourier(nn.Module):
    """Random frequencies of the noise level, (N, 1), as in k-diffusion."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("weight", 16 * torch.randn(features // 2, 1))

    def forward(self, t):
        f = t @ self.weight.T
        return torch.cat([f.cos(), f.sin()], dim=-1)


class Volumes(nn.Module):
    """The structure of OpenAI's UNetModel with dims=1, 2 or 3, with other people's layers."""

    def __init__(self, dims, repeated=False):
        super().__init__()
        convolution = getattr(nn, f"Conv{dims}d")
        self.dims, self.repeated = dims, repeated
        self.fourier = Fourier(8)
        self.time = nn.Sequential(OwnLinear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.first = convolution(2, 8, 3, padding=1)
        self.body = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), convolution(8, 8, 3, stride=2, padding=1))
        self.own = NormalisedConv(8, 8) if dims == 2 else nn.Identity()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.projection = nn.Linear(8, 8)
        self.up = getattr(nn, f"ConvTranspose{dims}d")(8, 2, 4, stride=2, padding=1)

    def block(self, h):
        return self.body(h.float())  # in float32 on purpose

    def forward(self, x, t):
        time = self.time(self.fourier(t[:, None].float().log()))
        h = self.first(x) + time.view(*time.shape, *[1] * self.dims)
        h = self.own(checkpoint(self.block, h, use_reentrant=False) if self.repeated else self.block(h))
        tokens = torch.cat([h.flatten(2).transpose(1, 2), self.token.expand(len(x), 1, 8)], dim=1)
        q = F.linear(tokens.float(), self.projection.weight, self.projection.bias)  # another module's weight
        attended = F.scaled_dot_product_attention(q, tokens, tokens)[:, :-1]
        return self.up(h + attended.transpose(1, 2).reshape(h.shape))


def inputs(dims):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, *[8] * dims, generator=generator), torch.tensor([301, 999])


def relative(a, b):
    return ((a.float() - b).norm() / b.norm()).item()


def gradients(model, *args):
    y = model(*args)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [*model.parameters()])]


@pytest.mark.parametrize("repeated", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_of_any_class_compute_in_bfloat16(dims, repeated):
    model = Volumes(dims, repeated)
    expected = gradients(model, *inputs(dims))
    optimize(model, torch.bfloat16)
    found = gradients(model, *inputs(dims))
    assert found[0].dtype == torch.float32
    # Eight layers of independent roundings to 2^-9 forwards, and as many backwards.
    assert relative(found[0], expected[0]) < 8 * 2**-9
    total = sum((a.float() - b).square().sum() for a, b in zip(found[1:], expected[1:], strict=True))
    assert total**0.5 < 16 * 2**-9 * sum(b.square().sum() for b in expected[1:]) ** 0.5


def test_tables_of_modules_without_parameters_keep_their_dtype():
    """Rounded to bfloat16, a frequency of 40 is off by up to 0.1."""
    model = Volumes(1)
    table = model.fourier.weight.clone()
    optimize(model, torch.bfloat16)
    assert torch.equal(model.fourier.weight, table)
    assert model.token.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "use",
    [
        lambda h, gate: F.silu(h * gate),
        lambda h, gate: torch.sigmoid(h * gate),
        lambda h, gate: (h * gate) * gate,
        lambda h, gate: (h * gate).mean(),
        lambda h, gate: F.silu(gate * h) + h,
    ],
)
def test_a_gate_without_a_shift(use):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x):
            return use(self.norm(x), 0.5 + torch.sigmoid(x.mean((2, 3), keepdim=True)))

    plain, x = Gated(), torch.randn(2, 8, 6, 6)
    fast = optimize(copy.deepcopy(plain), torch.float32)
    torch.testing.assert_close(gradients(fast, x), gradients(plain, x), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def autoencoder():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=4, latent_channels=2).eval()


def test_an_autoencoder_is_called_by_its_parts(autoencoder):
    model = copy.deepcopy(autoencoder)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model.encode(x).latent_dist.mean, model.decode(x[:, :2]).sample
        optimize(model, torch.bfloat16)
        found = model.encode(x).latent_dist.mean, model.decode(x[:, :2]).sample
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            assert 0 < relative(a, b) < 20 * 2**-9  # of some twenty layers


@pytest.mark.parametrize("hooked_first", [False, True])
def test_a_forward_that_hooks_replaced(hooked_first):
    accelerate = pytest.importorskip("accelerate")
    model = Volumes(2)
    with torch.no_grad():
        expected = model(*inputs(2))
        for step in (1, 0) if hooked_first else (0, 1):
            if step:
                accelerate.hooks.add_hook_to_module(
                    model, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
                )
            else:
                optimize(model, torch.float32)
        torch.testing.assert_close(model(*inputs(2)), expected, rtol=1e-4, atol=1e-4)
        restore(model)
        torch.testing.assert_close(model(*inputs(2)), expected)


def test_an_optimised_model_can_be_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model, (x, _) = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), NormalisedConv(8, 2)), inputs(2)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(optimize(model, torch.bfloat16), execution_device=torch.device("cpu"))
        for _ in range(2):
            assert relative(model(x), expected) < 4 * 2**-9
    with pytest.raises(ValueError, match="remove the hooks that offload them"):
        restore(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    restore(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_wrapper_is_known_by_its_parameters_being_those_of_its_model():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Volumes(1)
            self.register_buffer("sigmas", torch.rand(10))

        def forward(self, x, t):
            return self.model(x * self.sigmas[0], t)

    wrapper = optimize(Denoiser(), torch.bfloat16)
    assert type(wrapper) is Denoiser
    assert wrapper.sigmas.dtype == torch.float32
    assert wrapper.model.first.weight.dtype == torch.bfloat16
    restore(wrapper)
    assert wrapper.model.first.weight.dtype == torch.float32
