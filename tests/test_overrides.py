"""Methods that a subclass overrides are called where denoising_diffusion_pytorch calls them, with the same results."""

import collections
import random

import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion

SAMPLING = [
    "p_sample", "p_mean_variance", "model_predictions", "q_posterior", "predict_start_from_noise",
    "predict_noise_from_start", "predict_start_from_v", "p_sample_loop", "ddim_sample",
]  # fmt: skip
TRAINING = ["q_sample", "predict_v", "p_losses"]


class Net(nn.Module):
    channels, out_dim, random_or_learned_sinusoidal_cond = 2, 2, False

    def __init__(self, self_condition=False):
        super().__init__()
        self.self_condition = self_condition
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4 if self_condition else 2, 2, 3, padding=1)

    def forward(self, x, t, x_self_cond=None):
        if self.self_condition:
            x = torch.cat([x, torch.zeros_like(x) if x_self_cond is None else x_self_cond], dim=1)
        return self.conv(x).tanh() + t[:, None, None, None] / 20


def counting(cls, name):
    """A subclass that counts the calls of one method, and changes nothing."""

    def method(self, *args, **kwargs):
        self.calls[name] += 1
        return getattr(super(subclass, self), name)(*args, **kwargs)

    subclass = type("Counting", (cls,), {name: method, "calls": collections.Counter()})
    return subclass


def run(cls, objective, steps, self_condition=False, **how):
    diffusion = cls(
        Net(self_condition), image_size=8, timesteps=12, sampling_timesteps=steps, objective=objective,
        beta_schedule="cosine", **how,
    )  # fmt: skip
    torch.manual_seed(1)
    random.seed(1)
    images = torch.rand(3, 2, 8, 8)
    losses = [diffusion(images) for _ in range(4)]
    samples = diffusion.sample(batch_size=2)
    states = diffusion.sample(batch_size=2, return_all_timesteps=True)
    return diffusion, torch.stack(losses).detach(), samples.detach(), states.detach()


@pytest.mark.parametrize("steps", [12, 5], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("name", SAMPLING + TRAINING)
def test_an_overridden_method_is_called_as_often_as_in_the_peer_and_changes_nothing(name, objective, steps):
    package = pytest.importorskip("denoising_diffusion_pytorch", exc_type=ImportError)
    theirs, *expected = run(counting(package.GaussianDiffusion, name), objective, steps)
    ours, *found = run(counting(GaussianDiffusion, name), objective, steps, rng="torch")
    assert ours.calls[name] == theirs.calls[name]
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("steps", [12, 5], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("name", SAMPLING + TRAINING)
def test_an_overridden_method_draws_the_noise_of_the_fused_path(name, steps):
    """Keyed noise: the images and losses of a seed stay what they are."""

    def results(cls):
        diffusion = cls(Net(), image_size=8, timesteps=12, sampling_timesteps=steps, beta_schedule="cosine").eval()
        x, t = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 5, 11])
        return diffusion(x, times=t, seed=3), diffusion.sample(2, seed=4), diffusion.sample(1, seed=4, sample_offset=1)

    for value, truth in zip(results(counting(GaussianDiffusion, name)), results(GaussianDiffusion), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=2e-5)


def test_self_conditioning_tosses_the_coin_of_the_peer():
    package = pytest.importorskip("denoising_diffusion_pytorch", exc_type=ImportError)
    _, *expected = run(package.GaussianDiffusion, "pred_v", 12, self_condition=True)
    _, *found = run(GaussianDiffusion, "pred_v", 12, self_condition=True, rng="torch")
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=2e-5)


def test_an_overridden_loss_is_given_no_keyword_that_it_does_not_know():
    class Own(GaussianDiffusion):
        def p_losses(self, x_start, t, noise=None, weight=1.0):
            assert x_start.min() < 0  # normalised
            noise = torch.randn_like(x_start) if noise is None else noise
            return weight * (self.model(self.q_sample(x_start, t, noise), t) - noise).square().mean()

    diffusion, x = Own(Net(), image_size=8, timesteps=12, beta_schedule="cosine"), torch.rand(3, 2, 8, 8)
    noise, t = torch.randn(3, 2, 8, 8), torch.tensor([0, 5, 11])
    once = diffusion(x, noise, times=t)
    torch.testing.assert_close(diffusion(x, noise, times=t, weight=2.0), 2 * once)
    diffusion((x * 255).byte(), seed=3, sample_offset=5).backward()


def test_what_an_overridden_method_changes_reaches_the_samples():
    class Bright(GaussianDiffusion):
        def model_predictions(self, *args, **kwargs):
            eps, x_start = super().model_predictions(*args, **kwargs)
            return eps, torch.ones_like(x_start)

    for steps in (12, 5):
        diffusion = Bright(Net(), image_size=8, timesteps=12, sampling_timesteps=steps, beta_schedule="cosine")
        assert torch.equal(diffusion.sample(2), torch.ones(2, 2, 8, 8))
        assert torch.equal(diffusion.sample(2, sampler="dpmpp_2m", steps=4), torch.ones(2, 2, 8, 8))


def test_a_method_replaced_on_the_object_is_called():
    diffusion, seen = GaussianDiffusion(Net(), image_size=8, timesteps=12, beta_schedule="cosine").eval(), []
    original = diffusion.p_sample
    diffusion.p_sample = lambda x, t, x_self_cond=None: seen.append(t) or original(x, t, x_self_cond)
    diffusion.sample(1, seed=0)
    assert seen == list(reversed(range(12)))


def test_what_a_method_assigns_while_sampling_stays_with_the_object():
    class Remembering(GaussianDiffusion):
        def p_sample(self, x, t, x_self_cond=None):
            self.last = t
            return super().p_sample(x, t, x_self_cond)

    diffusion = Remembering(Net(), image_size=8, timesteps=12, beta_schedule="cosine").train()
    diffusion.sample(1)
    assert diffusion.last == 0
