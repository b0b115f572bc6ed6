"""Picture files: images and grids of images.

PNG files name the program that wrote them, and those of samples have a receipt (`receipt.Receipt`).
"""

__all__ = [
    "PictureError",
    "grid",
    "grid_size",
    "save_grid",
    "save_images",
    "save_picture",
    "to_pil",
    "to_uint8",
]

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .files import replacing
from .receipt import Receipt, software

GAP = 1  # pixels between the images of a grid, before it is enlarged


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


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W), uint8, of 1 or 3 channels."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_picture(picture: Image.Image, path: str | Path, receipt: Receipt | None = None) -> None:
    """Saves a picture in the format of the file's name; only PNG files take a receipt."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    chunks = {} if kind != "PNG" else {"pnginfo": software() if receipt is None else receipt.chunks()}
    with replacing(Path(path)) as temporary:
        picture.save(temporary, kind, **chunks)


def _layout(n: int, height: int, columns: int | None) -> tuple[int, int, int]:
    """Rows, columns and the factor of enlargement of a grid of n images."""
    columns = columns or math.ceil(math.sqrt(n))
    return math.ceil(n / columns), columns, max(1, round(48 / height))


def grid_size(n: int, height: int, width: int, columns: int | None = None) -> tuple[int, int]:
    """The width and the height of a `grid` of n images, in pixels."""
    rows, columns, scale = _layout(n, height, columns)
    return (columns * (width + GAP) + GAP) * scale, (rows * (height + GAP) + GAP) * scale


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """A grid of images as one picture. Images of fewer than 48 pixels are enlarged to about that size.

    Args:
        images: (N, C, H, W), in [0, 1].
        columns: the number of columns; None for a square grid.

    Raises:
        PictureError: a value is NaN or infinite.
    """
    n, c, h, w = images.shape
    rows, columns, scale = _layout(n, h, columns)
    sheet = torch.full((c, rows * (h + GAP) + GAP, columns * (w + GAP) + GAP), 255, dtype=torch.uint8)
    for i, image in enumerate(to_uint8(images)):
        y, x = GAP + i // columns * (h + GAP), GAP + i % columns * (w + GAP)
        sheet[:, y : y + h, x : x + w] = image
    return to_pil(sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, receipt: Receipt | None = None) -> None:
    """Saves a `grid` of images as one picture, a PNG file with its receipt.

    Args:
        receipt: of the picture, if it is known how the images were sampled.

    Raises:
        PictureError: a value is NaN or infinite.
    """
    save_picture(grid(images, columns), path, receipt)


def save_images(images: Tensor, folder: str | Path, first: int = 0, receipt: Receipt | None = None) -> None:
    """Saves each image as a PNG file of its own in an existing folder.

    Args:
        images: (N, C, H, W), in [0, 1].
        first: the number in the name of the first file, which is the index of the image.
        receipt: of the run of samples that the images belong to; each file is given that of its image.

    Raises:
        PictureError: a value is NaN or infinite. No file is written.
    """
    for i, image in enumerate(to_uint8(images), first):
        save_picture(to_pil(image), Path(folder, f"{i:06d}.png"), receipt and receipt.of_image(i))
