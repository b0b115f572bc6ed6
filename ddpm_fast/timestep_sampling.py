r"""Which timesteps a training step takes.

The loss of a step estimates the mean of L_t over all T timesteps. Timesteps may be drawn with any probabilities p_t,
if each loss is weighted by 1 / (T p_t):

    E[L_t / (T p_t)] = sum_t p_t L_t / (T p_t) = (1 / T) sum_t L_t

`TIMESTEP_SAMPLERS` is a registry: a class that is added to it is found by its name, by configs and the trainer. A
sampler is a module with tensors on its device, where it works without the host and the same in every run:

    t, weights = sampler(n)     timesteps, (n,), int64, and the weights of their losses, (n,), float32
    sampler.update(t, losses)   tells the sampler the losses of these samples, (n,), without weights
"""

__all__ = ["TIMESTEP_SAMPLERS", "LossSecondMoments", "UniformTimesteps"]

import torch
from torch import Tensor, nn

from . import checks

UNITS = 2.0**40  # in which probabilities are counted, so that their sums are exact in any order
DRAWN = 2**62  # numbers from which a unit is drawn; some units are likelier than others by UNITS / DRAWN, 2^-22


class UniformTimesteps(nn.Module):
    """Every timestep with the same probability: the draws of `GaussianDiffusion.random_times`.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.num_timesteps = checks.integer("timesteps", timesteps, 1)
        self.register_buffer("one", torch.ones(()), persistent=False)  # knows the device

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, self.num_timesteps, (n,), device=self.one.device), self.one.expand(n)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Losses change nothing."""


class LossSecondMoments(nn.Module):
    """Timesteps with large losses more often: p_t proportional to sqrt(E[L_t^2]). Nichol & Dhariwal (2021), eq. 18.

    The expectation is that over the last losses of a timestep. Until every timestep has as many as are kept, timesteps
    are drawn uniformly. Losses that are not finite are left out.

    Args:
        timesteps: T.
        history: how many losses of a timestep are kept.
        uniform: the part of the probability that is shared alike by all timesteps, in [0, 1].
    """

    def __init__(self, timesteps: int, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        self.num_timesteps = checks.integer("timesteps", timesteps, 1)
        self.history = checks.integer("history", history, 1)
        self.uniform = checks.finite("uniform", uniform, 0)
        if self.uniform > 1:
            raise ValueError(f"uniform must be in [0, 1], got {uniform}")
        # The losses of timestep t are in t * history and after; the last element takes what is not to be kept.
        self.register_buffer("losses", torch.zeros(timesteps * history + 1))
        self.register_buffer("counts", torch.zeros(timesteps, dtype=torch.int64))  # of all losses so far

    def probabilities(self) -> Tensor:
        """p, (T,), float32."""
        units = self._units()
        return units.float() / units.sum()

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        units = self._units()
        upto = units.cumsum(0)  # integers: the same on every device and in every run
        drawn = torch.randint(0, DRAWN, (n,), device=units.device) % upto[-1]
        t = torch.searchsorted(upto, drawn, right=True)
        return t, upto[-1] / (self.num_timesteps * units[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Adds losses of samples at the timesteps t; where one timestep has more than are kept, the last ones count."""
        taken = losses.isfinite()
        same = (t[:, None] == t) & taken  # (n, n): the row of a sample has those of its timestep
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        kept = taken & (later < self.history)
        at = t * self.history + (self.counts[t] + earlier) % self.history
        # No element is written to twice with different values, so that the order of writing does not matter.
        self.losses[torch.where(kept, at, len(self.losses) - 1)] = torch.where(kept, losses.float(), 0.0)
        self.counts.index_put_((t,), taken.long(), accumulate=True)

    def _units(self) -> Tensor:
        """p in units of 1 / UNITS, about, (T,), int64."""
        losses = self.losses[:-1].view(self.num_timesteps, self.history)
        largest = losses.abs().amax().clamp(min=torch.finfo(losses.dtype).tiny)  # so that no square overflows
        p = (losses / largest).square().mean(1).sqrt()
        p = (1 - self.uniform) * p / p.sum() + self.uniform / self.num_timesteps
        # Where all losses are 0, and before every timestep has its losses, there is no other choice than uniform.
        known = (self.counts >= self.history).all() & p.isfinite().all()
        p = torch.where(known, p, 1 / self.num_timesteps)
        return (p * UNITS).long().clamp(min=1)


# From T to a sampler.
TIMESTEP_SAMPLERS: dict[str, type[nn.Module]] = {"uniform": UniformTimesteps, "loss_second_moment": LossSecondMoments}
