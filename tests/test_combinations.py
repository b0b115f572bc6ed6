r"""Every combination of objective, variance, loss, weight, sampler, schedule, clipping, precision and backend.

The network's outputs are recorded. What a loss or a run makes of them is then computed once more, in float64 and as the
papers write it, and must agree to the rounding errors that float32 (or float64) can have made on the way. Where the
network is the best one for Gaussian data, the variational bound is a closed form, too.
"""

import itertools
import math

import pytest
import torch
from test_likelihood import BestDenoiser, best_variance, closed_form, mean_bound
from torch import nn
from torch.distributions import Normal, kl_divergence

import ddpm_fast
from ddpm_fast import GaussianDiffusion, schedules, variances
from ddpm_fast.diffusion import LOSS_TYPES
from ddpm_fast.loss_weights import LOSS_WEIGHTS
from ddpm_fast.noise import gaussian
from ddpm_fast.parameterization import OBJECTIVES, target_rows, x_start_rows
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.variances import LEARNED_VARIANCES, NAMES, VARIANCES
from ddpm_fast.variational_bound import NARROW

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ("reference", "cuda", "triton") if CUDA else ("reference", "cpu")
SCHEDULES = {"linear": 25, "cosine": 8, "zero terminal SNR": 8}
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}  # of the network
ULPS = 8  # roundings in the longest of the kernels' formulas


class Network(nn.Module):
    """A small network of vectors, with two halves if it is to predict a variance; records what it returns."""

    channels = 3

    def __init__(self, halves):
        super().__init__()
        self.halves = halves
        self.mix = nn.Linear(3, 3 * halves)
        generator = torch.Generator().manual_seed(halves)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        self.outputs = []

    def forward(self, x, t):
        y = torch.tanh(self.mix(x)) + (t / 1000)[:, None].to(x.dtype)
        self.outputs.append(y)
        return y


def possible(objective, variance, loss_type, weight, schedule):
    """Whether the combination can be; the others are errors that say so (tests/test_diffusion.py)."""
    fixed = variance in VARIANCES
    if loss_type == "hybrid" if fixed else loss_type in ("l2", "l1", "huber"):
        return False
    if weight == "vlb" and not fixed:
        return False
    if variance == "beta" and loss_type != "kl" and weight != "vlb":
        return False  # the same numbers as with the posterior variance
    return schedule != "zero terminal SNR" or (objective != "pred_noise" and weight not in ("l_simple", "p2"))


def made(objective, variance, schedule, precision, **arguments):
    zero = schedule == "zero terminal SNR"
    network = Network(2 if variance in LEARNED_VARIANCES else 1)
    diffusion = GaussianDiffusion(
        network,
        image_size=(),
        timesteps=SCHEDULES[schedule],
        beta_schedule="cosine" if zero else schedule,
        zero_terminal_snr=zero,
        objective=objective,
        variance=variance,
        auto_normalize=False,
        **({"loss_weight": "uniform"} | arguments),
    ).to(DEVICE)
    if precision == "fp64":
        return diffusion.double()
    network.to(PRECISIONS[precision])
    return diffusion


def log_variance(diffusion, t, v, schedule=None, chain_t=None):
    """log sigma^2 at t of the schedule, or of a chain of some of its timesteps at `chain_t`, for numbers v."""
    s = diffusion.schedule if schedule is None else schedule
    i = t if chain_t is None else chain_t
    posterior = s.posterior_variance[max(i, 1) if len(s) > 1 else 0]
    match diffusion.variance:
        case "posterior":
            return posterior.log()
        case "beta":
            return s.betas[i].log()
        case "learned":
            return v + (s.betas[i] / diffusion.schedule.betas[t]).log()
        case "learned_range":
            return (1 - v) / 2 * posterior.log() + (1 + v) / 2 * s.betas[i].log()
        case "learnable":
            return diffusion.log_variance[t].detach().double().cpu()


