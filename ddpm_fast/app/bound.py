"""The variational bound of images under a trained model, in bits/dim."""

__all__ = ["Bound", "bound_of"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..likelihood import Likelihood
from ..training.data import ImageFiles, ImageTensor
from ..training.run import Run
from .distributed import Processes

BINS = 50  # of timesteps, in the curve


@dataclass(frozen=True)
class Bound:
    """Means over n images, in bits/dim unless they say otherwise, and standard errors of these means.

    Attributes:
        steps: the timesteps that were evaluated for each image.
        total, total_error: the variational bound.
        prior: L_T; transitions: the sum of L_1 ... L_{T-1}; reconstruction: L_0.
        nats: the bound of a whole image, in nats.
        curve: (first, last, term, x_start_mse, eps_mse) of ranges of timesteps: the mean term of one timestep, and
            mean squared errors of x0_hat and eps.
    """

    n: int
    steps: int
    total: float
    total_error: float
    prior: float
    transitions: float
    reconstruction: float
    nats: float
    curve: list[tuple[int, int, float, float, float]]

    def rows(self) -> dict[str, str]:
        """What it says, as a table of names and values."""
        return {
            "bits/dim, at most": f"{self.total:.4f} +- {self.total_error:.4f}",
            "  L_T, the prior": f"{self.prior:.2g}",
            "  L_1 ... L_{T-1}": f"{self.transitions:.4f}",
            "  L_0, the decoder": f"{self.reconstruction:.4f}",
            "nats an image": f"{self.nats:.1f}",
        }


def bound_of(
    run: Run, data: ImageTensor | ImageFiles, chosen: list[int], processes: Processes, *, steps: int | None, seed: int
) -> Bound | None:
    """The variational bound of some images of a data set, which the processes share.

    Args:
        chosen: the indices of at least 2 images.
        steps: timesteps that are evaluated for each image; None for all. See `GaussianDiffusion.likelihood`.
        seed: of the noise and the timesteps.

    Returns:
        The bound in the first process, None in the others.
    """
    diffusion = run.diffusion

    def likelihood(first: int, end: int) -> Likelihood:
        images = data[chosen[first:end]].to(diffusion.device)
        found = diffusion.likelihood(images, steps=steps, seed=seed, sample_offset=first)
        return Likelihood(**{name: x.cpu() if isinstance(x, Tensor) else x for name, x in vars(found).items()})

    found = processes.map_batches(len(chosen), run.config.training.batch_size, likelihood, "bound")
    if processes.rank > 0:
        return None
    total, prior, vb, t, x_start_mse, eps_mse = (
        torch.cat([getattr(part, name) for part in found]).double()
        for name in ("total_bpd", "prior_bpd", "vb", "t", "x_start_mse", "eps_mse")
    )
    mean, reconstruction = total.mean().item(), vb[:, 0].mean().item()
    return Bound(
        n=len(chosen),
        steps=vb.shape[1],
        total=mean,
        total_error=total.std().item() / math.sqrt(len(chosen)),
        prior=prior.mean().item(),
        transitions=mean - prior.mean().item() - reconstruction,
        reconstruction=reconstruction,
        nats=mean * found[0].size * math.log(2),
        curve=_curve(t.long(), torch.stack([vb, x_start_mse, eps_mse]), diffusion.num_timesteps),
    )


def _curve(t: Tensor, values: Tensor, timesteps: int) -> list[tuple[int, int, float, float, float]]:
    """Means of the values, (3, N, K), over ranges of timesteps, finer towards t = 0; those without any are left out."""
    ends = torch.logspace(0, math.log10(timesteps), BINS + 1, dtype=torch.float64).round().long().unique()
    curve = []
    for first, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
        inside = (t >= first) & (t < end)
        if inside.any():
            curve.append((first, end - 1, *(value[inside].mean().item() for value in values)))
    return curve
