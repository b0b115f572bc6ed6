"""How far a run has come: its steps, their losses, and the steps that were skipped."""

__all__ = ["Losses", "Progress", "StepLosses"]

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import checkpoint
from .config import RunConfig
from .run import RunError

LOSS_POINTS = 200  # of the curve in metrics.json, at least
LONGEST_WINDOW = 50  # steps between two points of the curve
NAMED = 10  # timesteps of a step that is skipped, at most
RANGES = 10  # of timesteps whose losses are told apart at a point, at most


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: how many have been taken.
        history: (step, mean loss since the point before it).
        recent: the losses since the last point of `history`.
        seconds: spent on the steps.
        skipped_steps: how many of the steps had a loss or a gradient that was not finite, and changed no weights; they
            are in neither `history` nor `recent`.
        skipped_in_a_row: how many of them were the last ones.
    """

    step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def loss(self) -> float | None:
        """The mean of the last losses; None before there are any."""
        last = [loss for _, loss in self.history[-10:]] or self.recent
        return sum(last) / len(last) if last else None


class StepLosses(NamedTuple):
    """What is known of a step on the device."""

    loss: Tensor  # ()
    skipped: Tensor  # (), of `GraphedStep`
    norm: Tensor  # (), of the gradients
    losses: Tensor  # (N,), of the samples
    t: Tensor  # (N,)


class Losses:
    """The losses of a run's steps, which stay on the device until they are read: reading waits for it.

    Args:
        folder: of the run, whose checkpoints an error names.

    Attributes:
        progress: what the losses that are read are added to.
        window: steps between two points of its history.
        pending: the steps that have not been read.
        point: what is told of the window that ended with the last call of `read`, by name; None if none ended.
    """

    def __init__(self, progress: Progress, config: RunConfig, folder: Path) -> None:
        self.progress, self.config, self.folder = progress, config.training, folder
        self.timesteps = config.diffusion.timesteps
        self.window = max(1, min(LONGEST_WINDOW, self.config.steps // LOSS_POINTS))
        self.pending: list[StepLosses] = []
        self.point: dict[str, float] | None = None
        self._norms: list[float] = []  # of the window's steps
        self._samples: list[tuple[Tensor, Tensor]] = []  # timesteps and losses

    def read(self) -> float:
        """Reads the losses of the steps since the last call, of which there is at least one.

        A step that was skipped is told. At the end of a window, a point is added to the history.

        Returns:
            The loss of the last step.

        Raises:
            RunError: `training.max_skipped` steps in a row were skipped.
        """
        p, pending, self.pending = self.progress, self.pending, []
        losses = torch.stack([of_step.loss for of_step in pending]).tolist()
        skipped = torch.stack([of_step.skipped for of_step in pending]).tolist()
        self._norms += torch.stack([of_step.norm for of_step in pending]).tolist()
        of_samples = ((of_step.t for of_step in pending), (of_step.losses for of_step in pending))
        self._samples.append(tuple(torch.cat(tuple(values)).cpu() for values in of_samples))
        steps = range(p.step - len(pending) + 1, p.step + 1)
        for step, loss, was_skipped, of_step in zip(steps, losses, skipped, pending, strict=True):
            if was_skipped or not math.isfinite(loss):  # with a scaler, it has skipped the step and does not say so
                self._tell_skipped(step, loss, of_step)
            else:
                p.recent.append(loss)
                p.skipped_in_a_row = 0
        self.point = None
        if p.step % self.window == 0 or p.step == self.config.steps:
            if p.recent:
                loss = sum(p.recent) / len(p.recent)
                p.history.append((p.step, loss))
                self.point = {"loss": loss} | self._norm() | self._by_timestep()
            p.recent, self._norms, self._samples = [], [], []
        return losses[-1]

    def _norm(self) -> dict[str, float]:
        """The mean norm of the gradients, without steps that were skipped."""
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        return {"grad_norm": sum(finite) / len(finite)} if finite else {}

    def _by_timestep(self) -> dict[str, float]:
        """The mean loss of the samples in each range of timesteps, by names such as `loss_by_timestep/000-099`."""
        t, losses = (torch.cat(values) for values in zip(*self._samples, strict=True))
        t, losses = t[losses.isfinite()], losses[losses.isfinite()].double()
        ranges, width = min(RANGES, self.timesteps), len(str(self.timesteps - 1))
        at = t * ranges // self.timesteps
        sums, counts = at.bincount(losses, ranges).tolist(), at.bincount(minlength=ranges).tolist()
        first = [-(-k * self.timesteps // ranges) for k in range(ranges + 1)]
        return {
            f"loss_by_timestep/{first[k]:0{width}d}-{first[k + 1] - 1:0{width}d}": sums[k] / counts[k]
            for k in range(ranges)
            if counts[k]
        }

    def _tell_skipped(self, step: int, loss: float, of_step: StepLosses) -> None:
        p, limit = self.progress, self.config.max_skipped
        p.skipped_steps += 1
        p.skipped_in_a_row += 1
        t, losses = of_step.t.tolist(), of_step.losses.tolist()
        bad = {at for at, value in zip(t, losses, strict=True) if not math.isfinite(value)}
        named = sorted(bad or set(t))
        shown = ", ".join(map(str, named[:NAMED])) + (f" and {len(named) - NAMED} more" if len(named) > NAMED else "")
        what = "the norm of the gradients is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        tqdm.write(f"step {step}: {what} at the timesteps {shown}; the update is skipped")
        if p.skipped_in_a_row >= limit:
            so_far = f", and the last {limit} updates are skipped" if limit > 1 else ""
            raise RunError(f"{what} at step {step}{so_far}; {checkpoint.advice(self.folder)}")
