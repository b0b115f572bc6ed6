"""The coefficients of a sampler's steps."""

__all__ = ["StepTable"]

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepTable:
    """K steps in the order in which they are taken, each field of shape (K,): t int64, the others float64.

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

    def __post_init__(self) -> None:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, column in columns.items():
            if column.shape != (len(self.t),) or not column.isfinite().all():
                raise ValueError(
                    f"a StepTable of {len(self.t)} steps needs as many finite numbers in {name}; got {column}"
                )

    def __len__(self) -> int:
        return len(self.t)

    @property
    def rows(self) -> Tensor:
        """The coefficients as `ops.reverse_step` takes them: (u, w, A, B, C, sigma), shape (K, 6), float64."""
        return torch.stack([getattr(self, field.name) for field in fields(self)[1:]], dim=1)
