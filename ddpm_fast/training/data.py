"""Images as uint8 batches, (N, C, H, W).

A data set has a length, and a list of indices gives a batch: `data[[3, 1, 4]]`.
"""

__all__ = [
    "DataError",
    "ImageFiles",
    "ImageTensor",
    "ShuffledBatches",
    "batches",
    "fingerprint",
    "open_data",
    "read_idx",
]

import gzip
import hashlib
import math
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..info import cores
from ..noise import derive_seed
from .config import CelebAData, Cifar10Data, DataConfig, DigitsData, FolderData, IdxData

ENDINGS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ORDER = 0  # what a run's seed is used for: the order of the images


class DataError(ValueError):
    """What is wrong with the data, and in which file."""


class ImageTensor(Dataset):
    """Images in memory, uint8, (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> Tensor:
        return self.images[indices]


class ImageFiles(Dataset):
    """Image files, decoded when asked for: the shorter side resized to `image_size`, the centre cropped.

    Args:
        paths: the files.
        image_size: H = W.
        channels: 3 for RGB, 1 for grey.
    """

    def __init__(self, paths: list[Path], image_size: int, channels: int = 3) -> None:
        self.paths, self.image_size, self.channels = paths, image_size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: list[int]) -> Tensor:
        return torch.stack([self._read(self.paths[i]) for i in indices])

    def _read(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                image = _to_8_bits(ImageOps.exif_transpose(image)).convert("RGB" if self.channels == 3 else "L")
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # as decoders do
            raise DataError(f"{path}: not a readable image ({error})") from None
        image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C)
        return pixels.reshape(self.image_size, self.image_size, self.channels).permute(2, 0, 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Pixels in 0 ... 255 on an opaque ground; Pillow's own conversion clips 16 bits and drops transparency."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit pixels have no known range; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


class ShuffledBatches(Sampler[list[int]]):
    """The indices of each training step, epoch after epoch, each in its own order.

    The batch of a step depends on the seed and the step alone, so that a run can go on where it stopped.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, first_step: int, last_step: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in range(self.first_step, self.last_step):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
                    order = torch.randperm(self.length, generator=generator).tolist()
                batch.append(order[position % self.length])
            yield batch


def batches(data: Dataset, sampler: ShuffledBatches) -> Iterator[Tensor]:
    """The batches of a run, uint8, (N, C, H, W); files are decoded by other processes."""
    workers = min(8, cores()) if isinstance(data, ImageFiles) else 0
    loader = DataLoader(
        data,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupt,
    )
    try:
        yield from loader
    except DataError as error:
        # From another process it comes with that one's traceback, and the message last.
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None


def _ignore_interrupt(worker: int) -> None:
    """These signals may reach every process of a job, but the training decides when to stop."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def fingerprint(data: Dataset) -> str:
    """Identifies the images of a data set, wherever they are: their pixels in memory, or names and sizes of files."""
    if isinstance(data, ImageFiles):
        content = repr([(path.name, path.stat().st_size) for path in data.paths]).encode()
    else:
        content = repr(tuple(data.images.shape)).encode() + data.images.contiguous().numpy().tobytes()
    return f"{len(data)}-{hashlib.sha256(content).hexdigest()[:16]}"


def open_data(config: DataConfig) -> Dataset:
    """The data set that a config names.

    Raises:
        DataError: files that are missing, empty or not what they should be.
    """
    match config:
        case DigitsData():
            return ImageTensor(_digits())
        case IdxData():
            return ImageTensor(read_idx(config.path)[:, None])
        case Cifar10Data():
            pixels = _torchvision().CIFAR10(config.path, train=True, download=True).data  # (N, H, W, C)
            return ImageTensor(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        case CelebAData():
            celeba = _torchvision().CelebA(config.path, split="train", download=True)
            folder = Path(celeba.root, celeba.base_folder, "img_align_celeba")
            return ImageFiles([folder / name for name in celeba.filename], config.image_size)
        case FolderData():
            return ImageFiles(_find_images(config.path), config.image_size, config.channels)


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy((load_digits().images * (255 / 16)).round().astype(np.uint8))[:, None]


def read_idx(path: Path, axes: int = 3) -> Tensor:
    """The bytes of an IDX file, as http://yann.lecun.com/exdb/mnist describes it, gzipped or not.

    Args:
        axes: 3 for images, 1 for labels.

    Returns:
        (N, H, W) or (N,), uint8.

    Raises:
        DataError: no such file, not an IDX file of bytes with so many axes, or a truncated one.
    """
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    magic = bytes([0, 0, 8, axes])  # 8: bytes
    if raw[:4] != magic:
        kind = "images" if axes == 3 else "labels"
        raise DataError(
            f"{path}: not an IDX file of {kind}: it begins with {raw[:4].hex(' ')}, needed {magic.hex(' ')}"
        )
    header = 4 + axes * 4
    shape = struct.unpack(f">{axes}I", raw[4:header]) if len(raw) >= header else (0,) * axes
    if len(raw) - header != math.prod(shape) or not math.prod(shape):
        raise DataError(f"{path}: truncated: {len(raw) - header} bytes of data for the shape {shape}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def _find_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.name[0] != "." and p.is_file())
    if not paths:
        raise DataError(f"{folder}: no images in this folder or below; looked for {', '.join(ENDINGS)}")
    return paths


def _torchvision():
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
        raise DataError(f'this data set needs torchvision: pip install "ddpm_fast[vision]" ({error})') from None
    return datasets
