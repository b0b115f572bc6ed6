"""Receipts: how the images of a picture were sampled, in the PNG file itself, so that they can be made again.

A PNG file of samples has two text chunks, which any tool for PNG shows: `Software`, and `ddpm_fast`, a JSON object with
the fields of a `Receipt`. `ddpm-fast reproduce` reads it.
"""

__all__ = ["KEYWORD", "Receipt", "ReceiptError", "receipt_of", "software", "table_digest"]

import hashlib
import inspect
import json
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .. import info, samplers
from ..checks import integer
from ..diffusion import GaussianDiffusion
from ..samplers import StepTable
from .precision import PRECISIONS

KEYWORD = "ddpm_fast"  # of the text chunk
LONGEST = 1 << 14  # characters of the chunk; a receipt has about a thousand

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Word = Annotated[str, Field(max_length=200)]


class ReceiptError(ValueError):
    """A picture has no receipt, or none that can be used."""


class Receipt(BaseModel):
    """How the images of one picture were sampled.

    The noise of an image follows from the seed and its index, but the last bits of a network's result depend on the
    size of the batch, on the number of threads and on what is in `environment`.

    Attributes:
        format: of the receipt.
        picture: `image`, a `grid`, or `states`, whose rows show images at several steps.
        seed: of the samples, in [-2^63, 2^64).
        index: of the image among those of the seed; a grid shows images from 0 on.
        count: of the images in the picture.
        states: the steps that are shown, for `states`.
        sampler: its name in `samplers.SAMPLERS`, or `fitted`.
        steps: calls of the network for an image.
        spacing: of the timesteps; None for the sampler's own.
        eta: the noise of a sampler that takes one.
        coefficients: SHA-256 of the timesteps (int64) and rows (float32) of the sampler's table.
        ema: which average of the weights they are, as `run.load_run` takes it.
        weights: SHA-256 of the network's float32 weights, as `fitting.weights_digest` defines it.
        precision: that the network was computed in.
        sampled: the number of images that were sampled, from index 0 on.
        batch_size: of all batches but the last, which has the rest.
        threads: of PyTorch.
        environment: versions and hardware, as `info.environment` gives them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    picture: Literal["image", "grid", "states"] = "grid"
    seed: int = Field(ge=-(1 << 63), lt=1 << 64)
    index: int = Field(0, ge=0, lt=1 << 63)
    count: int = Field(gt=0, lt=1 << 31)
    states: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] | None = Field(None, max_length=100)
    sampler: Word
    steps: int = Field(gt=0, lt=1 << 31)
    spacing: Word | None
    eta: float | None = Field(ge=0)
    coefficients: Digest
    ema: Word = "default"
    weights: Digest
    precision: Literal["fp32", "bf16", "fp16"]
    sampled: int = Field(gt=0, lt=1 << 63)
    batch_size: int = Field(gt=0, lt=1 << 31)
    threads: int = Field(gt=0, le=1024)
    environment: dict[Word, Word] = Field(max_length=20)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Receipt":
        states = self.states or ()
        problem = None
        if self.index + self.count > self.sampled:
            problem = f"{self.sampled} images have none with the index {self.index + self.count - 1}"
        elif self.count != 1 if self.picture == "image" else self.index:
            problem = "an image is one, and a grid begins with index 0"
        elif (self.picture == "states") != bool(states) or list(states) != sorted(set(states)):
            problem = "the steps of states rise, and only a picture of states has them"
        elif states and not self.count == self.sampled == self.batch_size:
            problem = "states are those of one batch"
        if problem:
            raise PydanticCustomError("receipt", "{problem}", {"problem": problem})
        return self

    def of_image(self, index: int) -> "Receipt":
        return self.model_copy(update={"picture": "image", "index": index, "count": 1})

    def of_grid(self, count: int) -> "Receipt":
        """Of the first `count` images."""
        return self.model_copy(update={"picture": "grid", "index": 0, "count": count})

    def of_states(self, steps: Iterable[int]) -> "Receipt":
        """Of all images, which are one batch, after so many steps."""
        return self.model_copy(update={"picture": "states", "states": tuple(sorted(steps))})

    def batches(self) -> list[tuple[int, int]]:
        """The batches that the images of the picture belong to: the first index, and the number of images of each."""
        first = self.index // self.batch_size * self.batch_size
        starts = range(first, self.index + self.count, self.batch_size)
        return [(start, min(self.batch_size, self.sampled - start)) for start in starts]

    def chunks(self) -> PngInfo:
        """The text chunks of a PNG file."""
        chunks = software()
        chunks.add_text(KEYWORD, json.dumps(self.model_dump(mode="json")))  # ASCII, as a tEXt chunk needs it
        return chunks

    @classmethod
    def read(cls, text: object) -> "Receipt":
        """A receipt from the text of its chunk.

        Raises:
            ReceiptError: there is none, or it is not one that this version has written.
        """
        if not isinstance(text, str):
            raise ReceiptError(
                f"no receipt (a text chunk {KEYWORD!r}); samples that ddpm_fast writes as PNG have one, "
                "but many programs drop it when they save a picture, and other formats have none"
            )
        try:
            if len(text) > LONGEST:
                raise ReceiptError(f"the receipt has {len(text):,} characters, more than the {LONGEST:,} that it may")
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the text"
            raise ReceiptError(f"the receipt cannot be used: {where}: {first['msg']}") from None


def software() -> PngInfo:
    """The text chunk that names the program: `Software` is a keyword of the PNG standard."""
    chunks = PngInfo()
    chunks.add_text("Software", f"ddpm_fast {info.versions()['ddpm_fast']}")
    return chunks


def receipt_of(
    diffusion: GaussianDiffusion,
    ema: str,
    weights: str,
    n: int,
    batch_size: int,
    *,
    seed: int,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
) -> Receipt:
    """The receipt of n images, from index 0 on, that are sampled in this process.

    Args:
        diffusion: that samples.
        ema, weights: the name of its weights, and their digest in float32.
        seed, sampler, steps, eta, spacing: as `diffusion.sample` is given them.

    Raises:
        ValueError: there is no such sampler, spacing or number of steps.
    """
    table = diffusion.step_table(sampler, steps, eta, spacing)
    name = diffusion.sampler_name(sampler, steps, eta)
    takes_eta = name in samplers.SAMPLERS and "eta" in inspect.signature(samplers.SAMPLERS[name]).parameters
    dtype = next(p.dtype for p in diffusion.model.parameters() if p.is_floating_point())
    return Receipt(
        seed=integer("seed", seed, -(1 << 63), 1 << 64),
        count=n,
        sampler=name,
        steps=diffusion.sampling_timesteps if steps is None else int(steps),
        spacing=diffusion.spacing if spacing is None and name != "fitted" else spacing,
        eta=None if not takes_eta else float(diffusion.ddim_sampling_eta if eta is None else eta),
        coefficients=table_digest(table),
        ema=ema,
        weights=weights,
        precision=next(name for name, of in PRECISIONS.items() if of == dtype),
        sampled=n,
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        environment=info.environment(diffusion.device),
    )


def table_digest(table: StepTable) -> str:
    """SHA-256 of the timesteps and of the rows as kernels take them, so that the last bits of float64 do not matter."""
    t, rows = table.t.to(torch.int64), table.rows.to(torch.float32)
    return hashlib.sha256(t.contiguous().numpy().tobytes() + rows.contiguous().numpy().tobytes()).hexdigest()
