"""How well a trained model explains images: the variational bound, in bits/dim."""

__all__ = ["Evaluation", "evaluate"]

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..training.config import DataConfig, DigitsData
from ..training.data import DataError, open_data
from ..training.files import write_text
from ..training.pictures import save_bound
from ..training.run import Run

BINS = 50  # of timesteps, in likelihood.json


@dataclass(frozen=True)
class Evaluation:
    """Means over n images, in bits/dim unless they say otherwise, and standard errors of these means.

    Attributes:
        data: what the images are of.
        steps: the timesteps that were evaluated for each image.
        total, total_error: the variational bound.
        prior: L_T; transitions: the sum of L_1 ... L_{T-1}; reconstruction: L_0.
        nats: the bound of a whole image, in nats.
        curve: (first, last, term, x_start_mse, eps_mse) of ranges of timesteps: the mean term of one timestep, and
            mean squared errors of x0_hat and eps.
    """

    data: str
    n: int
    steps: int
    total: float
    total_error: float
    prior: float
    transitions: float
    reconstruction: float
    nats: float
    precision: str
    curve: list[tuple[int, int, float, float, float]]

    def __str__(self) -> str:
        rows = {
            "bits/dim, at most": f"{self.total:.4f} +- {self.total_error:.4f}",
            "  L_T, the prior": f"{self.prior:.2g}",
            "  L_1 ... L_{T-1}": f"{self.transitions:.4f}",
            "  L_0, the decoder": f"{self.reconstruction:.4f}",
            "nats an image": f"{self.nats:.1f}",
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
        return "\n".join([f"{self.n} images of {self.data}, {self.steps} timesteps each, {self.precision}", *lines])


def evaluate(
    run: Run,
    *,
    real: str | Path | None = None,
    n: int = 1000,
    steps: int | None = 100,
    seed: int = 0,
    precision: str = "auto",
) -> Evaluation:
    """The variational bound of images under a trained model; writes likelihood.json and likelihood.png into its folder.

    Args:
        real: the images, in a file or folder of the kind that the run was trained on; None for those of the training,
            whose bound is lower than that of images which the model has not seen.
        n: how many of them, chosen by the seed; all, if there are fewer.
        steps: timesteps that are evaluated for each image; None for all. See `GaussianDiffusion.likelihood`.
        precision: that the network is computed in: `auto`, `fp32`, `bf16` or `fp16`. The bound is float32.

    Raises:
        DataError: the images cannot be read, or are of another size.
        ValueError: n below 2, or steps that cannot be.
    """
    if n < 2:
        raise ValueError(f"the number of images must be at least 2, got {n}")
    config = _data(run.config.data, real)
    data = open_data(config)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    wanted, given = (run.diffusion.channels, *run.diffusion.image_size), tuple(data[chosen[:1]].shape[1:])
    if given != wanted:
        raise DataError(f"the images are {given} (channels, H, W), and the model takes {wanted}")
    reduced = run.in_precision(precision)
    diffusion, size = reduced.diffusion, run.config.training.batch_size
    found = []
    for first in tqdm(range(0, len(chosen), size), "evaluating", unit="batch"):
        images = data[chosen[first : first + size]].to(diffusion.device)
        found.append(diffusion.likelihood(images, steps=steps, seed=seed, sample_offset=first))
    total, prior, vb, t, x_start_mse, eps_mse = (
        torch.cat([getattr(part, name) for part in found]).double().cpu()
        for name in ("total_bpd", "prior_bpd", "vb", "t", "x_start_mse", "eps_mse")
    )
    mean, reconstruction = total.mean().item(), vb[:, 0].mean().item()
    evaluation = Evaluation(
        data=str(getattr(config, "path", config.name)),
        n=len(chosen),
        steps=vb.shape[1],
        total=mean,
        total_error=total.std().item() / math.sqrt(len(chosen)),
        prior=prior.mean().item(),
        transitions=mean - prior.mean().item() - reconstruction,
        reconstruction=reconstruction,
        nats=mean * found[0].size * math.log(2),
        precision=next(str(p.dtype).removeprefix("torch.") for p in diffusion.model.parameters()),
        curve=_curve(t.long(), torch.stack([vb, x_start_mse, eps_mse]), diffusion.num_timesteps),
    )
    write_text(run.folder / "likelihood.json", json.dumps(asdict(evaluation), indent=2) + "\n")
    save_bound(evaluation.curve, run.folder / "likelihood.png")
    return evaluation


def _data(config: DataConfig, real: str | Path | None) -> DataConfig:
    if real is None:
        return config
    if isinstance(config, DigitsData):
        raise DataError(f"the run was trained on the digits, which come with scikit-learn and not from {real}")
    return config.model_copy(update={"path": Path(real)})


def _curve(t: torch.Tensor, values: torch.Tensor, timesteps: int) -> list[tuple[int, int, float, float, float]]:
    """Means of the values, (3, N, K), over ranges of timesteps, finer towards t = 0; those without any are left out."""
    ends = torch.logspace(0, math.log10(timesteps), BINS + 1, dtype=torch.float64).round().long().unique()
    curve = []
    for first, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
        inside = (t >= first) & (t < end)
        if inside.any():
            curve.append((first, end - 1, *(value[inside].mean().item() for value in values)))
    return curve
