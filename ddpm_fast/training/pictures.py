"""Picture files: images, grids of images, and curves."""

__all__ = [
    "PictureError",
    "save_course",
    "save_evaluation",
    "save_grid",
    "save_images",
    "save_loss",
    "save_timestep_losses",
    "to_uint8",
]

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


class PictureError(ValueError):
    """The values cannot be shown."""


def to_uint8(images: Tensor) -> Tensor:
    """Rounds [0, 1] to the nearest of 0 ... 255, on the CPU. Values outside [0, 1] are clipped.

    Args:
        images: (N, C, H, W).

    Raises:
        PictureError: a value is NaN or infinite.
    """
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise PictureError(
            f"{int((~finite).sum())} of {len(images)} images have values that are NaN or infinite, which no picture "
            "can show. If a model has sampled them, its weights are probably not finite: the training has diverged"
        )
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def _to_pil(image: Tensor) -> Image.Image:
    """(C, H, W), uint8, of 1 or 3 channels."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


@contextmanager
def _replaced(path: str | Path) -> Iterator[Path]:
    """A temporary file to write, which then takes the place of `path`. After an exception, `path` is as it was."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save(picture: Image.Image, path: str | Path) -> None:
    with _replaced(path) as temporary:
        picture.save(temporary, Image.registered_extensions()[Path(path).suffix.lower()])


def save_grid(images: Tensor, path: str | Path, columns: int | None = None) -> None:
    """Saves a grid of images as one picture. Images of fewer than 48 pixels are enlarged to about that size.

    Args:
        images: (N, C, H, W), in [0, 1].
        columns: the number of columns; None for a square grid.

    Raises:
        PictureError: a value is NaN or infinite.
    """
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, gap = math.ceil(n / columns), 1
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(to_uint8(images)):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[:, y : y + h, x : x + w] = image
    scale = max(1, round(48 / h))
    _save(_to_pil(sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)), path)


def save_images(images: Tensor, folder: str | Path, first: int = 0) -> None:
    """Saves each image as a PNG file of its own in an existing folder.

    Args:
        images: (N, C, H, W), in [0, 1].
        first: the number in the name of the first file.

    Raises:
        PictureError: a value is NaN or infinite. No file is written.
    """
    for i, image in enumerate(to_uint8(images), first):
        _save(_to_pil(image), Path(folder, f"{i:06d}.png"))


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
    with _replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


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
    with _replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


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
    with _replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


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
    with _replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
