"""The report of an evaluation: as text, as report.json and as report.png."""

__all__ = ["Report", "Samples"]

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..training.files import write_text
from ..training.plots import save_evaluation
from .bound import Bound
from .distances import Distances


@dataclass(frozen=True)
class Samples:
    """The samples of an evaluation, and what they were compared with.

    Attributes:
        n, real: how many samples, and how many real images.
        sampler, steps, spacing: what they were sampled by; a spacing of None is the sampler's own.
        features, features_sha256: the feature network, and the SHA-256 of its file.
        distances: of the samples to the real images.
    """

    n: int
    real: int
    sampler: str
    steps: int
    spacing: str | None
    features: str
    features_sha256: str
    distances: Distances


@dataclass(frozen=True)
class Report:
    """What an evaluation has found.

    Attributes:
        data: what the real images are.
        checkpoint: the name of the checkpoint that was evaluated.
        seed: of the noise of the samples, and of the images and timesteps of the bound.
        precision: the dtype that the network was computed in.
        versions: of the packages that the figures depend on.
    """

    data: str
    checkpoint: str
    seed: int
    precision: str
    samples: Samples | None
    bound: Bound | None
    versions: dict[str, str]

    def __str__(self) -> str:
        tables = []
        if self.samples is not None:
            found = self.samples
            title = f"{found.n:,} samples: {found.sampler}, {found.steps} steps, {self.precision}, seed {self.seed}"
            against = {"real images": f"{found.real:,} of {self.data}", "features": found.features}
            tables.append((title, against | found.distances.rows()))
        if self.bound is not None:
            title = f"{self.bound.n:,} images of {self.data}: {self.bound.steps} timesteps each, {self.precision}"
            tables.append((title, self.bound.rows()))
        width = max(len(name) for _, rows in tables for name in rows)
        return "\n\n".join(
            "\n".join([title, *(f"{name:<{width}}  {value}" for name, value in rows.items())]) for title, rows in tables
        )

    def save(self, folder: Path, strips: dict[str, Tensor]) -> None:
        """Writes report.json and report.png into an existing folder.

        Args:
            strips: as in `save_evaluation`.
        """
        write_text(folder / "report.json", json.dumps(asdict(self), indent=2) + "\n")
        save_evaluation(str(self), self.bound.curve if self.bound else [], strips, folder / "report.png")
