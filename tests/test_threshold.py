"""Dynamic thresholding. Saharia et al. (2022), sec. 2.3."""

import pytest
import torch
from small_diffusion import Net, make

from ddpm_fast import noise
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.threshold import DynamicThreshold


def with_large_predictions(**arguments):
    """A diffusion whose x0_hat leaves [-1, 1] by far, by a different amount in each sample."""
    diffusion = make(**arguments).eval()
    with torch.no_grad():
        diffusion.model.mix.weight.mul_(3)
    return diffusion


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [True, (-1.05, 1.05)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_given_the_scaled_x0_hat(sampler, bounds, dtype):
    diffusion = with_large_predictions(clip_denoised=bounds).to(dtype)
    table, b, quantile = diffusion.step_table(sampler, 7), 1 if bounds is True else 1.05, 0.95
    x = noise.gaussian((3, 2, 4, 6), seed=4, dtype=dtype)
    x_start, expected, guesses, scaled = torch.zeros_like(x), [x], [], 0
    for k in range(7):
        u, w, A, B, C, sigma = table.rows[k].to(dtype)
        with torch.no_grad():
            guess = u * x + w * diffusion.model(x, table.t[k].expand(3))
        s = torch.quantile(guess.abs().flatten(1), quantile, dim=1).clamp(min=b).view(3, 1, 1, 1)
        scaled += int((s > b).sum())
        guess = guess.clamp(-s, s) * b / s
        x = A * x + B * guess + C * x_start + sigma * noise.gaussian(x.shape, seed=4, stream=k + 1, dtype=dtype)
        x_start = guess
        expected.append(x)
        guesses.append(guess)
    assert 0 < scaled < 3 * 7  # some are scaled, and some are not
    run = diffusion.sample_progressive(3, sampler=sampler, steps=7, seed=4, dynamic_threshold=quantile)
    states = list(run)
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-11}
    torch.testing.assert_close(torch.stack([s.x for s in states]), (torch.stack(expected) + 1) / 2, **close)
    torch.testing.assert_close(torch.stack([s.x_start for s in states[1:]]), (torch.stack(guesses) + 1) / 2, **close)
    last = diffusion.sample(3, sampler=sampler, steps=7, seed=4, dynamic_threshold=quantile)
    torch.testing.assert_close(last, states[-1].x, rtol=0, atol=0)
    one = diffusion.sample(1, sampler=sampler, steps=7, seed=4, sample_offset=2, dynamic_threshold=quantile)
    torch.testing.assert_close(one, last[2:], **close)


class WithVariance(Net):
    """Predicts v of the variance too."""

    def forward(self, x, t):
        return torch.cat([super().forward(x, t), x.tanh()], dim=1)


@pytest.mark.parametrize(
    "how", [{"sampler": "dpmpp_2m", "steps": 5}, {"variance": "learned_range", "sampler": "ddpm", "steps": 5}], ids=str
)
def test_small_predictions_are_not_scaled(how):
    variance = how.pop("variance", "posterior")
    diffusion = make(objective="pred_x0", variance=variance)
    diffusion.model = Net() if variance == "posterior" else WithVariance()
    with torch.no_grad():
        diffusion.model.mix.weight.mul_(0.1)
    expected = diffusion.sample(3, seed=1, **how)
    assert torch.equal(diffusion.sample(3, seed=1, dynamic_threshold=0.995, **how), expected)


@pytest.mark.parametrize("quantile", [0.001, 0.5, 0.77, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 2, 48, 101])
def test_the_quantile_is_pytorchs(quantile, size):
    values = torch.rand(3, size, generator=torch.Generator().manual_seed(0))
    threshold = DynamicThreshold(quantile, (-1.0, 1.0))
    torch.testing.assert_close(threshold._quantiles(values), torch.quantile(values, quantile, dim=1))


@pytest.mark.parametrize(
    ("arguments", "threshold", "message"),
    [
        ({}, 0, "a quantile, above 0 and up to 1; got 0"),
        ({}, 99.5, "a quantile, above 0 and up to 1; got 99.5"),
        ({"clip_denoised": False}, 0.995, "symmetric bounds; got clip_denoised of None"),
        ({"clip_denoised": (0.0, 1.0)}, 0.995, r"symmetric bounds; got clip_denoised of \(0.0, 1.0\)"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused(arguments, threshold, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments).sample(2, dynamic_threshold=threshold)


def test_a_subclass_with_methods_of_its_own_is_refused():
    class Own(type(make())):
        def model_predictions(self, *args, **kwargs):
            return super().model_predictions(*args, **kwargs)

    diffusion = Own(make().model, image_size=(4, 6), timesteps=20, beta_schedule="cosine")
    with pytest.raises(ValueError, match="dynamic_threshold needs the methods of GaussianDiffusion"):
        diffusion.sample(2, dynamic_threshold=0.995)
