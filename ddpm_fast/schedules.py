r"""Noise schedules: how fast the signal is destroyed.

The forward process of Ho et al. (2020) adds noise in T steps,

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                          (eq. 2)
    q(x_t | x_0)     = N(sqrt(abar_t) x_0, (1 - abar_t) I)                            (eq. 4)

with alpha_t = 1 - beta_t and abar_t = alpha_1 ... alpha_t. Here t counts from 0, so `betas[0]` is the paper's
beta_1. Everything is float64: 1 - abar_t of a float32 table is off by 1e-4 where there is little noise.
"""

__all__ = ["SCHEDULES", "NoiseSchedule", "make"]

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .checks import choice, integer, numbers, options

MAX_BETA = 0.999  # Nichol & Dhariwal (2021), sec. 3.2: keeps abar_T above 0


class NoiseSchedule:
    r"""The tables that follow from the betas: float64, on the CPU, shape (T,) each.

    Args:
        betas: T variances, each inside (0, 1): a tensor, an array or a list.
        name: what the schedule is called in error messages.
        zero_terminal_snr: the last beta may be 1, so that x_T holds no signal at all.

    Raises:
        ValueError: the betas are not one axis of finite numbers inside (0, 1).
    """

    def __init__(
        self, betas: Tensor | Sequence[float], *, name: str = "betas", zero_terminal_snr: bool = False
    ) -> None:
        betas = numbers(name, betas, torch.float64).clone()
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"{name}: betas must have the shape (timesteps,), got {tuple(betas.shape)}")
        outside = ~((betas > 0) & (betas < 1))  # true for NaN as well
        outside[-1] &= not (zero_terminal_snr and betas[-1] == 1)
        if outside.any():
            t = int(outside.nonzero()[0])
            raise ValueError(
                f"{name} with {len(betas)} timesteps has beta = {betas[t]:.6g} at t = {t}, and every beta must lie "
                f"inside (0, 1); take more timesteps, or other bounds for beta"
            )
        self.betas = betas

    def __len__(self) -> int:
        return len(self.betas)

    def with_zero_terminal_snr(self) -> "NoiseSchedule":
        """The schedule whose abar_T is 0: sqrt(abar), shifted and scaled. Lin et al. (2023), algorithm 1.

        Sampling begins with noise alone, and so should the training. Not for networks that predict eps.
        """
        a = self.sqrt_alphas_cumprod
        if len(a) == 1:
            raise ValueError("a schedule of one timestep cannot have a terminal SNR of 0: it would hold no signal")
        abar = ((a - a[-1]) * (a[0] / (a[0] - a[-1]))).square()
        return NoiseSchedule(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]]), zero_terminal_snr=True)

    @cached_property
    def alphas(self) -> Tensor:
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar_t: the share of the variance of x_t that is signal."""
        return self.alphas.cumprod(0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """abar_{t-1}, which is 1 at t = 0."""
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """a_t: the scale of x_0 in x_t."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """s_t: the scale of eps in x_t."""
        return (1 - self.alphas_cumprod).sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio a_t^2 / s_t^2."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0), eq. 7; 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """c0: the weight of x_0 in the mean of q(x_{t-1} | x_t, x_0), eq. 7."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """cx: the weight of x_t in the mean of q(x_{t-1} | x_t, x_0), eq. 7."""
        return (1 - self.alphas_cumprod_prev) * self.alphas.sqrt() / (1 - self.alphas_cumprod)


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")


def _from_abar(abar: Tensor) -> Tensor:
    """Betas of abar at the T + 1 borders of the steps."""
    return (1 - abar[1:] / abar[:-1]).clamp(max=MAX_BETA)


def linear(timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> Tensor:
    """Ho et al. (2020), sec. 4. Bounds left out are 1e-4 and 0.02 times 1000 / T: as much noise at any T."""
    scale = 1000 / timesteps
    beta_start = 1e-4 * scale if beta_start is None else beta_start
    beta_end = 0.02 * scale if beta_end is None else beta_end
    return _linspace(beta_start, beta_end, timesteps)


def quadratic(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Linear in the standard deviation. The bounds hold for T = 1000; fewer steps need larger ones."""
    return _linspace(math.sqrt(beta_start), math.sqrt(beta_end), timesteps) ** 2


def cosine(timesteps: int, s: float = 0.008) -> Tensor:
    """abar = cos^2, with offset s against too little noise at t = 0. Nichol & Dhariwal (2021), eq. 17."""
    angle = (_linspace(0, 1, timesteps + 1) + s) / (1 + s) * (math.pi / 2)
    abar = angle.cos() ** 2
    return _from_abar(abar)


def sigmoid(timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """A sigmoid on abar. Jabri et al. (2022), algorithm 1; better than cosine at 64x64 and above."""
    v_start, v_end = (1 / (1 + math.exp(-v / tau)) for v in (start, end))
    v = torch.sigmoid((_linspace(0, 1, timesteps + 1) * (end - start) + start) / tau)
    return _from_abar((v_end - v) / (v_end - v_start))


def sigmoid_beta(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """A sigmoid on the betas themselves. The bounds hold for T = 1000; fewer steps need larger ones."""
    return torch.sigmoid(_linspace(-6, 6, timesteps)) * (beta_end - beta_start) + beta_start


def constant(timesteps: int, beta_end: float = 0.02) -> Tensor:
    """One beta for every step."""
    return torch.full((timesteps,), beta_end, dtype=torch.float64, device="cpu")


def jsd(timesteps: int) -> Tensor:
    """beta_t = 1 / (T - t): abar falls linearly. Sohl-Dickstein et al. (2015), sec. 2.4.1. The last beta would be 1."""
    return (1 / _linspace(timesteps, 1, timesteps)).clamp(max=MAX_BETA)


def warmup10(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Constant after a linear rise over the first tenth. The bounds hold for T = 1000."""
    return _warmup(timesteps, beta_start, beta_end, 0.1)


def warmup50(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Constant after a linear rise over the first half. The bounds hold for T = 1000."""
    return _warmup(timesteps, beta_start, beta_end, 0.5)


def _warmup(timesteps: int, beta_start: float, beta_end: float, share: float) -> Tensor:
    betas = constant(timesteps, beta_end)
    rising = int(timesteps * share)
    betas[:rising] = _linspace(beta_start, beta_end, rising)
    return betas


# A function from T, and arguments of its own, to betas of shape (T,), float64. Functions added here are found by name.
SCHEDULES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (linear, quadratic, cosine, sigmoid, sigmoid_beta, constant, jsd, warmup10, warmup50)
}


def make(name: str, timesteps: int, **kwargs: float) -> NoiseSchedule:
    """A schedule by its name.

    Args:
        name: one of `SCHEDULES`: linear, quadratic, cosine, sigmoid (on abar), sigmoid_beta, constant, jsd,
            warmup10, warmup50.
        timesteps: T, at least 1.
        kwargs: the named function's own arguments, such as `beta_end`.

    Raises:
        ValueError: an unknown name or argument, or betas that leave (0, 1), as linear's do for T <= 20.
    """
    choice("beta_schedule", name, SCHEDULES)
    timesteps = integer("timesteps", timesteps, 1)
    options(f"beta_schedule {name!r}", SCHEDULES[name], kwargs, skip=1)
    try:
        betas = SCHEDULES[name](timesteps, **kwargs)
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"beta_schedule {name!r} cannot be made of {kwargs}: {error}") from None
    return NoiseSchedule(betas, name=f"beta_schedule {name!r}")
