"""Which timesteps a sampler visits."""

__all__ = ["SPACINGS", "karras_timesteps", "spaced_timesteps", "strided_timesteps"]

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import choice, integer
from ..schedules import NoiseSchedule

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MOST_NOISE = 80  # s / a of x_t that says nothing of x_0: sigma_max of Karras et al. (2022)


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
    if is_count(steps):
        steps = integer("steps", steps, 1, timesteps + 1)
        return torch.linspace(-1, timesteps - 1, steps + 1, device="cpu").long()[1:].flip(0)
    try:
        chosen = torch.as_tensor(steps, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        chosen = torch.tensor(math.nan, device="cpu")
    if chosen.ndim != 1 or not len(chosen) or chosen.dtype not in INTEGERS:
        raise ValueError(f"steps must be an integer or a list of timesteps, got {steps!r}")
    if chosen.min() < 0 or chosen.max() >= timesteps or len(chosen.unique()) < len(chosen):
        raise ValueError(f"timesteps must be distinct and lie in [0, {timesteps}); got {chosen.tolist()}")
    return chosen.long().sort(descending=True).values


def karras_timesteps(schedule: NoiseSchedule, steps: int | Sequence[int]) -> Tensor:
    """As `strided_timesteps`, but of K the strides are even in (s / a)^(1/7). Karras et al. (2022), eq. 5.

    More of them than of even strides in t are at little noise, where details are made. They begin with T - 1 and go on
    below s / a = 80, the paper's sigma_max: beyond, x_t says nothing of x_0.
    """
    return spaced_timesteps(schedule, steps, "karras")


def spaced_timesteps(schedule: NoiseSchedule, steps: int | Sequence[int], spacing: str) -> Tensor:
    """As `strided_timesteps`, with a spacing by its name.

    Args:
        schedule: of T timesteps.
        steps: K; or the timesteps themselves, whose spacing is their own.
        spacing: a name in `SPACINGS`.
    """
    space = SPACINGS[choice("spacing", spacing, SPACINGS)]
    if not is_count(steps):
        return strided_timesteps(len(schedule), steps)
    return space(schedule, integer("steps", steps, 1, len(schedule) + 1))


def is_count(steps: int | Sequence[int]) -> bool:
    """Whether `steps` is a number of them, and not the timesteps themselves."""
    return hasattr(steps, "__index__") and not hasattr(steps, "__len__")  # which arrays and tensors have


def abar_pairs(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """abar at each timestep and at the next one, 1 after the last."""
    abar = schedule.alphas_cumprod[t]
    return abar, torch.cat([abar[1:], abar.new_ones(1)])


def lambda_steps(abar: Tensor, abar_next: Tensor) -> Tensor:
    """h = lambda' - lambda of each step, with lambda = log(a / s); infinite for the last one."""
    return ((abar_next / (1 - abar_next)).log() - (abar / (1 - abar)).log()) / 2


# Spacings: K timesteps of a schedule, falling


def even(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Even in t, rounded down, from T - 1 on. The last step is as long as the others: to x_0 from T / K - 1."""
    return strided_timesteps(len(schedule), steps)


def trailing(schedule: NoiseSchedule, steps: int) -> Tensor:
    """round(T - i T / K) - 1, as `even` but rounded to the nearest. Lin et al. (2024), table 2; diffusers' rounding."""
    strides = torch.arange(steps, dtype=torch.float64, device="cpu") * (len(schedule) / steps)
    return (len(schedule) - strides).round().long() - 1


def leading(schedule: NoiseSchedule, steps: int) -> Tensor:
    """i floor(T / K), down to 0, which leaves out the noisiest timesteps. Lin et al. (2024), table 2."""
    return torch.arange(steps - 1, -1, -1, device="cpu") * (len(schedule) // steps)


def quadratic(schedule: NoiseSchedule, steps: int) -> Tensor:
    """floor(c i^2) - 1 with c = T / K^2, dense at little noise. Song et al. (2021), appendix D.2, counted from 0.

    The paper chooses c so that the last is close to T; here it is T - 1.
    """
    i = torch.arange(steps, 0, -1, device="cpu")
    return _distinct(len(schedule) * i**2 // steps**2 - 1)


def karras(schedule: NoiseSchedule, steps: int) -> Tensor:
    """As even in (s / a)^(1/7) as integers can be: see `karras_timesteps`."""
    first, last = (noise ** (1 / 7) for noise in _ends(schedule))
    return _nearest(schedule, 7 * torch.linspace(first, last, steps, dtype=torch.float64, device="cpu").log())


def log_snr(schedule: NoiseSchedule, steps: int) -> Tensor:
    """As even in lambda = log(a / s) as integers can be, below s / a = 80, as DPM-Solver's steps; Lu et al. (2022)."""
    first, last = (math.log(noise) for noise in _ends(schedule))
    return _nearest(schedule, torch.linspace(first, last, steps, dtype=torch.float64, device="cpu"))


# A function from (schedule, K) to K distinct timesteps in [0, T), shape (K,), int64, falling, for 1 <= K <= T.
# Functions added here are found by name.
SPACINGS: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "even": even,
    "trailing": trailing,
    "leading": leading,
    "karras": karras,
    "lambda": log_snr,
    "quadratic": quadratic,
}


def _ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """The most and the least s / a of a schedule, at most 80."""
    most, least = (schedule.snr[i].rsqrt().clamp(max=MOST_NOISE).item() for i in (-1, 0))
    return most, least


def _nearest(schedule: NoiseSchedule, log_noise: Tensor) -> Tensor:
    """T - 1, and then the timesteps whose log(s / a) is nearest to the wanted ones, which fall."""
    found = (-schedule.snr.log() / 2 - log_noise[:, None]).abs().argmin(1)
    found[0] = len(schedule) - 1
    return _distinct(found)


def _distinct(t: Tensor) -> Tensor:
    """Falling timesteps made distinct: each at least one below the one before, with room for those that follow."""
    order = torch.arange(len(t), device="cpu")
    return torch.maximum((t + order).cummin(0).values - order, order.flip(0))
