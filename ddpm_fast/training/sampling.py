"""Sampling from a trained model into files."""

__all__ = ["write_samples"]

from pathlib import Path

import torch
from PIL import Image

from .pictures import save_grid, save_images
from .trainer import Run, sample_in_batches


def write_samples(
    run: Run, out: Path, *, n: int, seed: int = 0, sampler: str | None = None, steps: int | None = None
) -> str:
    """Samples n images, in batches as large as those of the training, and writes them.

    Args:
        out: NAME.png (.jpg, ...) for one grid; else a folder, made if need be, for one PNG an image.

    Returns:
        What was written, to tell the user.

    Raises:
        ValueError: n below 1, or steps or a seed that cannot be.
    """
    if n < 1:
        raise ValueError(f"the number of images must be at least 1, got {n}")
    one_file = out.suffix.lower() in Image.registered_extensions()
    (out.parent if one_file else out).mkdir(parents=True, exist_ok=True)
    batches = sample_in_batches(run, n, sampler=sampler, steps=steps, seed=seed)
    if one_file:
        save_grid(torch.cat(list(batches)), out)
        return f"{out}: a grid of {n} images"
    first = 0
    for images in batches:
        save_images(images, out, first)
        first += len(images)
    return f"{out}: {n} images"
