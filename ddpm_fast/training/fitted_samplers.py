"""The samplers that were fitted to the network of a run: RUN/samplers/fitted-5.json for five steps."""

__all__ = ["FittedSamplers", "SamplerFileError"]

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from ..fitting import weights_digest
from ..samplers import FittedTable
from .files import write_text

LARGEST = 1 << 20  # bytes of a file; a table of 1000 steps takes an eighth of it


class SamplerFileError(ValueError):
    """Which file of a fitted sampler cannot be used or written, and why."""


class FittedSamplers(Mapping[int, FittedTable]):
    """Tables by their number of steps, each read from its file when it is looked up.

    Args:
        run: folder of the run.
        model: the network as it was loaded, which a table must have been fitted to. A digest of its weights is taken
            here, where there are tables, since images may be sampled with a copy in another dtype.
    """

    def __init__(self, run: Path, model: nn.Module) -> None:
        self.folder = run / "samplers"
        self._weights = weights_digest(model.state_dict())[:32] if len(self) else None

    def _path(self, steps: int) -> Path:
        return self.folder / f"fitted-{steps}.json"

    def __iter__(self) -> Iterator[int]:
        found = (re.fullmatch(r"fitted-([1-9][0-9]{0,8})\.json", path.name) for path in self.folder.glob("fitted-*"))
        return iter(sorted(int(match[1]) for match in found if match))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, steps: int) -> FittedTable:
        """
        Raises:
            KeyError: there is none.
            SamplerFileError: its file is damaged, or the sampler was fitted to other weights.
        """
        path = self._path(steps)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(LARGEST + 1)
        except FileNotFoundError:
            raise KeyError(steps) from None
        except (OSError, UnicodeDecodeError) as error:
            raise SamplerFileError(f"{path}: cannot be read ({error})") from None
        try:
            if len(text) > LARGEST:
                raise ValueError(f"it has more than {LARGEST:,} characters")
            table = FittedTable.from_json(text)
            if len(table) != steps:
                raise ValueError(f"it has {len(table)} steps")
        except ValueError as error:
            raise SamplerFileError(f"{path}: damaged ({error}); delete it, or fit the sampler again") from None
        try:
            table.check_fits({"weights": self._weights})
        except ValueError as error:
            raise SamplerFileError(f"{path}: {error}") from None
        return table

    def save(self, table: FittedTable) -> Path:
        """Writes a table that was fitted to the run's network; one with as many steps is replaced.

        Raises:
            SamplerFileError: the folder is a symbolic link.
            OSError: it cannot be written.
        """
        if self.folder.is_symlink():
            raise SamplerFileError(f"{self.folder} is a symbolic link, and a run writes only into its own folder")
        self.folder.mkdir(exist_ok=True)
        path = self._path(len(table))
        write_text(path, table.to_json())
        self._weights = table.fitted_to["weights"]
        return path
