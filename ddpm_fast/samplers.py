r"""Samplers: from a schedule to the coefficients of every step.

A step takes x_t to x_t' at the next, less noisy timestep t' (primes below; abar' = 1 at the end):

    x0_hat = u x_t + w pred
    x_t'   = A x_t + B clip(x0_hat) + C x0_prev + sigma z,     z ~ N(0, I)

A sampler is a function from a schedule to these numbers for K steps, a `StepTable`. `SAMPLERS` is the registry: a
sampler that is added to it is found by its name, by `GaussianDiffusion`, configs and the command line.

Symbols: a = sqrt(abar) and s = sqrt(1 - abar) at t, a' and s' at t', lambda = log(a / s).
"""

__all__ = [
    "SAMPLERS",
    "StepTable",
    "ancestral",
    "ddim",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "karras_timesteps",
    "make",
    "strided_timesteps",
]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .checks import choice, finite, integer
from .checks import options as check_options
from .parameterization import variance as make_variance
from .parameterization import x_start_rows
from .schedules import NoiseSchedule


@dataclass(frozen=True)
class StepTable:
    """K steps in the order in which they are taken, each field of shape (K,): t int64, the others float64.

    Raises:
        ValueError: fields of different lengths, or coefficients that are not finite.
    """

    t: Tensor
    u: Tensor
    w: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, column in columns.items():
            if column.shape != (len(self.t),) or not column.isfinite().all():
                raise ValueError(
                    f"a StepTable of {len(self.t)} steps needs as many finite numbers in {name}; got {column}"
                )

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
        steps = integer("steps", steps, 1, timesteps + 1)
        return torch.linspace(-1, timesteps - 1, steps + 1, device="cpu").long()[1:].flip(0)
    chosen = torch.as_tensor(steps, device="cpu")
    if chosen.ndim != 1 or not len(chosen) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"steps must be an integer or a list of timesteps, got {steps!r}")
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
    return hasattr(steps, "__index__") and not hasattr(steps, "__len__")  # which arrays and tensors have


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
    abar, abar_next = _abar_pairs(schedule, t)
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
    finite("eta", eta, 0)
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
    abar, abar_next = _abar_pairs(schedule, t)
    h = ((abar_next / (1 - abar_next)).log() - (abar / (1 - abar)).log()) / 2
    half_ratio = torch.zeros_like(h)
    half_ratio[1:-1] = h[1:-1] / (2 * h[:-2])
    return t, abar, abar_next, h, half_ratio


# A function from (schedule, objective, steps) and options of its own to a StepTable.
SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}


def make(
    name: str,
    schedule: NoiseSchedule,
    objective: str,
    steps: int | Sequence[int] | None = None,
    **options: Any,
) -> StepTable:
    """The steps of a sampler by its name.

    Args:
        name: one of `SAMPLERS`: ddpm (`ancestral`), ddim, dpmpp_2m, dpmpp_2m_sde.
        schedule: of the forward process.
        objective: what the network predicts; a name in `parameterization.OBJECTIVES`.
        steps: how many, or the timesteps themselves; None for all.
        options: the sampler's own arguments, such as `eta` of ddim or `variance` of ddpm.

    Raises:
        ValueError: an unknown name or option, or steps that cannot be.
    """
    sampler = SAMPLERS[choice("sampler", name, SAMPLERS)]
    check_options(f"sampler {name!r}", sampler, options, skip=3)
    return sampler(schedule, objective, steps, **options)
