"""DPM-Solver++: multistep solvers of second order, without noise and with it."""

__all__ = ["dpmpp_2m", "dpmpp_2m_sde"]

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parameterization import x_start_rows
from ..schedules import NoiseSchedule
from .step_table import StepTable
from .timesteps import abar_pairs, karras_timesteps, lambda_steps


def dpmpp_2m(schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None) -> StepTable:
    r"""DPM-Solver++(2M). Lu et al. (2022), algorithm 2, of second order in the steps of lambda = log(a / s).

        h = lambda' - lambda,  r = h_prev / h                  h_prev: the h of the step before
        D = (1 + 1 / 2r) x0_hat - 1 / 2r x0_prev               x0_hat, extrapolated to the middle of the step
        x' = s' / s x - a' (e^-h - 1) D

        A = s' / s
        B = -a' (e^-h - 1) (1 + 1 / 2r)
        C = a' (e^-h - 1) / 2r
        sigma = 0

    The first step has no x0_prev, and the last one, to lambda' = infinity, returns x0_hat: both are of first order,
    with 1 / 2r = 0, where the sampler is DDIM.

    Args:
        steps: as in `karras_timesteps`; None for all. With given timesteps, a step much longer than the one before it
            extrapolates proportionally.
    """
    t, abar, abar_next, h, half_ratio = _multistep(schedule, steps)
    s, a_next, s_next = (1 - abar).sqrt(), abar_next.sqrt(), (1 - abar_next).sqrt()
    gain = -a_next * torch.expm1(-h)
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    B, C = gain * (1 + half_ratio), -gain * half_ratio
    return StepTable(t=t, u=u, w=w, A=s_next / s, B=B, C=C, sigma=torch.zeros_like(h))


def dpmpp_2m_sde(schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None) -> StepTable:
    r"""SDE-DPM-Solver++(2M) of Lu et al. (2022), which adds noise; of first order, it is DDIM with eta = 1.

    With h, r and D as in `dpmpp_2m`:

        x' = s' / s e^-h x - a' (e^-2h - 1) D + s' sqrt(1 - e^-2h) z

        A = s' / s e^-h
        B = -a' (e^-2h - 1) (1 + 1 / 2r)
        C = a' (e^-2h - 1) / 2r
        sigma = s' sqrt(1 - e^-2h)

    Args:
        steps: as in `karras_timesteps`; None for all.
    """
    t, abar, abar_next, h, half_ratio = _multistep(schedule, steps)
    s, a_next, s_next = (1 - abar).sqrt(), abar_next.sqrt(), (1 - abar_next).sqrt()
    gain = -a_next * torch.expm1(-2 * h)
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    B, C = gain * (1 + half_ratio), -gain * half_ratio
    return StepTable(t=t, u=u, w=w, A=s_next / s * (-h).exp(), B=B, C=C, sigma=s_next * (-torch.expm1(-2 * h)).sqrt())


def _multistep(
    schedule: NoiseSchedule, steps: int | Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """t, abar, abar', h and 1 / 2r of each step of DPM-Solver++(2M); 1 / 2r is 0 in the first and the last."""
    t = karras_timesteps(schedule, len(schedule) if steps is None else steps)
    abar, abar_next = abar_pairs(schedule, t)
    h = lambda_steps(abar, abar_next)
    half_ratio = torch.zeros_like(h)
    half_ratio[1:-1] = h[1:-1] / (2 * h[:-2])
    return t, abar, abar_next, h, half_ratio
