"""Sampling from a trained model into files."""

__all__ = ["write_samples"]

from pathlib import Path

import torch
from PIL import Image

from ..training.pictures import save_grid, save_images
from ..training.run import Run, sample_batches, sampling_bar
from .distributed import joined


def write_samples(
    run: Run,
    out: Path,
    *,
    n: int,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    precision: str = "auto",
) -> str:
    """Samples n images, in batches as large as those of the training, and writes them.

    If a launcher such as torchrun has started several processes, all of them call this function and share the images.
    If there is a full batch for each process, the batches and therefore the images are those of a single process, bit
    for bit on equal devices with the same number of threads. Otherwise the batches are smaller, and the images agree
    up to the rounding of the network.

    Args:
        out: NAME.png (.jpg, ...) for one grid; otherwise a folder, created if necessary, for one PNG per image. All
            processes write to it, each image as soon as its batch is finished. PNG files have a receipt, with which
            `reproduce` makes them again; other formats have none.
        precision: that the network is computed in: `auto`, `fp32`, `bf16` or `fp16`.

    Returns:
        A description of what all processes have written, for the user.

    Raises:
        ValueError: n is below 1, the steps or the seed are out of range, or the format cannot be written.
        RunError: another process has ended, or an image has values that are not finite.
    """
    if n < 1:
        raise ValueError(f"the number of images must be at least 1, got {n}")
    table = run.diffusion.step_table(sampler, steps, spacing=spacing)
    run.diffusion.noise_source(run.diffusion.betas, seed)  # validates the seed before a folder is made
    picture_format = Image.registered_extensions().get(out.suffix.lower())
    one_file = picture_format is not None
    if one_file and picture_format not in Image.SAVE:
        raise ValueError(f"{out}: {picture_format} pictures can be read, but not written; take .png")
    (out.parent if one_file else out).mkdir(parents=True, exist_ok=True)
    run = run.in_precision(precision)
    with joined() as processes, sampling_bar(n, disable=processes.rank > 0) as bar:

        def report(done: int = 0) -> None:
            bar.update(processes.add(done) / len(table) - bar.n)

        how = {"seed": seed, "sampler": sampler, "steps": steps, "spacing": spacing}
        receipt = run.receipt(n, batch_size=run.batch_size(n, processes.count), **how)
        batches = sample_batches(run, n, **how, rank=processes.rank, count=processes.count, report=report)
        if one_file:
            mine = list(batches)
            processes.wait(report)
            every = dict(processes.gather(mine))
            if processes.rank == 0:
                save_grid(torch.cat([every[first] for first in sorted(every)]), out, receipt=receipt)
        else:
            for first, images in batches:
                save_images(images, out, first, receipt)
        processes.wait(report)
    return f"{out}: a grid of {n} images" if one_file else f"{out}: {n} images"
