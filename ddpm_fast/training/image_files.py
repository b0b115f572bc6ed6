"""Image files as a data set: how a file becomes a uint8 tensor."""

__all__ = ["ENDINGS", "DataError", "ImageFiles"]

import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

ENDINGS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow chooses the decoder by the content, whatever the name is. It may use these decoders and no others: that of EPS,
# for example, would start Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second one


class DataError(ValueError):
    """The training data cannot be used. The message names the file or folder."""


class ImageFiles(Dataset):
    """Image files, decoded when they are indexed: the shorter side is resized to `image_size`, the centre cropped.

    Grey images with 16 bits (PNG, TIFF, PGM) or 12 bits (TIFF, PGM with 4095 as its largest value) are scaled to
    8 bits. Data of fewer bits that are stored unscaled in a 16-bit PNG or TIFF cannot be told from dark images: they
    are read as 16 bits, with one warning. Transparent images are put on white. Of animations and of files with several
    pages, the first image is read.

    Args:
        paths: the files.
        image_size: H = W.
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: when indexed, if a file is not a readable image, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """

    def __init__(self, paths: Iterable[str | Path], image_size: int, channels: int = 3) -> None:
        self.paths, self.image_size, self.channels = [Path(path) for path in paths], image_size, channels
        self._warned = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: list[int]) -> Tensor:
        return torch.stack([self._read(self.paths[i]) for i in indices])

    def _read(self, path: Path) -> Tensor:
        try:
            with Image.open(path, formats=_formats()) as image:
                # Pillow warns of more pixels than this, and refuses twice as many.
                if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}, the value of "
                        "PIL.Image.MAX_IMAGE_PIXELS"
                    )
                image = self._to_8_bits(path, image).convert("RGB" if self.channels == 3 else "L")
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.LANCZOS)
        except UnidentifiedImageError:
            known = ", ".join(_formats())
            raise DataError(
                f"{path}: not a readable image (its content is none of {known} that Pillow decodes)"
            ) from None
        except Exception as error:  # given a damaged file, decoders raise exceptions of all kinds
            raise DataError(f"{path}: not a readable image ({error})") from None
        pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C)
        return pixels.reshape(self.image_size, self.image_size, self.channels).permute(2, 0, 1)

    def _to_8_bits(self, path: Path, image: Image.Image) -> Image.Image:
        """Upright pixels in 0 ... 255 on an opaque ground. Pillow's `convert` clips 16 bits and drops transparency."""
        tags, decoder = getattr(image, "tag_v2", {}), image.format  # tags of TIFF
        image = ImageOps.exif_transpose(image)
        # Pillow scales the pixels of a PGM file to 16 bits, whatever its largest value is, and calls the mode I.
        if image.mode.startswith("I;16") or (image.mode == "I" and decoder in ("PNG", "PPM")):
            values = np.asarray(image)
            bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
            if bits == 16 and 0 < values.max() < 2**12:
                self._warn_of_dark_pixels(path, values.max())
            pixels = (values * (255 / (2**bits - 1))).round().astype(np.uint8)
            if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
                pixels = 255 - pixels
            pixels[values == image.info.get("transparency", -1)] = 255
            return Image.fromarray(pixels)
        if image.mode in ("I", "F"):
            raise ValueError(
                f"mode {image.mode}: 32-bit and signed pixels have no known range; save it with 8 or 16 bits"
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image

    def _warn_of_dark_pixels(self, path: Path, largest: int) -> None:
        if self._warned or get_worker_info() is not None:
            return
        self._warned = True
        warnings.warn(
            f"{path}: the largest of its 16-bit pixels is {largest} of 65535. The file does not say that it has fewer "
            "bits, so it is read as 16 bits and comes out dark. If it holds 12-bit pixels, multiply them by 16, or "
            "save them as PGM with 4095 as its largest value",
            stacklevel=2,
        )


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can decode."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
