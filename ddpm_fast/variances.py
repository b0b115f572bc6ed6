r"""Variances: sigma^2 of p(x_{t-1} | x_t), given by a table or learned.

Every choice is isotropic or diagonal, and lies at or between two tables: the variance of q(x_{t-1} | x_t, x_0), which
is right if x_0 is one point, and beta_t, which is right if x_0 ~ N(0, I) (Ho et al. 2020, sec. 3.2).

    posterior, beta         the tables
    learnable               one number a timestep, a parameter of the module
    learned, learned_range  the second half of the network's output, v: log sigma^2 lies (v + 1) / 2 of the way from a
                            lower to an upper bound; those of `learned` are -1 and 1, so that v is log sigma^2 itself

Fewer steps than T visit a chain of timesteps that is a schedule of its own, for which the variances are taken. The
registries hold the functions: one that is added to them is found by its name, by `GaussianDiffusion`, configs and the
command line.
"""

__all__ = ["LEARNABLE", "LEARNED_VARIANCES", "NAMES", "VARIANCES", "log_bounds", "positive", "respaced", "variance"]

from collections import ChainMap
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import choice
from .schedules import NoiseSchedule


def beta(schedule: NoiseSchedule) -> Tensor:
    """sigma^2 = beta_t, optimal for x_0 ~ N(0, I)."""
    return schedule.betas


def posterior(schedule: NoiseSchedule) -> Tensor:
    """The variance of q(x_{t-1} | x_t, x_0), optimal for one x_0."""
    return schedule.posterior_variance


# From a schedule to sigma^2, (T,), float64.
VARIANCES: dict[str, Callable[[NoiseSchedule], Tensor]] = {f.__name__: f for f in (beta, posterior)}


def variance(schedule: NoiseSchedule, kind: str) -> Tensor:
    """sigma_t^2 of p(x_{t-1} | x_t) by its name in `VARIANCES`: `beta` or `posterior`. Ho et al. (2020), sec. 3.2."""
    return VARIANCES[choice("variance", kind, VARIANCES)](schedule)


def learned(schedule: NoiseSchedule, t: Tensor, chain: NoiseSchedule) -> Tensor:
    """v is log sigma^2 of a step of the whole schedule; that of a longer step grows as its beta does."""
    growth = (chain.betas / schedule.betas[t]).log()
    return torch.stack([growth - 1, growth + 1], dim=1)


def learned_range(schedule: NoiseSchedule, t: Tensor, chain: NoiseSchedule) -> Tensor:
    """Between the posterior variance and beta. Nichol & Dhariwal (2021), eq. 15."""
    return torch.stack([positive(chain.posterior_variance, chain), chain.betas], dim=1).log()


# From a schedule, the timesteps of it that are visited, rising, and the schedule that these are, to the logs of the
# lower and the upper variance, (K, 2), float64.
LEARNED_VARIANCES: dict[str, Callable[[NoiseSchedule, Tensor, NoiseSchedule], Tensor]] = {
    f.__name__: f for f in (learned, learned_range)
}
LEARNABLE = "learnable"
NAMES = ChainMap(VARIANCES, LEARNED_VARIANCES, {LEARNABLE: None})


def log_bounds(schedule: NoiseSchedule, kind: str) -> Tensor:
    """The logs of the lower and the upper bound of a learned variance at each timestep, (T, 2)."""
    return LEARNED_VARIANCES[kind](schedule, torch.arange(len(schedule), device="cpu"), schedule)


def positive(sigma2: Tensor, schedule: NoiseSchedule) -> Tensor:
    """sigma^2 with a variance of 0 at t = 0, as the posterior's, replaced by that of t = 1, or beta if T = 1."""
    sigma2 = sigma2.clone()
    if not sigma2[0]:
        sigma2[0] = sigma2[1] if len(sigma2) > 1 else schedule.betas[0]
    return sigma2


def respaced(sigma2: Tensor, schedule: NoiseSchedule, t: Tensor, chain: NoiseSchedule) -> Tensor:
    r"""Optimal variances of a chain of fewer timesteps, from those of the whole schedule. Bao et al. (2022), theorem 1.

    The best sigma^2 is the posterior's plus c0^2 times the variance of x_0 given x_t. That is the same whichever
    timestep comes next, so the one found from sigma^2 serves the longer step. It is at most s^2 / a^2.

    Args:
        sigma2: (T,).
        t: the timesteps visited, rising, (K,).
        chain: the schedule that they are.
    """
    if len(t) == len(schedule):
        return sigma2
    of_x_start = (sigma2 - schedule.posterior_variance)[t] / schedule.posterior_mean_coef1[t] ** 2
    most = (1 - schedule.alphas_cumprod[t]) / schedule.alphas_cumprod[t]
    of_x_start = torch.minimum(of_x_start.clamp(min=0), most)
    return chain.posterior_variance + chain.posterior_mean_coef1**2 * of_x_start
