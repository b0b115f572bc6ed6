"""Ancestral sampling: the reverse process as it was trained, on all timesteps or some."""

__all__ = ["ancestral"]

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import variances
from ..parameterization import x_start_rows
from ..schedules import NoiseSchedule
from .step_table import StepTable
from .timesteps import abar_pairs, strided_timesteps


def ancestral(
    schedule: NoiseSchedule,
    objective: str,
    steps: int | Sequence[int] | None = None,
    *,
    variance: str | Tensor = "posterior",
) -> StepTable:
    r"""Ancestral sampling. Ho et al. (2020), algorithm 2; strided as in Nichol & Dhariwal (2021), sec. 4.

        alpha = abar / abar',  beta = 1 - alpha                the visited timesteps are a schedule of their own
        A     = sqrt(alpha) (1 - abar') / (1 - abar)
        B     = sqrt(abar') beta / (1 - abar)
        C     = 0
        sigma = sqrt(beta)  or  sqrt(beta (1 - abar') / (1 - abar)),  and 0 in the last step

    Args:
        steps: as in `strided_timesteps`; None for all.
        variance: a name in `variances.VARIANCES`, `posterior` or `beta`; one in `variances.LEARNED_VARIANCES`,
            `learned` or `learned_range`, for which sigma follows from the network; or sigma^2 at each timestep, (T,).
    """
    t = strided_timesteps(len(schedule), len(schedule) if steps is None else steps)
    abar, abar_next = abar_pairs(schedule, t)
    chain = NoiseSchedule((1 - abar / abar_next).flip(0), zero_terminal_snr=True)
    log_bounds = None
    if isinstance(variance, Tensor):
        sigma2 = variances.respaced(variance, schedule, t.flip(0), chain).flip(0)
    elif variance in variances.LEARNED_VARIANCES:
        sigma2 = torch.ones_like(abar)
        log_bounds = variances.LEARNED_VARIANCES[variance](schedule, t.flip(0), chain).flip(0)
    else:
        sigma2 = variances.variance(chain, variance).flip(0)
    sigma2[-1] = 0  # the last step returns the mean
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    return StepTable(
        t=t,
        u=u,
        w=w,
        A=chain.posterior_mean_coef2.flip(0),
        B=chain.posterior_mean_coef1.flip(0),
        C=torch.zeros_like(u),
        sigma=sigma2.sqrt(),
        log_bounds=log_bounds,
    )
