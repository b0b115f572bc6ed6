"""Snapshots of a run's power-function averages, and the averages of other widths that are made from them.

    RUN/averages/
        step-00005000-sigma_rel=0.05.safetensors  step-00005000-sigma_rel=0.1.safetensors  ...  SHA256SUMS

A file has one average of the weights in float16, as published: half of what the weights themselves take. All are kept.
"""

__all__ = ["TRACKED", "WIDTH", "Snapshots", "width_name"]

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from . import checkpoint
from .files import digest, flush, replacing, write_text
from .power_average import combine, exponent

TRACKED = (0.05, 0.1)  # sigma_rel of the averages that are computed during a training, as in the paper
WIDTH = "sigma_rel="  # begins the name of a power-function average
DTYPE = torch.float16
LARGEST_ERROR = 0.05  # of a profile that is made from others
# Of the absolute coefficients, by which the rounding to float16 is multiplied: its error is then at most 16 * 2^-11 of
# the largest average of a weight, and usually less than that of rounding weights to bfloat16.
LARGEST_SUM = 16
SUMS = "SHA256SUMS"


def width_name(sigma_rel: float) -> str:
    """The name of a power-function average."""
    return f"{WIDTH}{sigma_rel!r}"


class _Average(NamedTuple):
    """A file with a power-function average."""

    step: int
    sigma_rel: float
    folder: Path
    name: str  # without the ending
    dtype: torch.dtype


class Snapshots:
    """The snapshots of a run.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "averages"

    def _found(self) -> list[_Average]:
        """In the order of the steps."""
        found = []
        for path in self.folder.glob("step-*.safetensors"):
            for sigma_rel in TRACKED:
                match = re.fullmatch(rf"step-([0-9]{{8,}})-{re.escape(width_name(sigma_rel))}", path.stem)
                if match:
                    found.append(_Average(int(match[1]), sigma_rel, self.folder, path.stem, DTYPE))
        return sorted(found)

    # Keeping them

    def forget_after(self, step: int) -> None:
        """Deletes the snapshots of later steps, which are about to be taken again, and maybe otherwise."""
        later = [self.folder / f"{each.name}.safetensors" for each in self._found() if each.step > step]
        for path in (*later, *self.folder.glob("step-*.tmp")):
            path.unlink()

    def save(self, step: int, sigma_rel: float, weights: Mapping[str, Tensor]) -> None:
        """Keeps an average of the weights. If it cannot be written, the training goes on, and a line says so."""
        path = self.folder / f"step-{step:08d}-{width_name(sigma_rel)}.safetensors"
        tensors = {name: tensor.detach().to("cpu", DTYPE).contiguous() for name, tensor in weights.items()}
        try:
            if name := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
                raise OverflowError(f"{name} is not finite in {DTYPE}")
            self.folder.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                safetensors.torch.save_file(tensors, temporary)
                self._sign(path.name, digest(temporary))  # before the file has its name: none is without a checksum
            flush(self.folder)
        except (OSError, SafetensorError, OverflowError) as error:
            tqdm.write(f"{path.name}: this snapshot cannot be kept ({error}); post-hoc EMA has to do without it")

    def _sign(self, name: str, checksum: str) -> None:
        sums = self.folder / SUMS
        lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
        there = {f"{each.name}.safetensors" for each in self._found()} - {name}
        kept = [line for line in lines if line.partition("  ")[2] in there]
        write_text(sums, "".join(f"{line}\n" for line in (*kept, f"{checksum}  {name}")))

    # Making averages from them

    def load(self, newest: Path, sigma_rel: float, weights: Mapping[str, Tensor]) -> None:
        """Makes the average of a width that ends at a checkpoint, from the snapshots before it and its own averages.

        Args:
            newest: the checkpoint.
            sigma_rel: in (0, 12^-0.5].
            weights: tensors to be filled, float32.

        Raises:
            CheckpointError: the width cannot be made from these snapshots, or a file is damaged.
        """
        end = checkpoint.load_state(newest)["step"]
        known = [each for each in self._found() if each.step < end]
        known += [_Average(end, width, newest, f"ema-{width_name(width)}", torch.float32) for width in TRACKED]
        try:
            gamma = exponent(sigma_rel)
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{newest}: {error}") from None
        coefficients, error = combine(
            [each.step for each in known], [exponent(each.sigma_rel) for each in known], end, gamma
        )
        if error > LARGEST_ERROR or sum(map(abs, coefficients)) > LARGEST_SUM:
            earlier = len({each.step for each in known}) - 1
            reason = f"its profile would be off by {error:.0%}, and at most {LARGEST_ERROR:.0%} is allowed"
            if error <= LARGEST_ERROR:
                reason = f"their rounding to float16 would be multiplied by more than {LARGEST_SUM}"
            raise checkpoint.CheckpointError(
                f"{newest}: sigma_rel={sigma_rel:g} cannot be made from the snapshots of {earlier} earlier steps in "
                f"{self.folder}: {reason}; choose a width nearer to 0.05 or 0.1, or train with a smaller "
                "training.ema_snapshot_every"
            )
        totals = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in weights.items()}
        for coefficient, each in zip(coefficients, known, strict=True):
            tensors = {name: torch.empty(tensor.shape, dtype=each.dtype) for name, tensor in weights.items()}
            checkpoint.load_weights(each.folder, each.name, tensors)
            for name, total in totals.items():
                total.add_(tensors[name].double(), alpha=coefficient)
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(totals[name])
