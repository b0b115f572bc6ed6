"""Ancestral sampling: the reverse process as it was trained, on all timesteps or some."""

__all__ = ["ancestral"]

from collections.abc import Sequence

import torch

from ..parameterization import variance as make_variance
from ..parameterization import x_start_rows
from ..schedules import NoiseSchedule
from .step_table import StepTable
from .timesteps import abar_pairs, strided_timesteps


def ancestral(
    schedule: NoiseSchedule,
    objective: str,
    steps: int | Sequence[int] | None = None,
    *,
    variance: str = "posterior",
) -> StepTable:
    r"""Ancestral sampling. Ho et al. (2020), algorithm 2; strided as in Nichol & Dhariwal (2021), sec. 4.

        alpha = abar / abar',  beta = 1 - alpha                the visited timesteps are a schedule of their own
        A     = sqrt(alpha) (1 - abar') / (1 - abar)
        B     = sqrt(abar') beta / (1 - abar)
        C     = 0
        sigma = sqrt(beta)  or  sqrt(beta (1 - abar') / (1 - abar)),  and 0 in the last step

    Args:
        steps: as in `strided_timesteps`; None for all.
        variance: a name in `parameterization.VARIANCES`: `posterior` or `beta`.
    """
    t = strided_timesteps(len(schedule), len(schedule) if steps is None else steps)
    abar, abar_next = abar_pairs(schedule, t)
    chain = NoiseSchedule((1 - abar / abar_next).flip(0))
    sigma2 = make_variance(chain, variance).flip(0)
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
    )
