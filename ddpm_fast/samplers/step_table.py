"""The coefficients of a sampler's steps."""

__all__ = ["StepTable"]

from dataclasses import dataclass, fields

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
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def rows(self) -> Tensor:
        """The coefficients as `ops.reverse_step` takes them, float64.

        Shape (K, 6): (u, w, A, B, C, sigma); with `log_bounds` (K, 8).
        """
        _, *columns = self._columns().values()
        return torch.column_stack(columns)
