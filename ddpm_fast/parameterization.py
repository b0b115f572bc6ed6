r"""What the network predicts, as rows of coefficients.

With a = sqrt(abar_t) and s = sqrt(1 - abar_t), every objective is a linear target

    target = p x_0 + q eps

            pred_noise      pred_x0     pred_v      pred_mean
    p       0               1           -s          c0 + cx a
    q       1               0           a           cx s

(v: Salimans & Ho, 2022; mean: c0 x_0 + cx x_t, Ho et al., 2020, eq. 7)

and since x_t = a x_0 + s eps, one formula finds x_0 from any of them:

    x0_hat = (q x_t - s pred) / (a q - s p) = u x_t + w pred.

All functions return float64 of shape (T,). `OBJECTIVES` is a registry: a function added to it is found by its name, by
`GaussianDiffusion`, configs and the command line.
"""

__all__ = ["OBJECTIVES", "target_rows", "x_start_rows"]

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import choice
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
    """(u, w) of x0_hat = u x_t + w pred.

    Raises:
        ValueError: at zero terminal SNR, x_T is eps, and a prediction of eps says nothing of x_0.
    """
    a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    p, q = target_rows(schedule, objective)
    determinant = a * q - s * p
    if not determinant.all():
        t = int((determinant == 0).nonzero()[-1])
        raise ValueError(
            f"with objective {objective!r}, x_0 does not follow from x_t and the prediction at t = {t}, where abar is "
            f"{schedule.alphas_cumprod[t]:.3g}; take pred_v or pred_x0, which allow a terminal SNR of 0"
        )
    return q / determinant, -s / determinant
