"""UniPC: a predictor and a corrector with one call of the network a step."""

__all__ = ["unipc"]

from collections.abc import Sequence

import torch

from ..parameterization import x_start_rows
from ..schedules import NoiseSchedule
from .step_table import StepTable
from .timesteps import abar_pairs, karras_timesteps, lambda_steps


def unipc(schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None) -> StepTable:
    r"""UniPC of second order: UniP-1 with the corrector UniC-1. Zhao et al. (2023), in its form that predicts x_0.

    With m = x0_hat at x_t, m_prev the one before, h = lambda' - lambda and h_prev the h of the step before:

        predictor    x'  = s' / s xc - a' (e^-h - 1) m                              a step of DDIM from xc
        corrector    xc  = s / s_prev xc_prev - a (e^-h_prev - 1) (m_prev + (m - m_prev) / 2)

    The x of which m is the prediction was s / s_prev xc_prev - a (e^-h_prev - 1) m_prev. The corrector therefore adds a
    multiple of m - m_prev to it, and it and the next predictor are one row:

        xc = x + b (m - m_prev),   b = -a (e^-h_prev - 1) / 2,   0 in the first step

        A = s' / s
        B = s' / s b - a' (e^-h - 1)
        C = -s' / s b
        sigma = 0

    b is the paper's with B_2(h) = e^h - 1. UniC-p raises the order of accuracy of a predictor by one, here from 1 to 2.
    The last step, to lambda' = infinity, returns x0_hat. Third order (UniP-2 and UniC-2) would need two earlier x0_hat.

    Args:
        steps: as in `karras_timesteps`; None for all.
    """
    t = karras_timesteps(schedule, len(schedule) if steps is None else steps)
    abar, abar_next = abar_pairs(schedule, t)
    a, s, a_next, s_next = abar.sqrt(), (1 - abar).sqrt(), abar_next.sqrt(), (1 - abar_next).sqrt()
    h = lambda_steps(abar, abar_next)
    gain = -torch.expm1(-h)
    b = torch.zeros_like(h)
    b[1:] = a[1:] * gain[:-1] / 2
    A = s_next / s
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    return StepTable(t=t, u=u, w=w, A=A, B=A * b + a_next * gain, C=-A * b, sigma=torch.zeros_like(h))
