"""Making pictures of samples again, as their receipts say, and comparing them."""

__all__ = ["Reproduced", "reproduce"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import info
from ..samplers import StepTable
from ..training import checkpoint
from ..training.pictures import grid, grid_size, to_pil, to_uint8
from ..training.receipt import KEYWORD, Receipt, ReceiptError, table_digest
from ..training.run import ROWS, Run, load_run


@dataclass(frozen=True)
class Reproduced:
    """A picture that was made again.

    Attributes:
        path: the picture that was given.
        differences: how many of its values differ from the picture made again, 0 if it is equal. None where the two
            cannot be compared.
        told: what was found, for the user.
        again: the picture made again; None where the two cannot be compared.
        receipt: of the picture made again.
    """

    path: Path
    differences: int | None
    told: str
    again: Image.Image | None
    receipt: Receipt

    def __str__(self) -> str:
        return f"{self.path}: {self.told}"


def reproduce(paths: Sequence[Path], folder: Path) -> list[Reproduced]:
    """Makes pictures of samples again from the weights of a run and compares them with the files.

    An image is sampled in the batch that it was sampled in, in the same precision and with as many threads. Images of
    one batch are sampled together.

    Args:
        paths: PNG files with receipts.
        folder: of the run, or one of its checkpoints.

    Returns:
        What was found of each picture, in the order of `paths`.

    Raises:
        ReceiptError: a file is no PNG file, or has no receipt; or no checkpoint of the run has the weights that it was
            sampled with.
        CheckpointError: there is no checkpoint.
        ValueError: a sampler that a receipt names is not there.
    """
    given = [(_open(path), path, i) for i, path in enumerate(paths)]
    again, found = _Again(folder, progress=len(given) == 1), {}
    # In this order, pictures of one batch follow one another.
    given.sort(key=lambda item: (*_weights(item[0][0]), _settings(item[0][0]), item[0][0].index))
    for (receipt, size, mode), path, i in tqdm(given, "reproducing", unit=" pictures", disable=len(given) == 1):
        found[i] = again.compare(path, receipt, size, mode)
    return [found[i] for i in range(len(given))]


def _open(path: Path) -> tuple[Receipt, tuple[int, int], str]:
    """The receipt, the width and height, and the mode of a PNG file, whose pixels are not decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return Receipt.read(picture.info.get(KEYWORD)), picture.size, picture.mode
    except ReceiptError as error:
        raise ReceiptError(f"{path}: {error}") from None
    except Image.UnidentifiedImageError:
        raise ReceiptError(f"{path}: not a PNG file; only PNG files have a receipt") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # given a damaged file, the decoder raises exceptions of all kinds
        raise ReceiptError(f"{path}: not a readable PNG file ({error})") from None


class _Again:
    """Makes pictures again. Keeps the run and the batch of the last one for the next."""

    def __init__(self, folder: Path, *, progress: bool) -> None:
        self._folder, self._progress = folder, progress
        self._found: tuple[tuple[str, ...], Run] | None = None
        self._sampled: tuple[object, Tensor] | None = None

    def compare(self, path: Path, receipt: Receipt, size: tuple[int, int], mode: str) -> Reproduced:
        run = self._run(receipt)
        diffusion = run.diffusion
        wanted = _form(receipt, diffusion.channels, diffusion.image_size)
        if (size, mode) != wanted:
            file, made = (f"{width} x {height} pixels of mode {of}" for (width, height), of in ((size, mode), wanted))
            told = f"not equal: the file has {file}, the picture made again {made}"
            return Reproduced(path, None, told, None, receipt)
        if receipt.batch_size > (largest := max(ROWS, run.config.training.batch_size)):
            raise ReceiptError(f"{path}: its batches had {receipt.batch_size} images; those of the run, {largest}")
        diffusion.spacing = receipt.spacing  # where it is None, that of the config does not hold
        table = diffusion.step_table(receipt.sampler, receipt.steps, receipt.eta, receipt.spacing)
        if receipt.states and receipt.states[-1] > len(table):
            raise ReceiptError(f"{path}: step {receipt.states[-1]} of {len(table)} cannot be shown")
        now = {"environment": info.environment(diffusion.device), "coefficients": table_digest(table)}
        picture = self._picture(run, receipt, table)
        differences, told = _compared(path, picture)
        if differences:
            told += "; " + ("; ".join(_changes(receipt, **now)) or "nothing that the receipt records has changed here")
        return Reproduced(path, differences, told, picture, receipt.model_copy(update=now))

    def _run(self, receipt: Receipt) -> Run:
        """The run with the weights of a receipt, in its precision."""
        if self._found is None or self._found[0] != _weights(receipt):
            run = _with_weights(self._folder, receipt.ema, receipt.weights).in_precision(receipt.precision)
            self._found, self._sampled = (_weights(receipt), run), None
        return self._found[1]

    def _picture(self, run: Run, receipt: Receipt, table: StepTable) -> Image.Image:
        with _threads(receipt.threads):
            if receipt.states:
                how = {"seed": receipt.seed, "sampler": table, "progress": self._progress}
                states = run.diffusion.sample_progressive(receipt.count, **how)
                shown = torch.stack([state.x for state in states if state.step in receipt.states], dim=1)
                return grid(shown.flatten(0, 1), columns=len(receipt.states))
            images = torch.cat([self._batch(run, receipt, table, *batch) for batch in receipt.batches()])
        skipped = receipt.index % receipt.batch_size
        images = images[skipped : skipped + receipt.count]
        return grid(images) if receipt.picture == "grid" else to_pil(to_uint8(images)[0])

    def _batch(self, run: Run, receipt: Receipt, table: StepTable, first: int, length: int) -> Tensor:
        key = (_settings(receipt), first, length)
        if self._sampled is None or self._sampled[0] != key:
            how = {"seed": receipt.seed, "sample_offset": first, "sampler": table}
            self._sampled = key, run.diffusion.sample(length, **how, progress=self._progress).cpu()
        return self._sampled[1]


def _weights(receipt: Receipt) -> tuple[str, ...]:
    return receipt.weights, receipt.ema, receipt.precision


def _settings(receipt: Receipt) -> str:
    """What pictures of one run of samples have in common."""
    return receipt.model_copy(update={"picture": "grid", "index": 0, "count": 1, "states": None}).model_dump_json()


def _with_weights(folder: Path, ema: str, weights: str) -> Run:
    """The run with these weights, an average of a certain name, from whichever of its checkpoints has them.

    Raises:
        ReceiptError: none has them.
        CheckpointError: there is no checkpoint.
    """
    newest = checkpoint.latest(folder)
    candidates = [newest] if newest == folder else reversed(checkpoint.steps(folder))
    others = []
    for candidate in candidates:
        try:
            run = load_run(candidate, ema=ema)
        except checkpoint.CheckpointError as error:
            others.append(str(error))
            continue
        if (digest := run.digest()) == weights:
            return run
        others.append(f"those of {candidate.name} are {digest[:12]}")
    found = "; ".join(others)
    raise ReceiptError(f"{folder} has no checkpoint with the weights of the receipt, {weights[:12]}: {found}")


def _form(receipt: Receipt, channels: int, image_size: Sequence[int]) -> tuple[tuple[int, int], str]:
    """The width, the height and the mode of a picture."""
    height, width = image_size
    mode = "L" if channels == 1 else "RGB"
    if receipt.picture == "image":
        return (width, height), mode
    shown = len(receipt.states or [None])
    columns = len(receipt.states) if receipt.states else None
    return grid_size(receipt.count * shown, height, width, columns), mode


def _compared(path: Path, picture: Image.Image) -> tuple[int, str]:
    """The number of values that differ from those of a file, of the same size and mode, and how to say it."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            given = np.asarray(file).astype(np.int16)
    except Exception as error:  # given a damaged file, the decoder raises exceptions of all kinds
        raise ReceiptError(f"{path}: not a readable PNG file ({error})") from None
    off = np.abs(given - np.asarray(picture))
    differences = int(np.count_nonzero(off))
    if not differences:
        return 0, "equal"
    return differences, f"{differences:,} of {off.size:,} values differ, by at most {off.max()} of 255"


def _changes(receipt: Receipt, environment: dict[str, str], coefficients: str) -> Iterator[str]:
    """What is not as it was, and may be the reason for differences."""
    for name in receipt.environment | environment:
        before, now = receipt.environment.get(name, "not recorded"), environment.get(name, "not there")
        if before != now:
            yield f"{name} was {before}, now {now}"
    if receipt.coefficients != coefficients:
        yield f"the coefficients of {receipt.sampler} were others"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
