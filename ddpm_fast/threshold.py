r"""Dynamic thresholding: bounds of x0_hat that follow from its own values. Saharia et al. (2022), sec. 2.3.

    q = the quantile of |x0_hat| over one sample
    s = max(q, b)                                      b: the bound of `clip_denoised`, 1 by default
    x0 = clip(x0_hat, -s, s) b / s

A step is x' = A x + B x0 + ..., so that the factor b / s goes into B: each sample has a row of its own.
"""

__all__ = ["DynamicThreshold"]

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import finite

B = 3  # its column in the rows (u, w, A, B, C, sigma)


class Thresholded(NamedTuple):
    """How `ops.reverse_step` takes a step with bounds for each sample; n is its row there.

    Attributes:
        index: 0 to N - 1, (N,); rows: (N, 6), or (N, 8) with a learned variance; clip: (N, 2).
        scale: b / s, of the shape (N, 1, ...), by which the clipped x0_hat is yet to be multiplied.
    """

    index: Tensor
    rows: Tensor
    clip: Tensor
    scale: Tensor


class DynamicThreshold:
    """Bounds of x0_hat for each sample.

    Args:
        quantile: in (0, 1], such as 0.995.
        bounds: (-b, b), to which x0_hat is scaled.

    Raises:
        ValueError: another quantile, or bounds that are not symmetric.
    """

    def __init__(self, quantile: float, bounds: tuple[float, float] | None) -> None:
        if not 0 < finite("dynamic_threshold", quantile, 0) <= 1:
            raise ValueError(f"dynamic_threshold is a quantile, above 0 and up to 1; got {quantile!r}")
        if bounds is None or bounds[0] != -bounds[1]:
            raise ValueError(f"dynamic_threshold scales x0_hat into symmetric bounds; got clip_denoised of {bounds}")
        self._quantile, self._bound = float(quantile), bounds[1]

    def __call__(self, x: Tensor, pred: Tensor, row: Tensor) -> Thresholded:
        """What a step takes.

        Args:
            x: the state, (N, ...).
            pred: what the network predicts at it, in its shape.
            row: (u, w, A, B, C, sigma, ...) of the step, (1, 6) or (1, 8).
        """
        u, w = row[0, 0], row[0, 1]
        s = self._quantiles((u * x + w * pred.to(x.dtype)).abs().flatten(1)).clamp(min=self._bound)
        scale = self._bound / s  # (N,)
        rows = row.repeat(len(x), 1)
        rows[:, B] *= scale
        index = torch.arange(len(x), device=x.device)
        return Thresholded(index, rows, torch.stack([-s, s], dim=1), scale.view(-1, *[1] * (x.ndim - 1)))

    def _quantiles(self, values: Tensor) -> Tensor:
        """Of each row, by linear interpolation, as torch.quantile, which refuses more than 2^24 values."""
        position = self._quantile * (values.shape[1] - 1)
        below = int(position)
        largest = values.topk(values.shape[1] - below, dim=1).values  # falling, down to that at `below`
        return torch.lerp(largest[:, -1], largest[:, max(-2, -largest.shape[1])], position - below)
