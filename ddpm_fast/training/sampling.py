"""Sampling from a trained model into files."""

__all__ = ["write_samples"]

from pathlib import Path

import torch

from .pictures import save_grid, save_images
from .trainer import Run


def write_samples(
    run: Run, out: Path, *, n: int, seed: int = 0, sampler: str | None = None, steps: int | None = None
) -> str:
    """Samples n images, in batches as large as those of the training, and writes them.

    Args:
        out: NAME.png for one grid; else a folder, made if need be, for one PNG an image.

    Returns:
        What was written, to tell the user.

    Raises:
        ValueError: n below 1, or steps or a seed that cannot be.
    """
    if n < 1:
        raise ValueError(f"the number of images must be at least 1, got {n}")
    one_file = out.suffix.lower() == ".png"
    (out.parent if one_file else out).mkdir(parents=True, exist_ok=True)
    size, kept = run.config.training.batch_size, []
    for first in range(0, n, size):
        images = run.diffusion.sample(
            min(size, n - first), sampler=sampler, steps=steps, seed=seed, sample_offset=first, progress=True
        )
        if one_file:
            kept.append(images.cpu())
        else:
            save_images(images, out, first)
    if one_file:
        save_grid(torch.cat(kept), out)
        return f"{out}: a grid of {n} images"
    return f"{out}: {n} images"
