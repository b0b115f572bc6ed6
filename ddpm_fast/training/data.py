"""The data set of a run: images as uint8 batches, (N, C, H, W).

A data set has a length, and indexing it with a list gives a batch: `data[[3, 1, 4]]`.
"""

__all__ = [
    "DataError",
    "ImageFiles",
    "ImageTensor",
    "ShuffledBatches",
    "batches",
    "fingerprint",
    "is_run",
    "open_data",
    "read_idx",
]

import gzip
import hashlib
import math
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .config import CelebAData, Cifar10Data, DataConfig, DigitsData, FolderData, IdxData, expanded
from .image_files import ENDINGS, DataError, ImageFiles
from .loading import ShuffledBatches, batches

NOT_DATA = ("$RECYCLE.BIN", "@eaDir", "__MACOSX")  # created by Windows, Synology and macOS; they hold copies of images
# What a training run writes into its folder.
OF_A_RUN = {
    "averages", "checkpoints", "config.json", "denoising.png", "likelihood.json", "likelihood.png", "loss.png",
    "loss_by_timestep.png", "metrics.json", "previews", "progress.jsonl", "report.json", "report.png", "samplers",
    "samples.png", "tensorboard", "wandb",
}  # fmt: skip
GZIP_MAGIC = b"\x1f\x8b"
GZIP_MAX_RATIO = 1032  # DEFLATE represents at most 258 bytes by two bits
HASHED_BYTES = 64 * 2**20  # a fingerprint reads the files of a smaller folder completely
HASHED_FILES, HASHED_BEGINNING = 256, 64 * 2**10  # and so many bytes of so many files of a larger one


