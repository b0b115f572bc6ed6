"""Which timesteps a sampler visits."""

__all__ = ["karras_timesteps", "strided_timesteps"]

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import integer
from ..schedules import NoiseSchedule


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


def abar_pairs(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """abar at each timestep and at the next one, 1 after the last."""
    abar = schedule.alphas_cumprod[t]
    return abar, torch.cat([abar[1:], abar.new_ones(1)])
