"""The averages of a run's weights: exponential moving averages (EMA), several at once, and post-hoc EMA.

The first of `training.ema_decay` is what previews and samples are drawn with unless another is chosen.
"""

__all__ = ["Averages", "count", "ema_decay", "load_average", "update_average", "weights_of"]

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion import GaussianDiffusion
from . import checkpoint
from .config import TrainingConfig
from .power_average import exponent, power_decay
from .snapshots import TRACKED, WIDTH, Snapshots, width_name


def ema_decay(step: int, decay: float) -> float:
    """The decay of an EMA at a step, counted from 0. The first step copies the weights.

    It rises to the configured one, so that the average of a short run does not consist of its first weights.
    """
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


def count(c: TrainingConfig) -> int:
    """How many averages a run keeps, those for post-hoc EMA included."""
    return len(c.ema_decays) + (len(TRACKED) if c.ema_snapshot_every else 0)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) weights, of all parameters; a decay of 0 copies the weights.

    `AveragedModel.update_parameters` copies a number to the GPU in every call, for which the host waits. It copies all
    buffers as well: those of a GaussianDiffusion around a `UNet` never change.
    """
    averages, weights = list(average.parameters()), list(module.parameters())
    if decay == 0:
        torch._foreach_copy_(averages, weights)
    else:
        torch._foreach_lerp_(averages, weights, 1 - decay)


def weights_of(diffusion: GaussianDiffusion) -> dict[str, Tensor]:
    """What a training changes, by the names that a checkpoint has for it: the tensors themselves, not copies.

    Names are those of the network; a parameter of the diffusion itself is `diffusion.log_variance`.
    """
    own = {f"diffusion.{name}": p.detach() for name, p in diffusion.named_parameters(recurse=False)}
    return diffusion.model.state_dict() | own


class Averages:
    """All averages of a run's weights.

    Args:
        diffusion: with the weights.
        folder: of the run, for the snapshots of post-hoc EMA.

    Attributes:
        modules: copies of the diffusion with averages for their weights, by the names of these.
        module: the first of them, to sample from.
    """

    def __init__(self, diffusion: GaussianDiffusion, c: TrainingConfig, folder: Path) -> None:
        self._decays: dict[str, Callable[[int], float]] = {
            repr(decay): partial(ema_decay, decay=decay) for decay in c.ema_decays
        }
        self._every = c.ema_snapshot_every
        self._snapshots = Snapshots(folder)
        if self._every:
            self._decays |= {width_name(width): partial(power_decay, gamma=exponent(width)) for width in TRACKED}
        self.modules = {name: copy.deepcopy(diffusion) for name in self._decays}
        self.module = next(iter(self.modules.values()))

    def begin(self, step: int) -> None:
        """Before the first step after `step`: what was kept of later ones does not belong to the run."""
        if self._every:
            self._snapshots.forget_after(step)

    def update(self, diffusion: GaussianDiffusion, step: int) -> None:
        """Adds the weights after a step, counted from 0, to all averages, and keeps a snapshot if one is due."""
        for name, module in self.modules.items():
            update_average(module, diffusion, self._decays[name](step))
        if self._every and (step + 1) % self._every == 0:
            for width in TRACKED:
                self._snapshots.save(step + 1, width, weights_of(self.modules[width_name(width)]))

    def others(self) -> dict[str, dict[str, Tensor]]:
        """The averages besides the first: their weights, by the names of their files in a checkpoint."""
        return {f"ema-{name}": weights_of(module) for name, module in self.modules.items() if module is not self.module}

    def load(self, newest: Path) -> None:
        """Loads all averages from a checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for name, weights in {"ema": weights_of(self.module), **self.others()}.items():
            checkpoint.load_weights(newest, name, weights)


def load_average(newest: Path, run: Path, c: TrainingConfig, ema: str | float, weights: Mapping[str, Tensor]) -> str:
    """Loads one of the averages of a checkpoint, or its weights themselves.

    Args:
        newest: the checkpoint.
        run: the folder of the run that it belongs to, which has the snapshots for post-hoc EMA.
        c: of the checkpoint.
        ema: which one, as `run.load_run` has it.
        weights: tensors to be filled, by name.

    Returns:
        Its name, without the word `default`.

    Raises:
        CheckpointError: there is no such average, with those that there are, or a file is damaged.
    """
    decays = list(map(repr, c.ema_decays))
    name = decays[0] if ema == "default" else str(ema)
    number = _number(name.removeprefix(WIDTH))
    if name == "none":
        checkpoint.load_weights(newest, "model", weights)
        return name
    if name.startswith(WIDTH) and number is not None and c.ema_snapshot_every:
        Snapshots(run).load(newest, number, weights)
        return width_name(number)
    if not name.startswith(WIDTH) and repr(number) in decays:
        first = repr(number) == decays[0]
        checkpoint.load_weights(newest, "ema" if first else f"ema-{number!r}", weights)
        return repr(number)
    widths = [f"{WIDTH}0.08 or another width"] if c.ema_snapshot_every else []
    there = ", ".join(["default", *decays, *widths, "none"])
    why = "; widths need a run with training.ema_snapshot_every" if name.startswith(WIDTH) and not widths else ""
    raise checkpoint.CheckpointError(f"{newest}: there is no average {name!r}; there are: {there}{why}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