class ImageTensor(Dataset):
    """Images in memory, uint8, (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> Tensor:
        return self.images[indices]


def open_data(config: DataConfig) -> ImageTensor | ImageFiles:
    """The data set that a config names.

    Raises:
        DataError: files are missing, empty, or not in the format that the config says.
    """
    match config:
        case DigitsData():
            return ImageTensor(_digits())
        case IdxData():
            return ImageTensor(read_idx(expanded(config.path))[:, None])
        case Cifar10Data():
            pixels = _torchvision("CIFAR10", expanded(config.path), train=True).data  # (N, H, W, C)
            return ImageTensor(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        case CelebAData():
            celeba = _torchvision("CelebA", expanded(config.path), split="train")
            folder = Path(celeba.root, celeba.base_folder, "img_align_celeba")
            return ImageFiles([folder / name for name in celeba.filename], config.image_size)
        case FolderData():
            return ImageFiles(_find_images(expanded(config.path)), config.image_size, config.channels)


def _find_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted by their names. Prints what was found to stderr.

    Links to files and folders are followed; a folder that is reached again by a link is read once. Not taken are
    hidden files and folders, such as .ipynb_checkpoints, and the folders of training runs, recognised by two
    of the names in them. If `folder` itself is one, the pictures that the run has written are not taken.

    Raises:
        DataError: there is no such folder, no image in it, a folder that cannot be read, or a link to a file that does
            not exist.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found: list[Path] = []
    skipped: dict[str, list[str]] = {}
    visited: set[str] = set()

    def skip(why: str, path: Path) -> None:
        skipped.setdefault(why, []).append(str(path.relative_to(folder)))

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    for name, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        here = Path(name)
        of_run = OF_A_RUN if is_run(folders + files) else set()
        real = os.path.realpath(here)
        if real in visited or (of_run and here != folder):
            skip("folders reached again by a link" if real in visited else "folders of training runs", here)
            folders.clear()
            continue
        visited.add(real)
        for hidden in sorted(filter(_is_hidden, folders)):
            skip("hidden files and folders", here / hidden)
        folders[:] = sorted(f for f in folders if not _is_hidden(f) and f not in of_run)
        for file in sorted(files):
            path = here / file
            if path.suffix.lower() not in ENDINGS:
                if not _is_hidden(file):
                    skip("files of other kinds", path)
            elif _is_hidden(file):
                skip("hidden files and folders", path)
            elif file in of_run:
                skip("pictures of a training run", path)
            elif path.is_file():
                found.append(path)
            elif path.is_symlink():
                raise DataError(f"{path}: a link to {os.readlink(path)}, which does not exist")
            else:
                skip("not files", path)
    if not found:
        message = f"{folder}: no images in this folder or its subfolders; looked for {', '.join(ENDINGS)}"
        raise DataError(message + _list(skipped))
    print(f"{folder}: {len(found):,} image{'s' if len(found) > 1 else ''}{_list(skipped)}", file=sys.stderr)
    return sorted(found, key=lambda path: path.parts)


def is_run(names: list[str]) -> bool:
    """Whether a folder with these files and folders is taken to be that of a training run."""
    return len(OF_A_RUN.intersection(names)) > 1


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NOT_DATA


def _list(skipped: dict[str, list[str]]) -> str:
    """What was skipped and why, with three examples of each."""
    reasons = [
        f"{why}: {len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for why, names in skipped.items()
    ]
    return f"; skipped {', '.join(reasons)}" if reasons else ""


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy((load_digits().images * (255 / 16)).round().astype(np.uint8))[:, None]


def _torchvision(name: str, path: Path, **arguments: Any) -> Any:
    """A data set of torchvision, downloaded to `path` unless it is there already."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another version of torch
        raise DataError(f'this data set needs torchvision: pip install "ddpm_fast[vision]" ({error})') from None
    try:
        return getattr(datasets, name)(path, download=True, **arguments)
    except (ImportError, OSError, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {name} cannot be loaded: {error}") from None


def read_idx(path: str | Path, axes: int = 3) -> Tensor:
    """The bytes of an IDX file, as http://yann.lecun.com/exdb/mnist describes it, gzipped or not.

    No more is decompressed than the header of the file says.

    Args:
        axes: 3 for images, 1 for labels.

    Returns:
        (N, H, W) or (N,), uint8.

    Raises:
        DataError: there is no such file, it is not an IDX file of bytes with so many axes, or it has fewer or more
            bytes than its header says.
    """
    try:
        with open(path, "rb") as file:
            stored = os.fstat(file.fileno()).st_size
            is_gzip = file.read(2) == GZIP_MAGIC
            file.seek(0)
            if is_gzip:
                return _read_idx(gzip.GzipFile(fileobj=file), stored * GZIP_MAX_RATIO, axes)
            return _read_idx(file, stored, axes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _read_idx(stream: BinaryIO, most: int, axes: int) -> Tensor:
    """The content of an IDX file that can have `most` bytes."""
    magic = bytes([0, 0, 8, axes])  # 8: unsigned bytes
    header = stream.read(4 + 4 * axes)
    if header[:4] != magic:
        kind = "images" if axes == 3 else "labels"
        raise DataError(f"not an IDX file of {kind}: it begins with {header[:4].hex(' ')}, needed {magic.hex(' ')}")
    if len(header) < 4 + 4 * axes:
        raise DataError("truncated: the header ends before it gives the shape")
    shape = struct.unpack(f">{axes}I", header[4:])
    size = math.prod(shape)
    if not size:
        raise DataError(f"empty: its shape is {shape}")
    if size > most:
        raise DataError(f"truncated: the shape {shape} takes {size:,} bytes, and the file cannot hold over {most:,}")
    content = np.empty(size, np.uint8)
    done = 0
    while count := stream.readinto(memoryview(content)[done:]):
        done += count
    if done < size:
        raise DataError(f"truncated: {done:,} bytes of data for the shape {shape}, which takes {size:,}")
    if stream.read(1):
        raise DataError(f"more data than the shape {shape} takes, {size:,} bytes")
    return torch.from_numpy(content.reshape(shape))


def fingerprint(data: ImageTensor | ImageFiles) -> str:
    """Identifies the images of a data set: another fingerprint means other images or another order.

    It does not depend on the place of the files, nor on their dates, so a copy of a folder has the fingerprint of the
    folder. For images in memory it is a hash of all pixels. For image files it is a hash of their number, their names
    below the folder that they have in common and their sizes; and of their contents if these are at most 64 MiB, else
    of the first 64 KiB of 256 files, evenly spread: reading all would take hours for a large data set. A change of the
    pixels of a file that keeps its size can therefore be missed in a large folder.

    Returns:
        The kind of data and 32 hexadecimal digits.

    Raises:
        DataError: a file cannot be read.
    """
    if isinstance(data, ImageTensor):
        images = np.ascontiguousarray(data.images.numpy())
        digest = hashlib.sha256(repr(images.shape).encode())
        digest.update(images)
        return f"images:{digest.hexdigest()[:32]}"
    root = os.path.commonpath([path.parent for path in data.paths])
    digest = hashlib.sha256()
    try:
        sizes = [path.stat().st_size for path in data.paths]
        for path, size in zip(data.paths, sizes, strict=True):
            name = str(path)[len(root) :].lstrip(os.sep).replace(os.sep, "/")  # relative_to takes ten times as long
            digest.update(os.fsencode(name) + b"\0%d\0" % size)
        small = sum(sizes) <= HASHED_BYTES
        for path in data.paths if small else data.paths[:: math.ceil(len(data) / HASHED_FILES)]:
            with open(path, "rb") as file:
                digest.update(file.read() if small else file.read(HASHED_BEGINNING))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return f"files:{digest.hexdigest()[:32]}"
