"""Plots of a training and of an evaluation, as PNG files that name the program that wrote them."""

__all__ = ["save_course", "save_evaluation", "save_loss", "save_timestep_losses"]

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .files import replacing
from .pictures import PictureError
from .receipt import software

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_loss(history: list[tuple[int, float]], path: str | Path) -> None:
    """Plots the loss over the steps on logarithmic axes and saves the plot as a PNG file.

    Args:
        history: (step, loss) pairs.

    Raises:
        PictureError: a loss is NaN or infinite.
    """
    from matplotlib.figure import Figure  # not pyplot, which needs a display and has global state

    for step, loss in history:
        if not math.isfinite(loss):
            raise PictureError(f"the loss at step {step} is {loss}, which no plot can show")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(*zip(*history, strict=True))
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(which="both", alpha=0.3)
    _save(figure, path)


def save_evaluation(
    text: str, curve: list[tuple[int, int, float, float, float]], strips: dict[str, Tensor], path: str | Path
) -> None:
    """Saves the figures of an evaluation, plots of the variational bound and rows of images as one PNG file.

    Args:
        text: the figures.
        curve: (first timestep, last, term in bits/dim, mean squared error of x0_hat, and of eps) for each range of
            timesteps; if there are none, no plots.
        strips: titles, and up to 16 images each, uint8, (N, C, H, W), of 1 or 3 channels.
    """
    from matplotlib.figure import Figure

    width, lines = 10, 1 + text.count("\n")  # inches
    parts = [(0.15 + 0.17 * lines, partial(_draw_text, text=text))]
    if curve:
        parts.append((3.4, partial(_draw_bound, curve=curve)))
    for title, images in strips.items():
        row = _row(images)
        parts.append((0.3 + width * row.shape[0] / row.shape[1], partial(_draw_row, title=title, row=row)))
    heights = [height for height, _ in parts]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (_, draw) in zip(rows, parts, strict=True):
        draw(row)
    _save(figure, path)


def _draw_text(figure: Any, text: str) -> None:
    figure.text(0.01, 0.98, text, family="monospace", fontsize=9, verticalalignment="top")


def _draw_bound(figure: Any, curve: list[tuple[int, int, float, float, float]]) -> None:
    t = [1 + (first + last) / 2 for first, last, *_ in curve]
    left, right = figure.subplots(1, 2)
    left.loglog(t, [row[2] for row in curve])
    left.set(xlabel="t + 1", ylabel="bits/dim of one timestep")
    right.loglog(t, [row[3] for row in curve], label="x_0")
    right.loglog(t, [row[4] for row in curve], label="eps")
    right.set(xlabel="t + 1", ylabel="mean squared error")
    right.legend()
    for axes in (left, right):
        axes.grid(which="both", alpha=0.3)


def _row(images: Tensor) -> Tensor:
    """Places for 16 images side by side, uint8, (H, 16 W + 15, C)."""
    n, c, h, w = images.shape
    row = torch.full((c, h, 16, w + 1), 255, dtype=torch.uint8)
    row[:, :, :n, :w] = images.permute(1, 2, 0, 3)
    return row.flatten(2)[:, :, :-1].permute(1, 2, 0)


def _draw_row(figure: Any, title: str, row: Tensor) -> None:
    axes = figure.subplots()
    axes.imshow(row.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=9)
    axes.axis("off")


def save_course(
    points: list[dict[str, Any]],
    by_timestep: list[tuple[float, float]],
    preview: Path | None,
    title: str,
    path: str | Path,
) -> None:
    """Saves the course of a training as one picture: its loss, gradient norm and learning rate, and samples.

    Args:
        points: of progress.jsonl.
        by_timestep: (t, loss) pairs.
        preview: a picture of samples; None if there is none.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    (loss, samples), (others, timesteps) = figure.subplots(2, 2)
    for axes, name in ((loss, "loss"), (others, "grad_norm"), (others, "learning_rate")):
        curve = [(point["step"], point[name]) for point in points if point.get(name, 0) > 0]
        if curve:
            axes.loglog(*zip(*curve, strict=True), label=name)
    if by_timestep:
        timesteps.plot(*zip(*by_timestep, strict=True), label="loss")
        timesteps.set_yscale("log" if min(y for _, y in by_timestep) > 0 else "linear")
    for axes, label in ((loss, "step"), (others, "step"), (timesteps, "timestep")):
        axes.set(xlabel=label)
        axes.grid(which="both", alpha=0.3)
        if axes.lines:
            axes.legend()
    samples.axis("off")
    if preview is not None:
        with Image.open(preview) as picture:
            samples.imshow(picture.convert("RGB"))
    _save(figure, path)


def save_timestep_losses(
    curve: list[tuple[float, float]], means: Tensor, length: int, timesteps: int, path: str | Path
) -> None:
    """Plots the loss at each timestep, at the end and in the course of a training, and saves the plot as a PNG file.

    Args:
        curve: (t, loss) pairs; those above 0 are shown.
        means: the losses of stretches of the training at bins of timesteps, (stretches, bins); NaN where there is none.
        length: of a stretch, in steps.
        timesteps: T.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    at_the_end, course = figure.subplots(1, 2)
    at_the_end.semilogy(*zip(*((t, loss) for t, loss in curve if loss > 0), strict=True))
    at_the_end.set(xlabel="t", ylabel="loss, last quarter of the steps")
    at_the_end.grid(which="both", alpha=0.3)
    shown = torch.where(means > 0, means, torch.nan)
    if shown.nan_to_num().any():
        extent = (0, len(shown) * length, 0, timesteps)
        picture = course.imshow(shown.T.numpy(), norm=LogNorm(), extent=extent, origin="lower", aspect="auto")
        figure.colorbar(picture, label="loss")
    course.set(xlabel="step", ylabel="t")
    _save(figure, path)


def _save(figure: "Figure", path: str | Path) -> None:
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120, pil_kwargs={"pnginfo": software()})
