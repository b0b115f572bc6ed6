"""The coefficients of a sampler's steps."""

__all__ = ["StepTable"]

import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepTable:
    """K steps in the order in which they are taken, each field of shape (K,): t int64, the others float64.

    Where the network predicts the variance, sigma is 1, or 0 for a step without noise, and `log_bounds`, (K, 2), holds
    the logs of the lower and the upper variance.

    Raises:
        ValueError: fields of different lengths, or coefficients that are not finite.
    """

    t: Tensor
    u: Tensor
    w: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    sigma: Tensor
    log_bounds: Tensor | None = None

    def __post_init__(self) -> None:
        for name, column in self._columns().items():
            wanted = (len(self.t), 2) if name == "log_bounds" else (len(self.t),)
            if column.shape != wanted or not column.isfinite().all():
                raise ValueError(
                    f"a StepTable of {len(self.t)} steps needs as many finite numbers in {name}; got {column}"
                )

    def __len__(self) -> int:
        return len(self.t)

    def _columns(self) -> dict[str, Tensor]:
        columns = {field.name: getattr(self, field.name) for field in fields(StepTable)}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def rows(self) -> Tensor:
        """The coefficients as `ops.reverse_step` takes them, float64.

        Shape (K, 6): (u, w, A, B, C, sigma); with `log_bounds` (K, 8).
        """
        _, *columns = self._columns().values()
        return torch.column_stack(columns)

    def to_json(self) -> str:
        """The table as JSON, an object of lists; `from_json` gives it back bit for bit."""
        return json.dumps(self._to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "StepTable":
        """The table that `to_json` has written.

        Raises:
            ValueError: the text is not such a table; the message says what is wrong.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"a table is a JSON object, got {type(found).__name__}")
        return cls._from_dict(found)

    def _to_dict(self) -> dict[str, Any]:
        return {name: column.tolist() for name, column in self._columns().items()}

    @classmethod
    def _from_dict(cls, found: dict[str, Any]) -> "StepTable":
        return cls(**columns_from(found))


def columns_from(found: dict[str, Any]) -> dict[str, Tensor]:
    """The columns of a table from the lists of a JSON object, which has them all, or all but `log_bounds`."""
    names = [field.name for field in fields(StepTable)]
    if odd := sorted((found.keys() | {"log_bounds"}) ^ set(names)):
        raise ValueError(f"a table has the columns {', '.join(names)}; {odd[0]} is missing or unknown")
    columns = {}
    for name, values in found.items():
        kinds = (int,) if name == "t" else (int, float)
        numbers = values
        if name == "log_bounds" and isinstance(values, list) and all(isinstance(pair, list) for pair in values):
            numbers = [number for pair in values for number in pair]
        if not isinstance(numbers, list) or any(type(number) not in kinds for number in numbers):
            raise ValueError(f"{name} must be a list of {'integers' if name == 't' else 'numbers'}, got {values!r:.80}")
        try:
            columns[name] = torch.tensor(values, dtype=torch.int64 if name == "t" else torch.float64, device="cpu")
        except (OverflowError, RuntimeError, ValueError) as error:  # an integer of more than 64 bits, ragged pairs
            raise ValueError(f"{name} cannot be a tensor ({error})") from None
    return columns
