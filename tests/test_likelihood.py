r"""The variational bound: its terms against closed forms, and its estimates.

Where x_0 ~ N(mu, c I), x_0 given x_t is normal too. With that network and the best variances, the reverse process is
the forward process backwards but for x_T, so that the bound's mean over data and noise is

    E[-log q(x_0)] + KL(q(x_T) || N(0, I)).

Every term is quadratic in (x_0, eps), so that its mean over normals is the mean over 4 D points, sqrt(2 D) times the
unit vectors and their negatives: nothing is left to chance.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from small_diffusion import Net, TwoHalves, images, make
from torch import nn
from torch.distributions import Normal, kl_divergence

from ddpm_fast import GaussianDiffusion, noise, schedules
from ddpm_fast.likelihood import _Strata, prior_term, reconstruction_term, transition_term
from ddpm_fast.parameterization import OBJECTIVES, x_start_rows
from ddpm_fast.variances import LEARNED_VARIANCES, VARIANCES

MEAN, SPREAD = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64), 0.2  # of x_0: mu and c


class BestDenoiser(nn.Module):
    """E[x_0 | x_t] of the data above, in the parameterization of an objective."""

    channels = 3

    def __init__(self, schedule, objective):
        super().__init__()
        a = schedule.sqrt_alphas_cumprod
        self.gain = a * SPREAD / (a**2 * SPREAD + 1 - a**2)
        self.offset = (1 - a * self.gain)[:, None] * MEAN
        self.u, self.w = x_start_rows(schedule, objective)

    def forward(self, x, t):
        return (self.gain[t, None] * x + self.offset[t] - self.u[t, None] * x) / self.w[t, None]


def best_variance(schedule):
    """The posterior's, plus c0^2 times the variance of x_0 given x_t."""
    a2 = schedule.alphas_cumprod
    of_x_start = SPREAD * (1 - a2) / (a2 * SPREAD + 1 - a2)
    return schedule.posterior_variance + schedule.posterior_mean_coef1**2 * of_x_start


def gaussian_case(name="cosine", timesteps=30, objective="pred_v", **arguments):
    arguments = {"variance": "learnable", "loss_type": None, "zero_terminal_snr": False} | arguments
    schedule = schedules.make(name, timesteps)
    if arguments["zero_terminal_snr"]:
        schedule = schedule.with_zero_terminal_snr()
    diffusion = GaussianDiffusion(
        BestDenoiser(schedule, objective),
        image_size=(),
        channels=3,
        timesteps=timesteps,
        beta_schedule=name,
        objective=objective,
        auto_normalize=False,
        clip_denoised=False,
        loss_weight="uniform",
        **arguments,
    ).double()
    if diffusion.log_variance is not None:
        diffusion.log_variance.data = best_variance(diffusion.schedule).log()
    return diffusion


def points():
    """(x_0, eps), 12 of each, whose means of quadratic functions are those over the data and the noise."""
    both = torch.cat([torch.eye(6), -torch.eye(6)]).double() * math.sqrt(6)
    return MEAN + math.sqrt(SPREAD) * both[:, :3], both[:, 3:]


def mean_bound(diffusion):
    """The bound's mean over data and noise, in nats."""
    x_start, eps = points()
    terms = [prior_term(diffusion, x_start)]
    for t in range(diffusion.num_timesteps):
        times = torch.full((len(x_start),), t)
        x_t = diffusion.q_sample(x_start, times, eps)
        if t == 0:
            terms.append(reconstruction_term(diffusion, x_start, x_t))
        else:
            terms.append(transition_term(diffusion, x_start, x_t, times))
    return torch.stack(terms).sum(0).mean()


def closed_form(schedule):
    abar = schedule.alphas_cumprod[-1]
    spread, entropy = abar * SPREAD + 1 - abar, 3 / 2 * math.log(2 * math.pi * math.e * SPREAD)
    return entropy + 0.5 * (3 * (spread - 1 - spread.log()) + abar * MEAN.square().sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("name", "timesteps"), [("linear", 50), ("cosine", 30), ("jsd", 4), ("sigmoid", 1)])
