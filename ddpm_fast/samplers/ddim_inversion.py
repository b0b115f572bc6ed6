"""DDIM run upwards: the noise that an image is sampled from."""

__all__ = ["ddim_inversion"]

from collections.abc import Sequence

import torch

from ..parameterization import x_start_rows
from ..schedules import NoiseSchedule
from .step_table import StepTable
from .timesteps import strided_timesteps


def ddim_inversion(schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None) -> StepTable:
    r"""The steps of DDIM without noise, from x_0 up to the noisiest timestep. Song et al. (2021), eq. 14, sec. 4.3.

    A step takes x_t to x_t' at the next, noisier timestep t', with the eps that the network finds at x_t:

        x' = a' x0_hat + s' (x - a x0_hat) / s

        A = s' / s
        B = a' - a s' / s
        C = sigma = 0

    The first step, from x_0, has no timestep of its own, and s = 0. Its eps is that of the first visited timestep t',
    which is the eps that the last step of the sampler uses, but at x_0 in place of x_t':

        x' = a' x_0 + s' (x_0 - a' x0_hat) / s' = (1 + a') x_0 - a' x0_hat

    Both directions follow the same differential equation, in steps of first order: samples from the x_T that is found
    come nearer to x_0 as 1 / K.

    Args:
        steps: as in `strided_timesteps`; None for all.

    Returns:
        K steps; the timesteps rise, and are those at which the network is called.
    """
    visited = strided_timesteps(len(schedule), len(schedule) if steps is None else steps).flip(0)
    t = torch.cat([visited[:1], visited[:-1]])
    a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    A = s[visited] / s[t]
    B = a[visited] - a[t] * A
    A[0], B[0] = 1 + a[visited[0]], -a[visited[0]]
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    return StepTable(t=t, u=u, w=w, A=A, B=B, C=torch.zeros_like(A), sigma=torch.zeros_like(A))
