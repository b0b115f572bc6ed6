"""Each schedule against a formula written another way, and the forward process against its own single steps."""

import math

import numpy as np
import pytest
import torch

from ddpm_fast import schedules

# Float64 rounding: a product of T = 1000 factors, each off by half an eps, twice (1 - beta, and the product).
TOLERANCE = 1000 * 2 * np.finfo(np.float64).eps


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


EXPECTED = {
    "linear": lambda T: np.linspace(0.1 / T, 20 / T, T),
    "quadratic": lambda T: np.linspace(1e-4**0.5, 0.02**0.5, T) ** 2,
    "sigmoid_beta": lambda T: sigmoid(np.linspace(-6, 6, T)) * (0.02 - 1e-4) + 1e-4,
    "constant": lambda T: np.full(T, 0.02),
    "jsd": lambda T: np.minimum(1 / np.linspace(T, 1, T), 0.999),
    "warmup10": lambda T: np.concatenate([np.linspace(1e-4, 0.02, T // 10), np.full(T - T // 10, 0.02)]),
    "warmup50": lambda T: np.concatenate([np.linspace(1e-4, 0.02, T // 2), np.full(T - T // 2, 0.02)]),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("timesteps", [1000, 50])
def test_betas_follow_their_formula(name, timesteps):
    betas = schedules.make(name, timesteps).betas
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas.numpy(), EXPECTED[name](timesteps), rtol=TOLERANCE)


def test_cosine_and_sigmoid_follow_their_formula_for_abar():
    T, t = 1000, np.arange(1, 1000)  # the last beta is clipped
    cosine = schedules.make("cosine", T).alphas_cumprod.numpy()[:-1]
    f = lambda t: np.cos((t / T + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    np.testing.assert_allclose(cosine, f(t) / f(0), rtol=TOLERANCE)
    for start, end, tau in [(-3, 3, 1.0), (0, 3, 0.7)]:
        sig = schedules.make("sigmoid", T, start=start, end=end, tau=tau).alphas_cumprod.numpy()[:-1]
        g = lambda t: sigmoid((t / T * (end - start) + start) / tau)  # noqa: B023, E731
        # The difference of two sigmoids near one another at the end: absolute, not relative, rounding.
        np.testing.assert_allclose(sig, (g(T) - g(t)) / (g(T) - g(0)), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_many_single_steps_are_the_closed_form(name):
    """q(x_t | x_{t-1}) iterated: the scale and the variance of x_t, step by step."""
    s = schedules.make(name, 1000)
    scale, variance = 1.0, 0.0
    for t, beta in enumerate(s.betas.tolist()):
        scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
        assert s.sqrt_alphas_cumprod[t].item() == pytest.approx(scale, rel=TOLERANCE)
        assert s.sqrt_one_minus_alphas_cumprod[t].item() ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_posterior_is_bayes_rule(name):
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised: precisions add."""
    s = schedules.make(name, 1000)
    x_start, x_t = 0.7, -1.3
    t = torch.arange(1, 1000)
    prior_mean, prior_variance = s.alphas_cumprod[t - 1].sqrt() * x_start, 1 - s.alphas_cumprod[t - 1]
    likelihood_precision = (1 - s.betas[t]) / s.betas[t]  # of x_{t-1}, in x_t = sqrt(1 - beta) x_{t-1} + ...
    precision = 1 / prior_variance + likelihood_precision
    mean = (prior_mean / prior_variance + x_t * (1 - s.betas[t]).sqrt() / s.betas[t]) / precision
    torch.testing.assert_close(s.posterior_variance[t], 1 / precision, rtol=1e-9, atol=0)
    found = s.posterior_mean_coef1[t] * x_start + s.posterior_mean_coef2[t] * x_t
    torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-12)
    assert s.posterior_variance[0] == 0
    assert s.posterior_mean_coef1[0] == pytest.approx(1)
    assert s.posterior_mean_coef2[0] == 0


@pytest.mark.parametrize("timesteps", [15, 20])
def test_linear_with_too_few_timesteps_is_refused_by_name(timesteps):
    with pytest.raises(ValueError, match=rf"'linear' with {timesteps} timesteps has beta = .* \(0, 1\)"):
        schedules.make("linear", timesteps)
    assert len(schedules.make("linear", 21)) == 21


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, math.nan], "beta = nan at t = 1"),
        ([0.0, 0.1], "beta = 0 at t = 0"),
        ([0.1, 1.0], "beta = 1 at t = 1"),
        ([[0.1, 0.2]], r"shape \(timesteps,\)"),
        ([], r"shape \(timesteps,\)"),
    ],
)
def test_betas_of_ones_own_are_checked(betas, message):
    with pytest.raises(ValueError, match=message):
        schedules.NoiseSchedule(betas)


def test_unknown_names_and_arguments_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="unknown beta_schedule 'liner'; there are linear, quadratic"):
        schedules.make("liner", 1000)
    with pytest.raises(ValueError, match="'linear' has no argument 'tau'; it takes beta_start, beta_end"):
        schedules.make("linear", 1000, tau=1)
    with pytest.raises(ValueError, match="timesteps must be an integer"):
        schedules.make("linear", 1000.0)