def test_the_bound_of_the_best_network_is_the_closed_form(name, timesteps, objective):
    diffusion = gaussian_case(name, timesteps, objective)
    torch.testing.assert_close(mean_bound(diffusion).detach(), closed_form(diffusion.schedule), rtol=0, atol=1e-9)


@pytest.mark.parametrize("objective", ["pred_v", "pred_x0", "pred_mean"])
def test_the_bound_holds_with_a_terminal_snr_of_zero(objective):
    diffusion = gaussian_case(objective=objective, zero_terminal_snr=True)
    assert not prior_term(diffusion, points()[0]).any()
    torch.testing.assert_close(mean_bound(diffusion).detach(), closed_form(diffusion.schedule), rtol=0, atol=1e-9)


def test_other_variances_and_networks_have_a_larger_bound():
    least = mean_bound(gaussian_case()).item()
    for variance in VARIANCES:
        assert mean_bound(gaussian_case(variance=variance)) > least + 1e-3
    diffusion = gaussian_case()
    for change in (0.99, 1.01):
        diffusion.model.gain = gaussian_case().model.gain * change
        assert mean_bound(diffusion) > least
        diffusion.log_variance.data += math.log(change)
    assert mean_bound(diffusion) > least


def test_training_finds_the_best_variance_at_every_timestep():
    """By the loss `kl` through p_losses; with the mean over noise in each step, it ends where the gradient is 0."""
    diffusion = gaussian_case(loss_type="kl")
    best = best_variance(diffusion.schedule).log()
    diffusion.log_variance.data = diffusion.schedule.betas.log() - 1.0
    x_start, eps = (y.repeat(30, 1) for y in points())
    t = torch.arange(30).repeat_interleave(12)
    optimizer = torch.optim.LBFGS([diffusion.log_variance], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        found = diffusion.p_losses(x_start, t, eps)
        found.backward()
        return found

    optimizer.step(loss)
    torch.testing.assert_close(diffusion.log_variance.detach(), best, rtol=0, atol=1e-3)


def test_the_loss_kl_is_the_bound_without_its_constant_term_in_bits():
    """Its mean over timesteps, data and noise."""
    diffusion = gaussian_case(loss_type="kl")
    x_start, eps = (y.repeat(30, 1) for y in points())
    loss = diffusion.p_losses(x_start, torch.arange(30).repeat_interleave(12), eps)
    prior = prior_term(diffusion, points()[0]).mean()
    torch.testing.assert_close(loss, (mean_bound(diffusion) - prior) / (3 * math.log(2)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 29, 30])
def test_fewer_steps_have_the_best_variances_of_their_own(steps):
    """x_0 given x_t does not depend on the timestep that comes next."""
    diffusion = gaussian_case()
    table = diffusion.step_table("ddpm", steps)
    a2, a2_next = (diffusion.schedule.alphas_cumprod[t] for t in (table.t, table.t[1:]))
    a2_next = torch.cat([a2_next, torch.ones(1)])
    of_x_start = SPREAD * (1 - a2) / (a2 * SPREAD + 1 - a2)
    expected = (1 - a2 / a2_next) * (1 - a2_next) / (1 - a2) + table.B**2 * of_x_start
    torch.testing.assert_close(table.sigma[:-1] ** 2, expected[:-1], rtol=1e-9, atol=0)
    assert table.sigma[-1] == 0


def by_distributions(diffusion, x_start, x_t, t, x_hat, log_variance):
    """A term as the papers define it, by torch.distributions, in nats for each number of a sample."""
    schedule = diffusion.schedule
    q = Normal(
        schedule.posterior_mean_coef1[t] * x_start + schedule.posterior_mean_coef2[t] * x_t,
        schedule.posterior_variance[t].clamp(min=1e-30).sqrt(),
    )
    mean = schedule.posterior_mean_coef1[t] * x_hat + schedule.posterior_mean_coef2[t] * x_t
    p = Normal(mean, (0.5 * log_variance).exp())
    if t > 0:
        return kl_divergence(q, p)
    if diffusion.decoder == "gaussian":
        return -p.log_prob(x_start)
    upper = torch.where(x_start > 0.999, torch.inf, (x_start - mean + 1 / 255) / p.scale)
    lower = torch.where(x_start < -0.999, -torch.inf, (x_start - mean - 1 / 255) / p.scale)
    right = lower > 0  # where a difference of numbers near 1 would lose digits: the mass of the mirror image
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    mass = scipy.special.ndtr(upper.detach().numpy()) - scipy.special.ndtr(lower.detach().numpy())
    return -torch.from_numpy(mass).clamp(min=1e-12).log()


def log_variance_of(diffusion, t, v):
    schedule = diffusion.schedule
    first = t if t > 0 or diffusion.variance == "beta" else 1  # the posterior variance of t = 0 is 0
    low, high = schedule.posterior_variance[first].log(), schedule.betas[t].log()
    match diffusion.variance:
        case "posterior":
            return low
        case "beta":
            return high
        case "learned":
            return v
        case "learned_range":
            return low + (v + 1) / 2 * (high - low)
        case "learnable":
            return diffusion.log_variance[t]


class OneHalf(TwoHalves):
    def forward(self, x, t):
        return super().forward(x, t)[:, : self.channels]


def small(variance, **arguments):
    network = TwoHalves() if variance in LEARNED_VARIANCES else OneHalf()
    network.middle = -3.0 if variance == "learned" else 0.0
    sizes = {"image_size": (4, 6), "timesteps": 20, "beta_schedule": "cosine", "variance": variance}
    diffusion = GaussianDiffusion(network, **(sizes | arguments)).double()
    if diffusion.log_variance is not None:
        diffusion.log_variance.data += torch.linspace(-0.5, 0.5, 20)
    return diffusion


ALL_VARIANCES = (*VARIANCES, *LEARNED_VARIANCES, "learnable")


@pytest.mark.parametrize("decoder", ["discretized", "gaussian"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variance", ALL_VARIANCES)
def test_every_term_is_that_of_the_distributions(variance, objective, decoder):
    diffusion = small(variance, objective=objective, decoder=decoder, clip_denoised=True)
    x_start = (images() * 255).round().to(torch.uint8)
    found = diffusion.likelihood(x_start, seed=5)
    x_0, bits = diffusion.normalize(x_start), 1 / (2 * 4 * 6 * math.log(2))
    for t in range(20):
        times = torch.full((5,), t)
        eps = torch.cat([_noise(t, n, x_0[:1].shape) for n in range(5)])
        x_t = diffusion.q_sample(x_0, times, eps)
        pred, *v = diffusion.model(x_t, times).split(2, dim=1)
        u, w = (column[t] for column in x_start_rows(diffusion.schedule, objective))
        x_hat = (u * x_t + w * pred).clamp(-1, 1)
        log_variance = log_variance_of(diffusion, t, *(v or [None]))
        terms = by_distributions(diffusion, x_0, x_t, t, x_hat, log_variance).flatten(1).sum(1)
        # The narrow normal of the Gaussian decoder has the share e^-32 of the variance that it should not have.
        torch.testing.assert_close(found.vb[:, t], terms * bits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.x_start_mse[:, t], (x_hat - x_0).square().flatten(1).mean(1))
        implied = (x_t - diffusion.schedule.sqrt_alphas_cumprod[t] * x_hat) / (
            diffusion.schedule.sqrt_one_minus_alphas_cumprod[t]
        )
        torch.testing.assert_close(found.eps_mse[:, t], (implied - eps).square().flatten(1).mean(1))
    torch.testing.assert_close(found.total_bpd, found.prior_bpd + found.vb.sum(1))
    torch.testing.assert_close(found.total_nats * bits, found.total_bpd)
    assert not found.standard_error.any()


def _noise(t, n, shape):
    """eps of image n at timestep t."""
    keys = noise.fold_in(noise.sample_keys(1, seed=5, streams=noise.LIKELIHOOD, sample_offset=n), t)
    size = math.prod(shape)
    return noise.normal(keys, size).view(1, *shape[2:], shape[1]).permute(0, 3, 1, 2).double()


def test_a_toy_has_the_bits_that_numpy_and_scipy_give():
    """Two pixels, two timesteps, a learned range: every number written out in float64, in the paper's count of t."""
    betas = np.array([0.1, 0.5])
    abar_1, abar_2 = 0.9, 0.45
    x_0 = np.array([153, 51]) / 127.5 - 1
    diffusion = GaussianDiffusion(
        nn.Identity(), image_size=(), channels=2, beta_schedule=betas, objective="pred_x0", variance="learned_range"
    ).double()
    prediction = torch.tensor([[0.1, -0.5, 0.4, -0.2]]).double()  # x0_hat of both pixels, then v
    diffusion.model.forward = lambda x, t: prediction.expand(len(x), 4)
    found = diffusion.likelihood(torch.tensor([[153, 51]], dtype=torch.uint8), seed=3)

    x_hat, v = prediction[0, :2].numpy(), prediction[0, 2:].numpy()
    q_variance = 0.5 * (1 - abar_1) / (1 - abar_2)  # eq. 7; the lower bound of both timesteps
    # L_1: means differ by c0 (x_0 - x0_hat)
    log_p = (1 - v) / 2 * np.log(q_variance) + (1 + v) / 2 * np.log(0.5)
    c0 = np.sqrt(abar_1) * 0.5 / (1 - abar_2)
    kl = 0.5 * (log_p - np.log(q_variance) - 1 + (q_variance + (c0 * (x_0 - x_hat)) ** 2) / np.exp(log_p))
    # L_0: the mass of N(x0_hat, sigma_1^2) in a bin
    sigma = np.exp(((1 - v) / 2 * np.log(q_variance) + (1 + v) / 2 * np.log(0.1)) / 2)
    p = scipy.stats.norm(x_hat, sigma)
    decoder = -np.log(p.cdf(x_0 + 1 / 255) - p.cdf(x_0 - 1 / 255))
    prior = 0.5 * ((1 - abar_2) + abar_2 * x_0**2 - 1 - np.log(1 - abar_2))
    bits = np.array([prior.sum(), decoder.sum(), kl.sum()]) / (2 * np.log(2))
    np.testing.assert_allclose([found.prior_bpd.item(), *found.vb[0].tolist()], bits, rtol=1e-12)
    np.testing.assert_allclose(found.total_bpd.item(), bits.sum(), rtol=1e-12)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "posterior"), (1.0, "beta")])
