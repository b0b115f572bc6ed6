"""Experiment trackers: TensorBoard, wandb and trackio, through accelerate's interface to them."""

__all__ = ["TRACKERS", "Trackers", "check_installed"]

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .config import ConfigError, RunConfig
from .run import RunError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "ddpm_fast"  # for wandb and trackio


def check_installed(names: tuple[str, ...]) -> None:
    """Checks that the packages of some trackers are installed.

    Raises:
        ConfigError: one is not; the message says how to install it.
    """
    for name in names:
        if missing := [package for package in ("accelerate", name) if find_spec(package) is None]:
            extra = "" if name == "tensorboard" else f" {name}"
            raise ConfigError(
                f'training.trackers: {name} needs {" and ".join(missing)}: pip install "ddpm_fast[watch]"{extra}'
            )


class Trackers:
    """Sends the points of a run to trackers. One that fails is left out from then on, and the training goes on.

    A run that goes on from a checkpoint stays one curve. TensorBoard is told to forget what came after the checkpoint.
    wandb and trackio cannot forget: steps that they know already are not sent again.

    Args:
        names: of trackers in `TRACKERS`.
        run_id: of the run; one that goes on has the same.
        first: how many steps have been taken.
        last: the last step that was sent before.

    Raises:
        RunError: a tracker cannot be started.
    """

    def __init__(
        self, names: tuple[str, ...], folder: Path, config: RunConfig, *, run_id: str, first: int, last: int
    ) -> None:
        self.last = last
        self._running: list[GeneralTracker] = []
        if names:
            from accelerate import PartialState

            PartialState()  # without which accelerate's trackers do not log
        for name in names:
            try:
                self._running.append(TRACKERS[name](folder.resolve(), config, run_id, first))
            except Exception as error:
                self.finish()
                raise RunError(f"training.trackers: {name} cannot be started: {_first_line(error)}") from error

    def log(self, step: int, values: dict[str, float]) -> None:
        self._each(step, lambda tracker: tracker.log(values, step=step))

    def samples(self, step: int, path: Path) -> None:
        """Sends a grid of samples.

        Args:
            path: of the picture.
        """
        if not self._running:
            return
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))

        def send(tracker: "GeneralTracker") -> None:
            match tracker.name:
                case "tensorboard":
                    tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
                    tracker.tracker.flush()
                case "wandb":
                    tracker.log_images({"samples": [pixels]}, step=step)
                case "trackio":  # for which accelerate has no function
                    import trackio

                    tracker.log({"samples": trackio.Image(pixels)}, step=step)

        self._each(step, send)

    def finish(self) -> None:
        self._each(None, lambda tracker: tracker.finish())

    def _each(self, step: int | None, send: Callable[["GeneralTracker"], Any]) -> None:
        for tracker in tuple(self._running):
            if step is not None and step <= self.last and tracker.name != "tensorboard":
                continue
            try:
                send(tracker)
            except Exception as error:
                self._running.remove(tracker)
                tqdm.write(f"nothing more is sent to {tracker.name}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _tensorboard(folder: Path, config: RunConfig, run_id: str, first: int) -> "GeneralTracker":
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", folder, purge_step=first + 1)
    tracker.start()
    # As text: accelerate writes a config as hyperparameters, which TensorBoard shows as another run at each resume.
    shown = json.dumps(config.model_dump(mode="json"), indent=2)
    tracker.log({"config": f"```json\n{shown}\n```"}, step=first)
    return tracker


def _wandb(folder: Path, config: RunConfig, run_id: str, first: int) -> "GeneralTracker":
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    how = {"id": run_id, "name": folder.name, "dir": folder, "resume": "allow", "allow_val_change": True}
    tracker = WandBTracker(project, config=config.model_dump(mode="json"), **how)
    tracker.start()
    return tracker


def _trackio(folder: Path, config: RunConfig, run_id: str, first: int) -> "GeneralTracker":
    from accelerate.tracking import TrackioTracker

    how = {"name": f"{folder.name}-{run_id}", "resume": "allow", "embed": False}
    tracker = TrackioTracker(PROJECT, config=config.model_dump(mode="json"), **how)
    tracker.start()
    return tracker


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
