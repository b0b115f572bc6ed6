r"""Gaussian data, for which everything about a sampler is known exactly.

For x_0 ~ N(mu, v), in each component by itself, the best denoiser is

    E[x_0 | x_t] = mu + a v / (a^2 v + s^2) (x_t - a mu),     a = sqrt(abar_t), s = sqrt(1 - abar_t),

so that every step of a sampler is affine in x, and mean and variance after K steps follow from its coefficients. The
probability flow is linear: (x_t - a mu) / sqrt(a^2 v + s^2) does not change along it (Song et al., 2021).
"""

__all__ = ["Gaussian", "Network", "Reference", "reference", "rounding"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import samplers
from ..schedules import NoiseSchedule

ROUNDINGS = 16  # of the coefficients of one step and of its sums: more than any published step has in a row


class Gaussian:
    """Independent components, and the noise levels at which a network is asked about them.

    Four variances around a mean of 0, so that what the initial noise and each draw contribute is free of rounding of
    the mean; a mean of 0.6; and a single point (variance 0), from which every step's noise level can be read off.

    Args:
        abar: (T,), float64, falling.
    """

    MEANS = (0.0, 0.0, 0.0, 0.0, 0.6, 0.6)
    VARIANCES = (0.05, 0.25, 1.0, 4.0, 0.25, 0.0)
    SPREAD = slice(0, 5)  # the components that have a variance
    CENTRED = slice(0, 4)
    POINT = 5

    def __init__(self, abar: Tensor) -> None:
        self.abar = abar
        self.mean = torch.tensor(self.MEANS, dtype=torch.float64)
        self.variance = torch.tensor(self.VARIANCES, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.mean)

    def level(self, t: float) -> Tensor:
        """abar at a timestep. Between two, log((1 - abar) / abar) is interpolated; outside, the nearest is taken."""
        t = min(max(t, 0.0), len(self.abar) - 1.0)
        low = int(t)
        if low == t:
            return self.abar[low]
        logit = torch.logit(self.abar[low : low + 2])
        return torch.sigmoid(torch.lerp(logit[0], logit[1], t - low))

    def levels(self, t: list[float]) -> Tensor:
        return torch.stack([self.level(step) for step in t])

    def gain(self, abar: Tensor) -> Tensor:
        """The gain of E[x_0 | x_t] - mu on x_t - a mu, shape (..., D) for abar of shape (...)."""
        abar = abar[..., None]
        return abar.sqrt() * self.variance / (abar * self.variance + 1 - abar)

    def marginal(self, abar: Tensor) -> Tensor:
        """The variance of x_t, shape (..., D)."""
        return abar[..., None] * self.variance + 1 - abar[..., None]

    def flow(self, start: Tensor, end: Tensor) -> Tensor:
        """The factor of x_t - a mu along the probability flow from one abar to another, shape (D,)."""
        return (self.marginal(end) / self.marginal(start)).sqrt()


class Network:
    """The best denoiser as a network that predicts eps, x_0 or v; it records what it is asked.

    `t` and `x`, (N, D) in float64, are lists with an entry for each call.
    """

    def __init__(self, data: Gaussian, objective: str) -> None:
        self.data, self.objective = data, objective
        self.t: list[float] = []
        self.x: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The prediction for x, (N, D, 1, 1), at one timestep for all samples."""
        times = torch.as_tensor(t, dtype=torch.float64).flatten()
        if not len(times) or (times != times[0]).any():
            raise ValueError(f"the denoiser is asked at one timestep for all samples; got {t}")
        state = x.detach().to(torch.float64).reshape(x.shape[0], len(self.data))
        self.t.append(float(times[0]))
        self.x.append(state)
        return self.predict(state, self.data.level(self.t[-1])).to(x.dtype).reshape(x.shape)

    def predict(self, x: Tensor, abar: Tensor) -> Tensor:
        a, s = abar.sqrt(), (1 - abar).sqrt()
        x_start = self.data.mean + self.data.gain(abar) * (x - a * self.data.mean)
        if self.objective == "pred_x0":
            return x_start
        eps = (x - a * x_start) / s
        return eps if self.objective == "pred_noise" else a * eps - s * x_start


@dataclass(frozen=True)
class Reference:
    """Mean and variance, (D,), of what K steps of a published algorithm return, with their tolerances.

    sigma: (K,), the noise of each step, with its tolerance.
    """

    mean: Tensor
    variance: Tensor
    sigma: Tensor
    mean_tolerance: Tensor
    variance_tolerance: Tensor
    sigma_tolerance: Tensor


def reference(
    data: Gaussian, levels: Tensor, sampler: str, options: Mapping[str, Any], objective: str, eps: float
) -> Reference:
    """What a sampler of `ddpm_fast.samplers` returns from x_T ~ N(0, I), by its rows.

    The tolerances are bounds of first order for an implementation that rounds to `eps`: every coefficient of a step is
    off by `ROUNDINGS` eps of itself, and by as much as it changes when each abar that it depends on is off by that; the
    moments change by the sum over all coefficients of their derivatives times these errors.

    Args:
        levels: (K,), abar at the timesteps visited, rising. The last step goes to abar = 1.
        eps: of the implementation, such as 1.2e-7 for float32.

    Raises:
        ValueError: levels that do not rise.
    """
    table = _rows(levels, sampler, options, objective)  # (K, 6)
    error = ROUNDINGS * eps * table.abs()
    # A row depends on the level before, its own and the next: changed three apart, they do not meet in any row.
    for first in range(3):
        changed = levels.clone()
        changed[first::3] *= 1 - eps
        error += ROUNDINGS * (_rows(changed, sampler, options, objective) - table).abs()

    with torch.enable_grad():
        rows = table[..., None].expand(-1, -1, len(data)).clone().requires_grad_()
        mean, variance = _moments(data, levels, rows, table)
        (to_mean,) = torch.autograd.grad(mean.sum(), rows, retain_graph=True)
        (to_variance,) = torch.autograd.grad(variance.sum(), rows)
    return Reference(
        mean=mean.detach(),
        variance=variance.detach(),
        sigma=table[:, 5],
        mean_tolerance=(to_mean.abs() * error[..., None]).sum((0, 1)) + ROUNDINGS * eps,
        variance_tolerance=(to_variance.abs() * error[..., None]).sum((0, 1)) + ROUNDINGS * eps,
        sigma_tolerance=error[:, 5] + ROUNDINGS * eps,
    )


def _rows(levels: Tensor, sampler: str, options: Mapping[str, Any], objective: str) -> Tensor:
    """The rows (u, w, A, B, C, sigma) for steps from each level to the next; the levels are a schedule of their own."""
    following = torch.cat([levels[1:], levels.new_ones(1)])
    chain = NoiseSchedule((1 - levels / following).flip(0), name="the noise levels of the timesteps visited")
    return samplers.make(sampler, chain, objective, list(range(len(levels))), **options).rows


def _moments(data: Gaussian, levels: Tensor, rows: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the last x, (D,), for rows (K, 6, D) and a network whose prediction fits the exact rows."""
    gain = data.gain(levels)  # (K, D): x0_hat = gain x + shift
    shift = data.mean * (1 - levels.sqrt()[:, None] * gain)
    u, w = exact[:, 0, None], exact[:, 1, None]
    slope, offset = (gain - u) / w, shift / w  # of the prediction
    mean, previous_mean = torch.zeros_like(data.mean), torch.zeros_like(data.mean)
    var, cov, previous_var = torch.ones_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)  # of (x, x0_prev)
    for k in range(len(levels)):
        u_k, w_k, A, B, C, sigma = rows[k]
        to_start = u_k + w_k * slope[k]  # x0_hat = to_start x + start
        start = w_k * offset[k]
        through = A + B * to_start
        mean, previous_mean = through * mean + C * previous_mean + B * start, to_start * mean + start
        var, cov, previous_var = (
            through**2 * var + 2 * through * C * cov + C**2 * previous_var + sigma**2,
            to_start * (through * var + C * cov),
            to_start**2 * var,
        )
    return mean, var


def rounding(levels: Tensor, eps: float) -> Tensor:
    """What rounding to `eps` may add to states of about 1 by the time each level is reached, shape (K + 1,).

    For any sampler: x0_hat is found from x to within (s / a) eps, and a step to abar' multiplies that by no more than
    a'. The errors of all steps are added up. The last entry is for the result, at abar = 1.
    """
    following = torch.cat([levels[1:], levels.new_ones(1)])
    each = 1 + (following * (1 - levels) / levels).sqrt()
    return ROUNDINGS * eps * torch.cat([each.new_ones(1), 1 + each.cumsum(0)])
