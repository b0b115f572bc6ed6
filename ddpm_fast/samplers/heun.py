"""Heun's method for the probability flow."""

__all__ = ["heun"]

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import integer
from ..parameterization import x_start_rows
from ..schedules import NoiseSchedule
from .step_table import StepTable
from .timesteps import MOST_NOISE, abar_pairs, is_count, spaced_timesteps, strided_timesteps


def heun(
    schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None, *, spacing: str = "karras"
) -> StepTable:
    r"""Heun's method. Karras et al. (2022), algorithm 1 without its noise (S_churn = 0), for x / a and s / a.

    With e = s / a, m = x0_hat at x_t and m' = x0_hat at the x' that Euler's step gives:

        Euler    x' / a' = x / a + (e' - e) (x / a - m) / e
        Heun     x" / a' = x / a + (e' - e) ((x / a - m) / e + (x' / a' - m') / e') / 2
                         = x' / a' + (e / e' - 1) (m' - m) / 2                      x / a, found again from x'

    Each is one row, with one call of the network. Both steps have sigma = 0, and Euler's is that of DDIM:

        Euler, at t       A = s' / s,   B = a' - a s' / s,          C = 0
        Heun, at t'       A = 1,        B = a' (e / e' - 1) / 2,    C = -B

    The last step, to e' = 0, is Euler's, and so are steps from e > 80, the paper's sigma_max: the mean of the two
    slopes is far from that between them if e is many times as large as e'.

    Args:
        steps: K calls of the network, at most 2 T - 1; None for T. They make (K + 1) / 2 steps; where that leaves a
            call over, for an even K or because of steps from e > 80, the first steps are Euler's. Or the timesteps
            themselves, n of them for up to 2 n - 1 calls.
        spacing: of the steps, a name in `SPACINGS`.

    Raises:
        ValueError: more calls than all timesteps allow.
    """
    steps = len(schedule) if steps is None else steps
    if is_count(steps):
        t, corrected = _with_calls(schedule, integer("steps", steps, 1), spacing)
    else:
        t = strided_timesteps(len(schedule), steps)
        corrected = _correctable(schedule, t)
    abar, abar_next = abar_pairs(schedule, t)
    a, s, a_next, s_next = abar.sqrt(), (1 - abar).sqrt(), abar_next.sqrt(), (1 - abar_next).sqrt()
    euler = torch.stack([s_next / s, a_next - a * s_next / s, torch.zeros_like(a)], dim=1)
    gain = (s[corrected] * a_next[corrected] / (a[corrected] * s_next[corrected]) - 1) * a_next[corrected] / 2
    correction = torch.stack([torch.ones_like(gain), gain, -gain], dim=1)
    order = torch.cat([2 * torch.arange(len(t), device="cpu"), 2 * corrected + 1]).argsort()
    A, B, C = torch.cat([euler, correction])[order].unbind(1)
    t = torch.cat([t, t[corrected + 1]])[order]
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    return StepTable(t=t, u=u, w=w, A=A, B=B, C=C, sigma=torch.zeros_like(A))


def _correctable(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The indices of the steps that may be Heun's: those from s / a of at most 80, without the last."""
    return (schedule.snr[t[:-1]].rsqrt() <= MOST_NOISE).nonzero()[:, 0]


def _with_calls(schedule: NoiseSchedule, calls: int, spacing: str) -> tuple[Tensor, Tensor]:
    """The fewest timesteps that take K calls of the network, and the indices of the steps that are Heun's."""
    for steps in range(min(calls // 2 + 1, len(schedule)), min(calls, len(schedule)) + 1):
        t = spaced_timesteps(schedule, steps, spacing)
        corrected = _correctable(schedule, t)
        if steps + len(corrected) >= calls:
            return t, corrected[len(corrected) - (calls - steps) :]
    raise ValueError(
        f"heun takes at most {len(t) + len(corrected)} calls of the network on the {len(t)} timesteps of this "
        f"schedule; got steps={calls}"
    )
