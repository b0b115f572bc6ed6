r"""Samplers: from a schedule to the coefficients of every step.

A step takes x_t to x_t' at the next, less noisy timestep t' (primes below; abar' = 1 at the end):

    x0_hat = u x_t + w pred
    x_t'   = A x_t + B clip(x0_hat) + C x0_prev + sigma z,     z ~ N(0, I)

A sampler is a function that gives these numbers for K steps. Nothing else of it reaches a kernel.
"""

__all__ = ["SAMPLERS", "StepTable", "ancestral", "ddim", "dpmpp_2m", "karras_timesteps", "strided_timesteps"]

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from .checks import whole
from .parameterization import variance as make_variance
from .parameterization import x_start_rows
from .schedules import NoiseSchedule


@dataclass(frozen=True)
class StepTable:
    """K steps in the order in which they are taken, each field of shape (K,): t int64, the others float64."""

    t: Tensor
    u: Tensor
    w: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.t)

    @property
    def rows(self) -> Tensor:
        """The coefficients as `ops.reverse_step` takes them: (u, w, A, B, C, sigma), shape (K, 6), float64."""
        return torch.stack([getattr(self, field.name) for field in fields(self)[1:]], dim=1)


def strided_timesteps(timesteps: int, steps: int | Sequence[int]) -> Tensor:
    """The timesteps that K steps visit, from the noisiest on.

    Args:
        timesteps: T of the schedule.
        steps: K of them, evenly strided and always with T - 1; or the timesteps themselves, in any order.

    Returns:
        Shape (K,), int64, falling.

    Raises:
        ValueError: more steps than timesteps, or timesteps outside [0, T) or given twice.
    """
    if _is_count(steps):
        steps = whole("steps", steps, 1, timesteps + 1)
        return torch.linspace(-1, timesteps - 1, steps + 1, device="cpu").long()[1:].flip(0)
    chosen = torch.as_tensor(steps, device="cpu")
    if chosen.ndim != 1 or not len(chosen) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"steps must be a whole number or a list of whole timesteps, got {steps!r}")
    if chosen.min() < 0 or chosen.max() >= timesteps or len(chosen.unique()) < len(chosen):
        raise ValueError(f"timesteps must be distinct and lie in [0, {timesteps}); got {chosen.tolist()}")
    return chosen.long().sort(descending=True).values


def karras_timesteps(schedule: NoiseSchedule, steps: int | Sequence[int]) -> Tensor:
    """As `strided_timesteps`, but of K the strides are even in (s / a)^(1/7). Karras et al. (2022), eq. 5.

    More of them than of even strides in t are at little noise, where details are made. They begin with T - 1 and go on
    below s / a = 80, the paper's sigma_max: beyond, x_t says nothing of x_0.
    """
    t = strided_timesteps(len(schedule), steps)
    if not _is_count(steps):
        return t
    noise = schedule.snr.rsqrt()  # per signal, rising with t
    ends = (noise[i].clamp(max=80).item() ** (1 / 7) for i in (-1, 0))
    roots = torch.linspace(*ends, len(t), dtype=torch.float64, device="cpu")
    nearest = (noise.log() - 7 * roots.log()[:, None]).abs().argmin(1)
    nearest[0] = t[0]
    # All distinct: where timesteps are sparser than steps, each is at least one below the one before.
    order = torch.arange(len(t), device="cpu")
    return torch.maximum((nearest + order).cummin(0).values - order, order.flip(0))


def _is_count(steps: int | Sequence[int]) -> bool:
    return hasattr(steps, "__index__") and not isinstance(steps, Tensor)


def _abar_pairs(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """abar at each timestep and at the next one, 1 after the last."""
    abar = schedule.alphas_cumprod[t]
    return abar, torch.cat([abar[1:], abar.new_ones(1)])


def ancestral(
    schedule: NoiseSchedule,
    objective: str,
    steps: int | Sequence[int] | None = None,
    *,
    variance: str = "posterior",
) -> StepTable:
    """Ancestral sampling. Ho et al. (2020), algorithm 2; strided as in Nichol & Dhariwal (2021), sec. 4.

    Args:
        steps: as in `strided_timesteps`; None for all.
        variance: sigma^2 = `beta` or `posterior` (those of the strided chain).
    """
    t = strided_timesteps(len(schedule), len(schedule) if steps is None else steps)
    abar, abar_next = _abar_pairs(schedule, t)
    chain = NoiseSchedule((1 - abar / abar_next).flip(0))  # the visited timesteps are a schedule of their own
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


def ddim(
    schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None, *, eta: float = 0.0
) -> StepTable:
    """DDIM. Song et al. (2021), eq. 12 and 16, with eps found again from the clipped x0_hat.

    Args:
        steps: as in `strided_timesteps`; None for all.
        eta: 0 is deterministic, 1 has the posterior variance; larger ones as long as a step's variance allows.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    t = strided_timesteps(len(schedule), len(schedule) if steps is None else steps)
    abar, abar_next = _abar_pairs(schedule, t)
    a, s, a_next = abar.sqrt(), (1 - abar).sqrt(), abar_next.sqrt()
    sigma = eta * ((1 - abar_next) / (1 - abar)).sqrt() * (1 - abar / abar_next).sqrt()
    direction2 = 1 - abar_next - sigma**2  # the variance that is left for the noise already there
    if (direction2 < -1e-12).any():
        raise ValueError(f"eta = {eta} gives some of these {len(t)} steps more noise than x_t' may hold; take less")
    direction = direction2.clamp(min=0).sqrt()
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    return StepTable(t=t, u=u, w=w, A=direction / s, B=a_next - direction * a / s, C=torch.zeros_like(u), sigma=sigma)


def dpmpp_2m(
    schedule: NoiseSchedule, objective: str, steps: int | Sequence[int] | None = None, *, sde: bool = False
) -> StepTable:
    """DPM-Solver++(2M). Lu et al. (2022), algorithm 2, of second order in the steps of lambda = log(a / s).

    x0_hat is extrapolated linearly in lambda from the last two to the middle of the step. The first step has one
    alone, and the last, to lambda' = infinity, returns its x0_hat: both are of first order, where this is DDIM.

    Args:
        steps: as in `karras_timesteps`; None for all. Of those given, a step many times as long as the one before
            extrapolates as far.
        sde: SDE-DPM-Solver++(2M) of the same paper, which adds noise; at first order, DDIM with eta = 1.
    """
    t = karras_timesteps(schedule, len(schedule) if steps is None else steps)
    abar, abar_next = _abar_pairs(schedule, t)
    s, a_next, s_next = (1 - abar).sqrt(), abar_next.sqrt(), (1 - abar_next).sqrt()
    h = ((abar_next / (1 - abar_next)).log() - (abar / (1 - abar)).log()) / 2
    ahead = torch.zeros_like(h)  # 1 / 2r: from x0_hat to the middle of this step, as a share of the step before
    ahead[1:-1] = h[1:-1] / (2 * h[:-2])
    gain = -a_next * torch.expm1(-2 * h if sde else -h)
    u, w = (row[t] for row in x_start_rows(schedule, objective))
    return StepTable(
        t=t,
        u=u,
        w=w,
        A=s_next / s * ((-h).exp() if sde else 1),
        B=gain * (1 + ahead),
        C=-gain * ahead,
        sigma=s_next * (-torch.expm1(-2 * h)).sqrt() if sde else torch.zeros_like(h),
    )


SAMPLERS = {"ddpm": ancestral, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": partial(dpmpp_2m, sde=True)}