def expected_loss(diffusion, x_start, eps, t, output, unit):
    """The loss of one timestep for each sample in float64, and its largest rounding error, in units of eps."""
    s, loss_type = diffusion.schedule, diffusion.loss_type
    pred, *v = output.double().cpu().split(3, dim=1)
    a, b = s.sqrt_alphas_cumprod[t], s.sqrt_one_minus_alphas_cumprod[t]
    x_t = a * x_start + b * eps
    p, q = (column[t] for column in target_rows(s, diffusion.objective))
    error = pred - p * x_start - q * eps
    size = pred.abs() + (p * x_start).abs() + (q * eps).abs()
    weight = diffusion.loss_weight[t].double().cpu()
    penalty, slope = {
        "l1": (error.abs(), torch.ones_like(error)),
        "huber": (torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5), error.abs().clamp(max=1)),
    }.get(loss_type, (error**2, 2 * error.abs()))
    simple, simple_error = (weight * y.mean(1) for y in (penalty, slope * size + penalty))
    if loss_type not in ("kl", "hybrid"):
        return simple, simple_error
    u, w = (column[t] for column in x_start_rows(s, diffusion.objective))
    x_hat = u * x_t + w * pred
    c0, cx = s.posterior_mean_coef1[t], s.posterior_mean_coef2[t]
    log_p = torch.as_tensor(log_variance(diffusion, t, *(v or [None]))).expand_as(pred)
    p_step = Normal(c0 * x_hat + cx * x_t, (0.5 * log_p).exp())
    if t == 0:
        bits, narrow = -p_step.log_prob(x_start), math.exp(NARROW) / p_step.variance  # see variational_bound
    else:
        bits, narrow = kl_divergence(Normal(c0 * x_start + cx * x_t, s.posterior_variance[t].sqrt()), p_step), 0
    distance = (c0 * (x_start - x_hat)).abs() / p_step.scale
    size = c0 * (x_start.abs() + (u * x_t).abs() + (w * pred).abs()) / p_step.scale
    log_sizes = 40 + log_p.abs() + distance**2 * (1 + log_p.abs())
    bits, bits_error = (y.mean(1) / math.log(2) for y in (bits, distance * size + log_sizes + narrow / unit))
    scale = diffusion.num_timesteps * (1 if loss_type == "kl" else 1 / 1000)
    if loss_type == "kl":
        return scale * bits, scale * bits_error
    return simple + scale * bits, simple_error + scale * bits_error


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variance", NAMES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses(objective, variance, precision):
    x_start, eps = (gaussian((4, 3), seed=seed, dtype=torch.float64) for seed in (1, 2))
    x_start = torch.tanh(x_start)
    given = [y.to(DEVICE, torch.float64 if precision == "fp64" else torch.float32) for y in (x_start, eps)]
    unit = torch.finfo(given[0].dtype).eps
    count = 0
    for schedule, loss_type, weight in itertools.product(SCHEDULES, LOSS_TYPES, LOSS_WEIGHTS):
        if not possible(objective, variance, loss_type, weight, schedule):
            continue
        diffusion = made(objective, variance, schedule, precision, loss_type=loss_type, loss_weight=weight)
        for t in (0, 1, diffusion.num_timesteps - 1):
            times = torch.full((4,), t, device=DEVICE)
            for backend in BACKENDS:
                with ddpm_fast.backend(backend):
                    found = diffusion.p_losses(given[0], times, given[1], loss_reduction="none")
                output = diffusion.model.outputs[-1].detach()
                expected, bound = expected_loss(diffusion, x_start, eps, t, output, unit)
                off = (found.detach().double().cpu() - expected).abs()
                assert (off <= ULPS * unit * bound).all(), (schedule, loss_type, weight, t, backend, off, bound)
                found.sum().backward()
                assert all(p.grad.isfinite().all() for p in diffusion.parameters() if p.grad is not None)
                count += 1
    assert count >= 3 * len(BACKENDS) * (len(SCHEDULES) - 1)


