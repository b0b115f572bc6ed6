"""What a training tells of itself: metrics.json, the plots of its loss, and previews of what it has learned."""

__all__ = ["preview_path", "write_preview", "write_report"]

from collections.abc import Callable
from pathlib import Path

import torch

from ..info import versions
from .pictures import save_grid
from .plots import save_loss, save_timestep_losses
from .progress import Progress
from .run import Run, sample_batches
from .speed import Speed
from .timestep_losses import TimestepLosses

PREVIEW_STEPS = 50  # of DDIM


def write_report(run: Run, progress: Progress, timestep_losses: TimestepLosses, speed: Speed) -> None:
    """Writes metrics.json, loss.png and loss_by_timestep.png."""
    p, config = progress, run.config
    curve = timestep_losses.curve(p.step)
    rate = p.step * config.training.batch_size / p.seconds if p.seconds else None
    share = speed.share(rate) if rate else None
    run.metrics = {
        "loss": p.loss(),
        "steps": p.step,
        "images_per_second": round(rate, 1) if rate else None,
        "share_of_peak": round(share, 4) if share else None,
        "seconds": round(p.seconds, 1),
        "seed": config.seed,
        "device": str(run.diffusion.device),
        "precision": speed.precision,
        "versions": versions(),
        "skipped_steps": p.skipped_steps,
        "loss_by_timestep": curve,
        "history": p.history,
    }
    run.write_metrics()
    save_loss(p.history, run.folder / "loss.png")
    length, means = timestep_losses.image(p.step)
    save_timestep_losses(curve, means, length, run.diffusion.num_timesteps, run.folder / "loss_by_timestep.png")


def preview_path(folder: Path, step: int) -> Path:
    return folder / "previews" / f"step-{step:08d}.png"


def write_preview(run: Run, path: Path, precision: str, report: Callable[[int], object]) -> None:
    """Writes a grid of 16 samples, always of the same noise.

    Args:
        report: called now and then while the images are sampled.

    Raises:
        OSError: the picture cannot be written.
        RunError: an image has values that are not finite.
    """
    how = {"sampler": "ddim", "steps": min(PREVIEW_STEPS, run.diffusion.num_timesteps), "eta": 0.0}
    how["seed"], reduced = run.config.seed, run.in_precision(precision)
    images = torch.cat([images for _, images in sample_batches(reduced, 16, report=report, **how)])
    path.parent.mkdir(exist_ok=True)
    save_grid(images, path, receipt=reduced.receipt(16, **how))
