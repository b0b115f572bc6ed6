"""DDIM: steps with any amount of noise, from none to that of ancestral sampling."""

__all__ = ["ddim"]

from collections.abc import Sequence

import torch

from ..checks import finite
from ..parameterization import x_start_rows
from ..schedules import NoiseSchedule
from .step_table import StepTable
from .timesteps import abar_pairs, strided_timesteps


def ddim(
    schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None, *, eta: float = 0.0
) -> StepTable:
    r"""DDIM. Song et al. (2021), eq. 12 and 16, with eps found again from the clipped x0_hat.

        sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar')
        d     = sqrt(1 - abar' - sigma^2)                      the coefficient of eps = (x_t - a x0_hat) / s
        A     = d / s
        B     = a' - d a / s
        C     = 0

    Args:
        steps: as in `strided_timesteps`; None for all.
        eta: 0 is deterministic, 1 has the posterior variance. A larger eta is possible while sigma^2 <= 1 - abar'.

    Raises:
        ValueError: eta is negative or not finite, or sigma^2 would exceed 1 - abar'.
    """
    eta = finite("eta", eta, 0)
    t = strided_timesteps(len(schedule), len(schedule) if steps is None else steps)
    abar, abar_next = abar_pairs(schedule, t)
    a, s, a_next = abar.sqrt(), (1 - abar).sqrt(), abar_next.sqrt()
    sigma = eta * ((1 - abar_next) / (1 - abar)).sqrt() * (1 - abar / abar_next).sqrt()
    direction2 = 1 - abar_next - sigma**2  # the variance that is left for the noise already there
    if (direction2 < -1e-12).any():
        raise ValueError(f"eta = {eta} gives some of these {len(t)} steps more noise than x_t' may hold; take less")
    direction = direction2.clamp(min=0).sqrt()
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    return StepTable(t=t, u=u, w=w, A=direction / s, B=a_next - direction * a / s, C=torch.zeros_like(u), sigma=sigma)