def test_a_learned_range_ends_at_the_posterior_variance_and_at_beta(v, variance):
    class Fixed(Net):
        def forward(self, x, t):
            return torch.cat([super().forward(x, t), torch.full_like(x, v)], dim=1)

    arguments = {"image_size": (4, 6), "timesteps": 20, "beta_schedule": "cosine"}
    ranged = GaussianDiffusion(Fixed(), variance="learned_range", **arguments).double().eval()
    fixed = GaussianDiffusion(Net(), variance=variance, **arguments).double().eval()
    pixels = (images() * 255).round().to(torch.uint8)
    for name, found in vars(ranged.likelihood(pixels, seed=1)).items():
        torch.testing.assert_close(found, getattr(fixed.likelihood(pixels, seed=1), name), rtol=1e-12, atol=1e-12)
    for steps in (20, 6):
        samples = [d.sample(3, sampler="ddpm", steps=steps, seed=2) for d in (ranged, fixed)]
        torch.testing.assert_close(*samples, rtol=1e-12, atol=1e-12)
    x, t = images().double(), torch.tensor([0, 1, 7, 18, 19])
    for found, expected in zip(ranged.p_mean_variance(x, t), fixed.p_mean_variance(x, t), strict=True):
        if v > 0 or not torch.equal(found[:1], expected[:1]):  # at t = 0 the range has the variance of t = 1
            found, expected = (y.expand_as(x)[1 if v < 0 else 0 :] for y in (found, expected))
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-12, atol=1e-12)


