r"""The strongest test of training and sampling: data that is Gaussian, whose best denoiser is known exactly.

For x_0 ~ N(mu, S), E[x_0 | x_t] = mu + a S (a^2 S + s^2 I)^-1 (x_t - a mu). With it as the model (in whatever
parameterization), every step is affine in x, so that the mean and covariance of what a sampler returns after
finitely many steps follow from its rows alone. The samples must have them.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion
from ddpm_fast.noise import gaussian
from ddpm_fast.parameterization import OBJECTIVES, x_start_rows

MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.30, 0.12, 0.0], [0.12, 0.20, -0.05], [0.0, -0.05, 0.10]], dtype=torch.float64)
SCHEDULES = [("linear", 50), ("cosine", 40), ("jsd", 30)]
RUNS = [
    ("ddpm", None, None, "posterior"),
    ("ddpm", None, None, "beta"),
    ("ddpm", 11, None, "posterior"),
    ("ddpm", 11, None, "beta"),
    ("ddim", None, 0.0, "posterior"),
    ("ddim", 11, 0.0, "posterior"),
    ("ddim", [0, 3, 17, 29], 0.5, "posterior"),
    ("ddim", 11, 1.0, "posterior"),
    ("dpmpp_2m", None, None, "posterior"),
    ("dpmpp_2m", 11, None, "posterior"),
    ("dpmpp_2m", [0, 3, 17, 29], None, "posterior"),
    ("dpmpp_2m_sde", None, None, "posterior"),
    ("dpmpp_2m_sde", 11, None, "posterior"),
    ("unipc", None, None, "posterior"),
    ("unipc", 11, None, "posterior"),
    ("unipc", [0, 3, 17, 29], None, "posterior"),
    ("heun", None, None, "posterior"),
    ("heun", 11, None, "posterior"),
    ("heun", 12, None, "posterior"),
    ("heun", [0, 3, 17, 29], None, "posterior"),
]


class BestDenoiser(nn.Module):
    """E[x_0 | x_t] in the parameterization of an objective; `gain` and `shift` by timestep."""

    channels = 3

    def __init__(self, schedule, objective):
        super().__init__()
        a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        eye = torch.eye(3, dtype=torch.float64)
        noisy = a[:, None, None] ** 2 * COVARIANCE + s[:, None, None] ** 2 * eye
        gain = a[:, None, None] * (COVARIANCE @ noisy.inverse())  # (T, 3, 3): x0_hat = gain x_t + shift
        shift = MEAN - a[:, None] * (gain @ MEAN)
        self.gain, self.shift = gain, shift
        self.u, self.w = x_start_rows(schedule, objective)

    def x_start(self, x, t):
        return torch.einsum("nij,nj->ni", self.gain[t], x) + self.shift[t]

    def forward(self, x, t):
        return (self.x_start(x, t) - self.u[t][:, None] * x) / self.w[t][:, None]


def make(name, timesteps, objective, variance):
    arguments = {"image_size": (), "objective": objective, "auto_normalize": False, "clip_denoised": False}
    arguments |= {"beta_schedule": name, "timesteps": timesteps, "variance": variance, "channels": 3}
    schedule = GaussianDiffusion(nn.Identity(), **arguments).schedule
    return GaussianDiffusion(BestDenoiser(schedule, objective), **arguments).double()


def moments(diffusion, table):
    """Mean and covariance after the run, from x_T ~ N(0, I), by the rows; and the affine map of each step.

    The maps are of (x, x0_prev), 6 numbers.
    """
    model, eye = diffusion.model, torch.eye(3, dtype=torch.float64)
    zero = torch.zeros_like(eye)
    mean, covariance, maps = torch.zeros(6, dtype=torch.float64), torch.block_diag(eye, zero), []
    for k, t in enumerate(table.t.tolist()):
        gain, shift = model.gain[t], model.shift[t]
        x_start = torch.cat([gain, zero], dim=1)
        matrix = torch.cat([torch.cat([table.A[k] * eye, table.C[k] * eye], dim=1) + table.B[k] * x_start, x_start])
        offset = torch.cat([table.B[k] * shift, shift])
        mean, covariance = matrix @ mean + offset, matrix @ covariance @ matrix.T
        covariance[:3, :3] += table.sigma[k] ** 2 * eye
        maps.append((matrix, offset))
    return mean[:3], covariance[:3, :3], maps


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("name", "timesteps"), SCHEDULES)
@pytest.mark.parametrize(("sampler", "steps", "eta", "variance"), RUNS)
def test_samples_follow_their_rows_exactly_and_in_distribution(
    name, timesteps, objective, sampler, steps, eta, variance
):
    diffusion = make(name, timesteps, objective, variance)
    table = diffusion.step_table(sampler, steps, eta)
    mean, covariance, maps = moments(diffusion, table)
    n = 5000
    samples = diffusion.sample(n, sampler=sampler, steps=steps, eta=eta, seed=11)

    # Exactly: the same run by its affine maps and the noise contract, sample by sample.
    state = torch.zeros(n, 6, dtype=torch.float64)  # x and x0_prev
    state[:, :3] = gaussian((n, 3), seed=11, dtype=torch.float64)
    for k, (matrix, offset) in enumerate(maps):
        state = state @ matrix.T + offset
        state[:, :3] += table.sigma[k] * gaussian((n, 3), seed=11, stream=k + 1, dtype=torch.float64)
    torch.testing.assert_close(samples, state[:, :3], rtol=0, atol=1e-9)

    # In distribution: five standard errors of a mean and of a covariance over n samples.
    deviation = covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mean).abs() < 5 * deviation / math.sqrt(n)).all()
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert ((samples.T.cov() - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun"])
def test_many_small_steps_return_the_data(objective, sampler):
    """With T = 4000 the finite-T answer itself comes near the data: within 1 % of the largest covariance."""
    diffusion = make("linear", 4000, objective, "posterior")
    mean, covariance, _ = moments(diffusion, diffusion.step_table(sampler))
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=5e-3)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=3e-3)


def test_the_sde_of_second_order_reaches_the_variance_of_the_data_sooner():
    """Four times the steps divide the error of the covariance by more than four, that of ancestral steps by less."""
    diffusion = make("linear", 4000, "pred_v", "posterior")

    def error(sampler, steps):
        mean, covariance, _ = moments(diffusion, diffusion.step_table(sampler, steps))
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=1e-5)  # a_T = 7e-6: what x_T ~ N(0, I) leaves out
        return (covariance - COVARIANCE).abs().max()

    for steps in (50, 200):
        assert error("dpmpp_2m_sde", steps) > 4 * error("dpmpp_2m_sde", 4 * steps)
        assert error("ddpm", steps) < 4 * error("ddpm", 4 * steps)
        assert error("dpmpp_2m_sde", steps) < error("ddpm", steps) / 3


def flow(schedule, x, t, t_next):
    """The probability flow, exactly: (S + e^2 I)^(-1/2) (x / a - mu) with e = s / a does not change along it."""
    eigenvalues, vectors = torch.linalg.eigh(COVARIANCE)
    a, e2 = schedule.sqrt_alphas_cumprod, 1 / schedule.snr
    stretch = ((eigenvalues + e2[t_next]) / (eigenvalues + e2[t])).sqrt()
    return a[t_next] * (MEAN + (x / a[t] - MEAN) @ (vectors * stretch) @ vectors.T)


def assert_order(errors, order):
    """Twice the steps divide the error by 2^order."""
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


# Heun's method begins where s / a is below 80, since its steps from above are of first order.
@pytest.mark.parametrize(
    ("sampler", "order", "first"), [("ddim", 1, 3999), ("dpmpp_2m", 2, 3999), ("unipc", 2, 3999), ("heun", 2, 3599)]
)
def test_the_order_of_a_sampler(sampler, order, first):
    """From t = first to 799, with more and more steps; the last step, x0_hat at 799, is the same."""
    diffusion = make("linear", 4000, "pred_v", "posterior")
    x_T = gaussian((200, 3), seed=5, dtype=torch.float64)
    x = flow(diffusion.schedule, x_T, first, 799)
    exact = diffusion.model.x_start(x, torch.full((200,), 799))
    errors = []
    for steps in (50, 100, 200):
        chosen = list(range(799, first + 1, (first - 799) // steps))
        sampled = diffusion.sample(200, sampler=sampler, steps=chosen, eta=None, noise=x_T)
        errors.append((sampled - exact).square().mean().sqrt().item())
    assert_order(errors, order)


def test_images_from_their_encoding_come_nearer_with_the_number_of_steps():
    """DDIM in both directions is of first order: twice the steps halve the error of the round trip."""
    diffusion = make("linear", 4000, "pred_v", "posterior")
    eigenvalues, vectors = torch.linalg.eigh(COVARIANCE)
    images = MEAN + gaussian((200, 3), seed=5, dtype=torch.float64) @ (vectors * eigenvalues.sqrt()).T
    errors, errors_of_noise = [], []
    exact = flow(diffusion.schedule, images, 0, 3999)  # x_0 for x at t = 0, where s / a = 0.005
    for steps in (200, 400, 800):
        x_T = diffusion.encode(images, steps=steps)
        again = diffusion.sample(noise=x_T, sampler="ddim", steps=steps, eta=0.0, batch_size=200)
        errors.append((again - images).square().mean().sqrt().item())
        errors_of_noise.append((x_T - exact).square().mean().sqrt().item())
    assert_order(errors, 1)
    assert_order(errors_of_noise, 1)


CONDITION = torch.tensor([True, False, False])  # the first of the three numbers is known


def test_resampling_brings_what_is_filled_in_near_to_its_conditional_distribution():
    """Of N(mu, S), what is unknown given what is known is normal too. Lugmayr et al. (2022), sec. 4.2."""
    diffusion = make("linear", 100, "pred_v", "posterior")
    n, known = 4000, torch.tensor([1.2, 0.0, 0.0], dtype=torch.float64)  # 1.6 deviations from its mean
    regression = COVARIANCE[1:, 0] / COVARIANCE[0, 0]
    mean = MEAN[1:] + regression * (known[0] - MEAN[0])
    variance = COVARIANCE[1:, 1:].diagonal() - regression * COVARIANCE[0, 1:]
    standard_errors = []
    for resample in (1, 5, 20):
        filled = diffusion.inpaint(known.expand(n, 3), CONDITION, jump=5, resample=resample, seed=3)
        assert (filled[:, 0] == known[0]).all()
        standard_errors.append(((filled[:, 1:].mean(0) - mean).abs() / (variance / n).sqrt()).max())
    once, five, twenty = standard_errors
    assert once > 3 * five
    assert five > twenty
    assert twenty < 5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weight", ["simple", "snr", "min_snr", "vlb"])
def test_the_best_denoiser_has_the_least_loss(objective, weight):
    """Any step away from E[x_0 | x_t] must raise the weighted loss, at each timestep."""
    diffusion = make("linear", 50, objective, "posterior")
    n = 4000
    eigenvalues, vectors = torch.linalg.eigh(COVARIANCE)
    root = vectors * eigenvalues.sqrt()
    x_start = MEAN + gaussian((n, 3), seed=1, dtype=torch.float64) @ root.T
    for t in (0, 8, 16):  # where the gain is not small: later, 4000 samples cannot tell
        times = torch.full((n,), t)
        best = diffusion.p_losses(x_start, times, seed=2)
        for change in (0.8, 1.2):
            gain = diffusion.model.gain
            diffusion.model.gain = gain * change
            assert diffusion.p_losses(x_start, times, seed=2) > best
            diffusion.model.gain = gain