def expected_run(diffusion, table, clip, unit):
    """The run in float64 from the network's recorded outputs, and a bound of its rounding errors."""
    x = gaussian((3, 3), seed=9, device=DEVICE, dtype=torch.float64).cpu()
    error, x_start, start_error = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    chain = None
    if table.log_bounds is not None:
        abar = diffusion.schedule.alphas_cumprod[table.t]
        abar = torch.cat([abar, torch.ones(1, dtype=torch.float64)])
        chain = schedules.NoiseSchedule((1 - abar[:-1] / abar[1:]).flip(0), zero_terminal_snr=True)
    for k, output in enumerate(diffusion.model.outputs):
        pred, *v = output.double().cpu().split(3, dim=1)
        t, (u, w, A, B, C, sigma) = int(table.t[k]), table.rows[k, :6].tolist()
        before, before_error = x_start, start_error
        x_start = u * x + w * pred
        start_error = abs(u) * error + ULPS * unit * ((u * x).abs() + (w * pred).abs())
        x_start = x_start.clamp(*clip) if clip else x_start
        if chain is not None and sigma:
            sigma = (0.5 * log_variance(diffusion, t, v[0], chain, len(table) - 1 - k)).exp()
        z = gaussian(x.shape, seed=9, stream=k + 1, device=DEVICE, dtype=torch.float64).cpu()
        terms = (A * x, B * x_start, C * before, sigma * z)
        error = abs(A) * error + abs(B) * start_error + abs(C) * before_error
        error = error + ULPS * unit * sum(y.abs() for y in terms)
        x = sum(terms)
    return x, error


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variance", NAMES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_samples(objective, variance, precision):
    unit = torch.finfo(torch.float64 if precision == "fp64" else torch.float32).eps
    count = 0
    for schedule, clip, sampler in itertools.product(SCHEDULES, (False, True), SAMPLERS):
        if schedule == "zero terminal SNR" and objective == "pred_noise":
            continue
        if sampler != "ddpm" and variance not in ("posterior", "learned_range"):
            continue  # the others take no variance, but for the half of the output that they leave out
        diffusion = made(objective, variance, schedule, precision, clip_denoised=clip)
        for steps, backend in ((None, BACKENDS[-1]), *((5, backend) for backend in BACKENDS)):
            diffusion.model.outputs.clear()
            table = diffusion.step_table(sampler, steps)
            with ddpm_fast.backend(backend):
                found = diffusion.sample(3, sampler=sampler, steps=steps, seed=9)
                # Backends make noise that differs in the last bits of float32.
                expected, bound = expected_run(diffusion, table, (-1, 1) if clip else None, unit)
            off = (found.double().cpu() - expected).abs()
            assert (off <= bound).all(), (schedule, clip, sampler, steps, backend, off, bound)
            count += 1
    assert count >= 2 * 2 * (1 + len(BACKENDS))


class BestOfBoth(BestDenoiser):
    """The best x_0, and in the second half the best variance."""

    def __init__(self, schedule, objective, variance):
        super().__init__(schedule, objective)
        self.v = best_variance(schedule).log()
        if variance == "learned_range":
            low, high = variances.log_bounds(schedule, variance).unbind(1)
            self.v = 2 * (self.v - low) / (high - low) - 1

    def forward(self, x, t):
        pred = super().forward(x, t)
        return torch.cat([pred, self.v[t, None].expand_as(pred)], dim=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", [*LEARNED_VARIANCES, "learnable"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_bound_of_gaussian_data(objective, variance, schedule):
    if schedule == "zero terminal SNR" and objective == "pred_noise":
        pytest.skip("refused")
    diffusion = made(objective, variance, schedule, "fp64", clip_denoised=False).cpu()
    if variance == "learnable":
        diffusion.model = BestDenoiser(diffusion.schedule, objective)
        diffusion.log_variance.data = best_variance(diffusion.schedule).log()
    else:
        diffusion.model = BestOfBoth(diffusion.schedule, objective, variance)
    torch.testing.assert_close(mean_bound(diffusion).detach(), closed_form(diffusion.schedule), rtol=0, atol=1e-6)
