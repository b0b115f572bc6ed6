"""PNG files: grids of images, and the course of the loss."""

__all__ = ["save_grid", "save_images", "save_loss", "to_uint8"]

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to 0 ... 255, rounded to the nearest, what lies outside clipped."""
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def _to_pil(image: Tensor) -> Image.Image:
    """(C, H, W), uint8, of 1 or 3 channels."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _save(picture: Image.Image, path: Path) -> None:
    """`path` is whole or not there, as it was, if the save is interrupted."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        picture.save(temporary, Image.registered_extensions()[path.suffix.lower()])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """One picture of many, small ones enlarged to about 48 pixels.

    Args:
        images: (N, C, H, W), in [0, 1].
        columns: of the grid, square if None.
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


def save_images(images: Tensor, folder: Path, first: int = 0) -> None:
    """One file an image, numbered from `first`. images: (N, C, H, W), in [0, 1]."""
    for i, image in enumerate(to_uint8(images), first):
        _save(_to_pil(image), folder / f"{i:06d}.png")


def save_loss(history: list[tuple[int, float]], path: Path) -> None:
    """The loss over the steps, (step, loss) each, on logarithmic axes."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(*zip(*history, strict=True))
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=120)
