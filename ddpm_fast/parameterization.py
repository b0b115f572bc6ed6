r"""What the network predicts, and how its error is weighted, as rows of coefficients.

With a = sqrt(abar_t) and s = sqrt(1 - abar_t), every objective is a linear target

    target = p x_0 + q eps

            pred_noise      pred_x0     pred_v      pred_mean
    p       0               1           -s          c0 + cx a
    q       1               0           a           cx s

(v: Salimans & Ho, 2022; mean: c0 x_0 + cx x_t, Ho et al., 2020, eq. 7)

and since x_t = a x_0 + s eps, one formula finds x_0 from any of them:

    x0_hat = (q x_t - s pred) / (a q - s p) = u x_t + w pred.

An error e of the prediction is an error w e of x0_hat, so a weight on the error of x0_hat is w^2 times a weight on the
error of the prediction. All functions return float64 of shape (T,).

`OBJECTIVES`, `VARIANCES` and `LOSS_WEIGHTS` are registries: a function added to one of them is found by its name, by
`GaussianDiffusion`, configs and the command line.
"""

__all__ = [
    "LOSS_WEIGHTS",
    "OBJECTIVES",
    "VARIANCES",
    "loss_weight",
    "target_rows",
    "variance",
    "x_start_rows",
]

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .checks import choice, finite
from .schedules import NoiseSchedule

Rows = tuple[Tensor, Tensor]


# Objectives: (p, q) of target = p x_0 + q eps


def pred_noise(schedule: NoiseSchedule) -> Rows:
    """eps."""
    one = torch.ones_like(schedule.betas)
    return torch.zeros_like(one), one


def pred_x0(schedule: NoiseSchedule) -> Rows:
    """x_0."""
    one = torch.ones_like(schedule.betas)
    return one, torch.zeros_like(one)


def pred_v(schedule: NoiseSchedule) -> Rows:
    """v = a eps - s x_0. Salimans & Ho (2022), appendix D."""
    return -schedule.sqrt_one_minus_alphas_cumprod, schedule.sqrt_alphas_cumprod


def pred_mean(schedule: NoiseSchedule) -> Rows:
    """The mean of q(x_{t-1} | x_t, x_0), c0 x_0 + cx x_t. Ho et al. (2020), eq. 7."""
    c0, cx = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    return c0 + cx * schedule.sqrt_alphas_cumprod, cx * schedule.sqrt_one_minus_alphas_cumprod


OBJECTIVES: dict[str, Callable[[NoiseSchedule], Rows]] = {
    f.__name__: f for f in (pred_noise, pred_x0, pred_v, pred_mean)
}


def target_rows(schedule: NoiseSchedule, objective: str) -> Rows:
    """(p, q) of target = p x_0 + q eps."""
    return OBJECTIVES[choice("objective", objective, OBJECTIVES)](schedule)


def x_start_rows(schedule: NoiseSchedule, objective: str) -> Rows:
    """(u, w) of x0_hat = u x_t + w pred."""
    a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    p, q = target_rows(schedule, objective)
    determinant = a * q - s * p
    return q / determinant, -s / determinant


# Variances: sigma_t^2 of p(x_{t-1} | x_t). Ho et al. (2020), sec. 3.2


def beta(schedule: NoiseSchedule) -> Tensor:
    """sigma^2 = beta_t, optimal for x_0 ~ N(0, I)."""
    return schedule.betas


def posterior(schedule: NoiseSchedule) -> Tensor:
    """The variance of q(x_{t-1} | x_t, x_0), optimal for one x_0."""
    return schedule.posterior_variance


VARIANCES: dict[str, Callable[[NoiseSchedule], Tensor]] = {f.__name__: f for f in (beta, posterior)}


def variance(schedule: NoiseSchedule, kind: str) -> Tensor:
    """sigma_t^2 of p(x_{t-1} | x_t): `beta` (sigma^2 = beta_t) or `posterior`. Ho et al. (2020), sec. 3.2."""
    return VARIANCES[choice("variance", kind, VARIANCES)](schedule)


# Loss weights: of |pred - target|^2, from the schedule and w of x0_hat = u x_t + w pred


def l_simple(schedule: NoiseSchedule, w: Tensor) -> Tensor:
    """SNR on the error of x_0, which is 1 on that of eps: L_simple for every objective. Ho et al. (2020), eq. 14."""
    return schedule.snr * w**2


def uniform(schedule: NoiseSchedule, w: Tensor) -> Tensor:
    """1, whatever the objective."""
    return torch.ones_like(w)


def min_snr(schedule: NoiseSchedule, w: Tensor, *, min_snr_gamma: float) -> Tensor:
    """min(SNR, gamma) on the error of x_0. Hang et al. (2023)."""
    if not finite("min_snr_gamma", min_snr_gamma, 0) > 0:
        raise ValueError(f"min_snr_gamma must be above 0, got {min_snr_gamma}")
    return schedule.snr.clamp(max=min_snr_gamma) * w**2


def vlb(schedule: NoiseSchedule, w: Tensor, *, sigma2: Tensor) -> Tensor:
    """The term of the variational bound, in nats. Ho et al. (2020), eq. 8 and 12.

    At t = 0, where the posterior variance is 0, the variance of t = 1 is taken.
    """
    sigma2 = sigma2.clone()
    if not sigma2[0]:
        sigma2[0] = sigma2[1] if len(sigma2) > 1 else schedule.betas[0]
    return schedule.posterior_mean_coef1**2 / (2 * sigma2) * w**2


# A function takes (schedule, w) and, by name if it wants them, `sigma2` and `min_snr_gamma`.
LOSS_WEIGHTS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (l_simple, uniform, min_snr, vlb)}
_FORMER_NAMES = {"snr": "l_simple", "simple": "uniform"}


def loss_weight(
    schedule: NoiseSchedule,
    objective: str,
    kind: str | Tensor | Sequence[float],
    *,
    variance_kind: str = "posterior",
    min_snr_gamma: float = 5.0,
) -> Tensor:
    """The weight of |pred - target|^2 at each timestep.

    Args:
        kind: a name in `LOSS_WEIGHTS`: `l_simple`, `uniform`, `min_snr` or `vlb` (`snr` and `simple` are former names
        of
            the first two); or the weights themselves, shape (T,), finite and not negative.
        variance_kind: sigma_t^2 of the reverse process, for `vlb`.
        min_snr_gamma: for `min_snr`.

    Raises:
        ValueError: an unknown name, or a table that does not fit.
    """
    _, w = x_start_rows(schedule, objective)
    if not isinstance(kind, str):
        table = torch.as_tensor(kind, dtype=torch.float64, device="cpu").detach()
        if table.shape != w.shape or not (table >= 0).all() or table.isinf().any():
            values = f" with values from {table.min():.4g} to {table.max():.4g}" if table.numel() else ""
            raise ValueError(
                f"loss_weight as a table must hold {len(w)} finite numbers of at least 0, one for each timestep; "
                f"got the shape {tuple(table.shape)}{values}"
            )
        return table
    function = LOSS_WEIGHTS[choice("loss_weight", _FORMER_NAMES.get(kind, kind), LOSS_WEIGHTS)]
    given = {"sigma2": variance(schedule, variance_kind), "min_snr_gamma": min_snr_gamma}
    wanted = inspect.signature(function).parameters
    return function(schedule, w, **{name: value for name, value in given.items() if name in wanted})