def test_an_image_has_its_bound_in_any_batch_and_precision_of_the_network():
    diffusion = small("posterior").float()
    pixels = (images(6) * 255).round().to(torch.uint8)
    whole = diffusion.likelihood(pixels, seed=1, steps=9)
    for n in range(6):
        one = diffusion.likelihood(pixels[n : n + 1], seed=1, steps=9, sample_offset=n)
        assert torch.equal(one.t[0], whole.t[n])
        torch.testing.assert_close(one.vb[0], whole.vb[n], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(diffusion.likelihood(pixels / 255, seed=1, steps=9).vb, whole.vb, rtol=1e-4, atol=1e-6)

    seen = []
    diffusion.model.bfloat16().register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = diffusion.likelihood(pixels, seed=1)
    assert found.vb.dtype == torch.float32
    exact = small("posterior")
    exact.model.forward = lambda x, t: seen[t[0]].double()
    # Sums of 48 terms of float32 arithmetic, whose inputs are the same numbers.
    torch.testing.assert_close(found.vb.double(), exact.likelihood(pixels, seed=1).vb, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [3, 6, 9, 12, 20])
def test_chosen_timesteps_have_the_terms_that_all_have(steps):
    diffusion = small("learned_range")
    pixels = (images() * 255).round().to(torch.uint8)
    every, some = diffusion.likelihood(pixels, seed=1), diffusion.likelihood(pixels, seed=1, steps=steps)
    assert some.vb.shape == some.t.shape == (5, steps)
    assert (some.t[:, 0] == 0).all()
    assert (some.t.diff(dim=1) > 0).all()
    for name in ("vb", "x_start_mse", "eps_mse"):
        torch.testing.assert_close(getattr(some, name), getattr(every, name).gather(1, some.t))
    assert (some.standard_error > 0).all() == (steps < 20)


def test_the_estimate_and_its_variance_are_unbiased():
    """Over all choices of timesteps that there are, each as likely as the other."""
    terms = torch.tensor([[5.0, 3.0, 2.5, 1.0, 0.7, 0.9, 0.1, 0.3, 0.2]], dtype=torch.float64)
    for steps in (5, 6, 8):
        strata = _Strata(9, steps)
        choices = [itertools.combinations(r, m) for r, m in zip(strata.ranges, strata.draws, strict=True)]
        chosen = torch.tensor([list(itertools.chain(*c)) for c in itertools.product(*choices)])
        total, variance = strata.estimate(terms.expand(len(chosen), 9).gather(1, chosen))
        torch.testing.assert_close(total.mean(), terms.sum())
        torch.testing.assert_close(variance.mean(), total.var(correction=0))


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_timesteps_of_a_range_are_chosen_equally_often(rng):
    diffusion = make(rng=rng)
    strata, n = _Strata(20, 8), 5000
    chosen = strata.choose(n, diffusion.noise_source(diffusion.betas, 3))
    counts = torch.bincount(chosen.flatten(), minlength=20)
    for r, m in zip(strata.ranges, strata.draws, strict=True):
        share = m / len(r)
        error = math.sqrt(n * share * (1 - share))
        assert all(abs(counts[t] - n * share) <= 5 * error for t in r)


def test_images_between_the_levels_are_refused_by_the_discretized_decoder():
    with pytest.raises(ValueError, match="on 256 levels, and these lie between them; give uint8"):
        small("posterior").likelihood(images())
    assert small("posterior", decoder="gaussian").likelihood(images(), steps=3).total_bpd.isfinite().all()
    for steps in (2, 21, 5.0):
        with pytest.raises(ValueError, match=r"steps must be an integer in \[3, 21\)"):
            small("posterior").likelihood((images() * 255).to(torch.uint8), steps=steps)
    x = images().double()
    with pytest.raises(ValueError, match="transitions have t of at least 1"):
        transition_term(small("posterior"), x, x, torch.tensor([1, 2, 0, 3, 4]))
