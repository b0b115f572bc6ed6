"""Sampling from a trained model into files."""

__all__ = ["write_samples"]

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..training.pictures import save_grid, save_images
from ..training.trainer import Run
from .distributed import Processes, joined

REPORTS = 20  # a batch: so few that to wait for the device costs nothing, and the bar shows what it has done
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"  # n is not whole


def write_samples(
    run: Run, out: Path, *, n: int, seed: int = 0, sampler: str | None = None, steps: int | None = None
) -> str:
    """Samples n images, in batches as large as those of the training, and writes them.

    Where a launcher such as torchrun has started several processes, all call it and share the images. If there is a
    whole batch for each of them, the batches are those of one process, and so are the images: bit for bit on equal
    devices with as many threads. Fewer images are dealt in smaller batches, and are the same to the rounding of the
    network.

    Args:
        out: NAME.png (.jpg, ...) for one grid; else a folder, made if need be, for one PNG an image. All processes
            write to it, each image as soon as its batch is done.

    Returns:
        What was written, by all processes together, to tell the user.

    Raises:
        ValueError: n below 1, steps or a seed that cannot be, or a format that cannot be written.
        RunError: another process has ended.
    """
    if n < 1:
        raise ValueError(f"the number of images must be at least 1, got {n}")
    table = run.diffusion.step_table(sampler, steps)
    picture_format = Image.registered_extensions().get(out.suffix.lower())
    one_file = picture_format is not None
    if one_file and picture_format not in Image.SAVE:
        raise ValueError(f"{out}: {picture_format} pictures can be read, but not written; take .png")
    (out.parent if one_file else out).mkdir(parents=True, exist_ok=True)
    with (
        joined() as processes,
        tqdm(desc="sampling", total=n, unit=" images", bar_format=BAR, disable=processes.rank > 0) as bar,
    ):

        def report(done: int = 0) -> None:  # in steps of an image
            bar.update(processes.add(done) / len(table) - bar.n)

        batches = _batches(run, n, len(table), processes, report, seed=seed, sampler=sampler, steps=steps)
        if one_file:
            mine = list(batches)
            processes.wait(report)
            every = dict(processes.gather(mine))
            if processes.rank == 0:
                save_grid(torch.cat([every[first] for first in sorted(every)]), out)
        else:
            for first, images in batches:
                save_images(images, out, first)
        processes.wait(report)
    return f"{out}: a grid of {n} images" if one_file else f"{out}: {n} images"


def _batches(
    run: Run, n: int, taken: int, processes: Processes, report: Callable[[int], None], **chosen: Any
) -> Iterator[tuple[int, Tensor]]:
    """This process' share of n images, each sampled in `taken` steps: the index of a batch's first one, and the batch.

    The last step of a batch is reported when the next one is asked for, since the images are then written.
    """
    size = min(run.config.training.batch_size, math.ceil(n / processes.count))
    for first in range(processes.rank * size, n, processes.count * size):
        length, done = min(size, n - first), 0
        states = run.diffusion.sample_progressive(
            length, every=math.ceil(taken / REPORTS), sample_offset=first, **chosen
        )
        for state in states:
            if state.x.device.type != "cpu":
                torch.accelerator.synchronize(state.x.device)
            if state.step < taken:
                report(length * (state.step - done))
                done = state.step
        yield first, state.x.cpu()
        report(length * (taken - done))
