"""The loss at each timestep in the course of a training, summed on the device."""

__all__ = ["TimestepLosses"]

import torch
from torch import Tensor, nn

STRETCHES = 64  # into which the steps so far are divided, at most
BINS = 100  # of timesteps that are told apart in what is shown, at most


class TimestepLosses(nn.Module):
    """Sums and counts of the losses of samples, by the timestep and by the stretch of the training.

    Stretches are of one step first. Whenever there are STRETCHES of them, each two become one, so that there are from
    then on at least half as many, all of 2^k steps. Which steps share a stretch follows from their number alone:
    it depends neither on the length of the training nor on where it was interrupted.

    Args:
        timesteps: T.

    Attributes:
        sums: (STRETCHES, T), float32, of the losses that are finite.
        counts: (STRETCHES, T), int64.
    """

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(STRETCHES, timesteps))
        self.register_buffer("counts", torch.zeros(STRETCHES, timesteps, dtype=torch.int64))
        self.register_buffer("stretch", torch.zeros((), dtype=torch.int64), persistent=False)

    def begin(self, step: int) -> None:
        """Makes room for the losses of a step, counted from 0; steps begin in their order."""
        length = stretch_length(step + 1)
        if step and length > stretch_length(step):
            for table in (self.sums, self.counts):
                half = table.view(STRETCHES // 2, 2, -1).sum(1)
                table[: STRETCHES // 2] = half
                table[STRETCHES // 2 :] = 0
        self.stretch.fill_(step // length)

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Adds the losses of the samples of a step, without waiting for the device and in the order of the samples.

        Args:
            t: (N,), int64.
            losses: (N,).
        """
        finite = losses.isfinite()
        at = (self.stretch.expand_as(t), t)
        self.sums.index_put_(at, torch.where(finite, losses.float(), 0.0), accumulate=True)
        self.counts.index_put_(at, finite.long(), accumulate=True)

    def curve(self, steps: int) -> list[tuple[float, float]]:
        """The mean loss at each timestep in the last quarter of the steps, as (t, mean); t is the middle of a bin.

        Args:
            steps: how many have been taken.
        """
        stretches = -(-steps // stretch_length(steps)) if steps else 0
        means = self._means(slice(stretches * 3 // 4, stretches), together=True)[0]
        middles = [(first + last - 1) / 2 for first, last in self._bins()]
        return [(t, mean) for t, mean in zip(middles, means.tolist(), strict=True) if mean == mean]

    def image(self, steps: int) -> tuple[int, Tensor]:
        """The length of a stretch in steps, and the mean loss of each stretch at each bin of timesteps.

        Args:
            steps: how many have been taken.

        Returns:
            The means: (stretches, bins), float64, on the CPU; NaN where there was no sample.
        """
        length = stretch_length(steps)
        return length, self._means(slice(0, -(-steps // length)), together=False)

    def _means(self, stretches: slice, *, together: bool) -> Tensor:
        sums, counts = self.sums[stretches].cpu().double(), self.counts[stretches].cpu().double()
        if together:
            sums, counts = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
        ends = self._bins()
        sums, counts = (
            torch.stack([table[:, first:last].sum(1) for first, last in ends], dim=1) for table in (sums, counts)
        )
        return sums / counts

    def _bins(self) -> list[tuple[int, int]]:
        """The first timestep of each bin and of the next one."""
        timesteps = self.sums.shape[1]
        bins = min(BINS, timesteps)
        return [(k * timesteps // bins, (k + 1) * timesteps // bins) for k in range(bins)]


def stretch_length(steps: int) -> int:
    """The steps of a stretch after so many steps: the smallest power of 2 by which STRETCHES are enough."""
    return 1 << (max(1, -(-steps // STRETCHES)) - 1).bit_length()
