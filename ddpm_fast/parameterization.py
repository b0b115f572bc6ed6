r"""What the network predicts, and how its error is weighted, as rows of coefficients.

With a = sqrt(abar_t) and s = sqrt(1 - abar_t), every objective is a linear target

    target = p x_0 + q eps

            pred_noise      pred_x0     pred_v      pred_mean
    p       0               1           -s          c0 + cx a
    q       1               0           a           cx s

(v: Salimans & Ho, 2022; mean: c0 x_0 + cx x_t, Ho et al., 2020, eq. 7)

and since x_t = a x_0 + s eps, one formula finds x_0 from any of them:

    x0_hat = (q x_t - s pred) / (a q - s p) = u x_t + w pred.

An error e of the prediction is an error w e of x0_hat, so a weight on the one is w^2 times a weight on the other.
All functions return float64 of shape (T,).
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

from collections.abc import Sequence

import torch
from torch import Tensor

from .schedules import NoiseSchedule

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v", "pred_mean")
VARIANCES = ("beta", "posterior")
LOSS_WEIGHTS = ("l_simple", "uniform", "min_snr", "vlb", "snr", "simple")


def target_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(p, q) of target = p x_0 + q eps."""
    a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    if objective == "pred_noise":
        return zero, one
    if objective == "pred_x0":
        return one, zero
    if objective == "pred_v":
        return -s, a
    if objective == "pred_mean":
        c0, cx = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return c0 + cx * a, cx * s
    raise ValueError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")


def x_start_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(u, w) of x0_hat = u x_t + w pred."""
    a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    p, q = target_rows(schedule, objective)
    determinant = a * q - s * p
    return q / determinant, -s / determinant


def variance(schedule: NoiseSchedule, kind: str) -> Tensor:
    """sigma_t^2 of p(x_{t-1} | x_t): `beta` (sigma^2 = beta_t) or `posterior`. Ho et al. (2020), sec. 3.2."""
    if kind == "beta":
        return schedule.betas
    if kind == "posterior":
        return schedule.posterior_variance
    raise ValueError(f"unknown variance {kind!r}; there are {', '.join(VARIANCES)}")


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
        kind: `uniform` (or `simple`): 1, whatever the objective.
            `l_simple` (or `snr`): SNR on the error of x_0, which is 1 on that of eps: L_simple of Ho et al. (2020),
            eq. 14, for every objective.
            `min_snr`: min(SNR, gamma) on the error of x_0. Hang et al. (2023).
            `vlb`: the term of the variational bound, in nats. Ho et al. (2020), eq. 8 and 12; at t = 0, where
            the posterior variance is 0, with that of t = 1.
            Or the weights themselves, shape (T,), finite and not negative.
        variance_kind: sigma_t^2 of the reverse process, for `vlb`.
        min_snr_gamma: for `min_snr`.
    """
    _, w = x_start_rows(schedule, objective)
    if not isinstance(kind, str):
        table = torch.as_tensor(kind, dtype=torch.float64, device="cpu").detach()
        if table.shape != w.shape or not (table >= 0).all() or table.isinf().any():
            raise ValueError(
                f"loss_weight as a table must hold {len(w)} finite numbers of at least 0, one for each timestep; "
                f"got the shape {tuple(table.shape)} with values from {table.min():.4g} to {table.max():.4g}"
            )
        return table
    if kind in ("uniform", "simple"):
        return torch.ones_like(w)
    if kind in ("l_simple", "snr"):
        return schedule.snr * w**2
    if kind == "min_snr":
        if not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be above 0, got {min_snr_gamma}")
        return schedule.snr.clamp(max=min_snr_gamma) * w**2
    if kind == "vlb":
        sigma2 = variance(schedule, variance_kind).clone()
        if not sigma2[0]:
            sigma2[0] = sigma2[1] if len(sigma2) > 1 else schedule.betas[0]
        return schedule.posterior_mean_coef1**2 / (2 * sigma2) * w**2
    raise ValueError(f"unknown loss_weight {kind!r}; there are {', '.join(LOSS_WEIGHTS)}, or a table of shape (T,)")
