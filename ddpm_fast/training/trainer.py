"""Training: from a config to a folder with a model and pictures of what it generates.

Image n of a run always meets the same timestep, noise and flip: they follow from the seed and the number of the step
alone. So a run that was interrupted and resumed is the run that was not, bit for bit on a CPU.
"""

# `load_run` is defined in run, the optimizer's functions in optimization, and were found here before.
__all__ = ["Trainer", "ema_decay", "load_run", "lr_factor", "make_optimizer", "set_lr", "train", "update_average"]

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from ..diffusion import GaussianDiffusion
from ..info import versions
from ..noise import derive_seed
from . import checkpoint
from .config import ConfigError, RunConfig, build_diffusion
from .data import ShuffledBatches, batches, fingerprint, open_data
from .files import write_text
from .folder import check_folder, check_same, config_text, locked
from .graphed_step import GraphedStep
from .optimization import ema_decay, lr_factor, make_optimizer, set_lr, update_average
from .pictures import save_grid, save_loss
from .precision import autocast, chosen
from .run import Run, RunError, load_run, pick_device, sample_batches, weights_of
from .signals import Stopped, deferred_signals

STEP = 1  # what the seed is used for: everything that a step draws except the noise
NOISE = 2  # and the noise of the training, which must differ from that of samples with the same seed
PREVIEW_STEPS = 50  # of DDIM
LOSS_POINTS = 200  # of the curve in metrics.json, at least
LONGEST_WINDOW = 50  # steps between two points of the curve


def train(config: RunConfig, folder: str | Path, *, resume: bool = False) -> Run:
    """Trains as `config` says and writes config.json, checkpoints, metrics.json and pictures into `folder`.

    Ctrl-C, SIGTERM and SIGHUP stop the training after the current step, which is saved.

    Args:
        folder: new or empty; with `resume`, the folder of a run that has a checkpoint.
        resume: go on from the newest checkpoint. If all steps have been taken, only the metrics are written anew.

    Raises:
        ConfigError, DataError, CheckpointError: input that cannot be used, or a checkpoint that cannot be saved.
        RunError: the folder cannot be used, another process trains in it, or the loss is no longer finite.
        Stopped: a signal has stopped the training, and the last step is saved.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise RunError(f"training runs in one process, but a launcher has started {processes}; start it without one")
    folder = Path(folder)
    check_folder(folder, resume=resume)
    trainer = Trainer(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check_folder(folder, resume=resume)  # again, since another process may have trained here until now
        if resume:
            trainer.restore()
        checkpoint.check_room(folder, trainer.progress.step, config.training.steps)
        write_text(folder / "config.json", config_text(config))
        return trainer.run()


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: how many have been taken.
        history: (step, mean loss since the point before it).
        recent: the losses since the last point of `history`.
        seconds: spent on the steps.
    """

    step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """A run in progress: the network, its optimizer and its average (EMA).

    Raises:
        ConfigError, DataError: input that cannot be used.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder, self.device = config, folder, pick_device()
        torch.manual_seed(config.seed)
        self.diffusion = build_diffusion(config).to(self.device)
        self.data = open_data(config.data)
        _check_fit(self.diffusion, self.data[[0]])
        self.fingerprint = fingerprint(self.data)
        self.optimizer = make_optimizer(self.diffusion, config.training)
        self.ema = AveragedModel(self.diffusion)
        self._sample_offset = torch.zeros((), dtype=torch.int64, device=self.device)
        self._set_precision(chosen(config.training.precision, self.device))
        self.progress = Progress()
        self.result = Run(folder, config, self.ema.module)
        self._noise_seed = derive_seed(config.seed, NOISE)
        self._window = max(1, min(LONGEST_WINDOW, config.training.steps // LOSS_POINTS))
        self._pending: list[Tensor] = []  # losses that are still on the device
        self._saved, self._started = 0, 0.0

    def _set_precision(self, precision: str) -> None:
        """Gradients in float16 are scaled, since most are too small for it."""
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._update = GraphedStep(self._loss, self.optimizer, clip=self.config.training.grad_clip, scaler=self.scaler)

    def run(self) -> Run:
        """Takes the steps that are left."""
        c, p = self.config.training, self.progress
        first = p.step
        order = ShuffledBatches(
            len(self.data), c.batch_size, seed=self.config.seed, first_step=first, last_step=c.steps
        )
        self.diffusion.train()
        self._started = time.perf_counter()
        bar = tqdm(desc="training", total=c.steps, initial=first, unit="step")
        with deferred_signals() as stopped, bar, closing(batches(self.data, order, workers=c.workers)) as images:
            if 0 < first < c.steps and not self._preview_path().exists():
                self.preview_if_due(stopped)  # the run ended between saving this step and its preview
            while p.step < c.steps:
                self.step(self._next(images))
                signal = stopped()
                if signal is not None:
                    bar.disable = True  # the terminal may be closed
                saving = signal is not None or p.step == c.steps or p.step % c.save_every == 0
                if saving or p.step % self._window == 0:
                    bar.set_postfix(loss=f"{self.read_losses():.4f}", refresh=False)
                bar.update()
                if saving:
                    self.save()
                if signal is not None and p.step < c.steps:
                    raise Stopped(signal, f"stopped after step {p.step}; go on with --resume")
                if p.step < c.steps:
                    self.preview_if_due(stopped)
        if p.step == first:
            self.report()  # the run may have ended between its last checkpoint and its report
        self.ema.module.eval()
        return self.result

    def step(self, images: Tensor) -> None:
        """Takes one step on uint8 images, (N, C, H, W).

        The loss is not read here, since reading it waits for the device.
        """
        c, step = self.config.training, self.progress.step
        torch.manual_seed(derive_seed(self.config.seed, STEP, step))  # of flips, timesteps and dropout
        self._sample_offset.fill_(step * c.batch_size)
        set_lr(self.optimizer, c.lr * lr_factor(step, c))
        self._pending.append(self._update(images))
        # Outside of the graph: the decay is another in each step, and a foreach op takes it from the host.
        update_average(self.ema, self.diffusion, ema_decay(step, c) if step else 0.0)
        self.progress.step += 1

    def _loss(self, images: Tensor) -> Tensor:
        if self.config.data.flip:
            images = _flip_half(images)
        with autocast(self.device, self.precision):
            return self.diffusion(images, seed=self._noise_seed, sample_offset=self._sample_offset)

    def read_losses(self) -> float:
        """Reads the losses of the last steps, and adds a point to the history at the end of a window.

        Returns:
            The loss of the last step.

        Raises:
            RunError: a loss is not finite.
        """
        p = self.progress
        if self._pending:
            p.recent += torch.stack(self._pending).tolist()
            self._pending = []
        bad = next((loss for loss in p.recent if not math.isfinite(loss)), None)
        if bad is not None:
            raise RunError(f"the loss is {bad} at step {p.step}; {checkpoint.advice(self.folder)}")
        latest = p.recent[-1]
        if p.step % self._window == 0 or p.step == self.config.training.steps:
            p.history.append((p.step, sum(p.recent) / len(p.recent)))
            p.recent = []
        return latest

    def save(self) -> None:
        """Writes a checkpoint, metrics.json and loss.png."""
        now = time.perf_counter()
        self.progress.seconds += now - self._started
        self._started = now
        state = {
            "config": self.config.model_dump(mode="json"),
            "data": self.fingerprint,
            "precision": self.precision,
            "scaler": self.scaler.state_dict() or None,
            **asdict(self.progress),
        }
        checkpoint.save(
            self.folder,
            self.progress.step,
            model=weights_of(self.diffusion),
            ema=weights_of(self.ema.module),
            optimizer=self.optimizer,
            state=state,
        )
        self._saved = self.progress.step
        self.report()

    def restore(self) -> None:
        """Goes back to the newest checkpoint.

        Raises:
            RunError: it is of a run with another config or other images, or of more steps than there are to take.
            CheckpointError: it is damaged.
        """
        newest = checkpoint.latest(self.folder)
        state = checkpoint.load_state(newest)
        check_same(self.config, self.fingerprint, newest, state)
        steps, first = self.config.training.steps, state["step"]
        if first > steps:
            raise RunError(f"{self.folder} has taken {first} steps already, and training.steps is {steps}")
        checkpoint.load_weights(newest, "model", weights_of(self.diffusion))
        checkpoint.load_weights(newest, "ema", weights_of(self.ema.module))
        checkpoint.load_optimizer(newest, self.optimizer)
        # What `auto` chooses may be another on this device.
        self._set_precision(state["precision"] or state["config"]["training"]["precision"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.ema.n_averaged.fill_(first)
        self.progress = Progress(first, state["history"], state["recent"], state["seconds"])
        self._saved = first

    def report(self) -> None:
        """Writes metrics.json and loss.png."""
        p, c = self.progress, self.config.training
        last = [loss for _, loss in p.history[-10:]] or p.recent
        self.result.metrics = {
            "loss": sum(last) / len(last) if last else None,
            "steps": p.step,
            "images_per_second": round(p.step * c.batch_size / p.seconds, 1) if p.seconds else None,
            "seconds": round(p.seconds, 1),
            "seed": self.config.seed,
            "device": str(self.device),
            "precision": self.precision,
            "versions": versions(),
            "history": p.history,
        }
        self.result.write_metrics()
        save_loss(p.history, self.folder / "loss.png")

    def preview_if_due(self, stopped: Callable[[], int | None]) -> None:
        """Writes previews/step-*.png every `sample_every` steps. If that fails, the training goes on."""
        step, path = self.progress.step, self._preview_path()
        if step % self.config.training.sample_every:
            return

        def give_up(_: int) -> None:
            if stopped():
                raise InterruptedError("stopped")

        began = time.perf_counter()
        how = {"sampler": "ddim", "steps": min(PREVIEW_STEPS, self.diffusion.num_timesteps), "eta": 0.0}
        try:
            run = self.result.in_precision(self.precision)
            drawn = sample_batches(run, 16, seed=self.config.seed, report=give_up, **how)
            images = torch.cat([images for _, images in drawn])
            path.parent.mkdir(exist_ok=True)
            save_grid(images, path)
        except InterruptedError:
            pass  # to be drawn when the run goes on
        except (OSError, RunError) as error:
            tqdm.write(f"no preview of step {step}: {error}")
        self._started += time.perf_counter() - began

    def _preview_path(self) -> Path:
        return self.folder / "previews" / f"step-{self.progress.step:08d}.png"

    def _next(self, images: Iterator[Tensor]) -> Tensor:
        """The next batch. If it cannot be read, the steps taken so far are saved before the error is raised."""
        try:
            return next(images)
        except Exception:
            if self.progress.step > self._saved:
                if self._pending:
                    self.read_losses()
                self.save()
            raise


def _flip_half(images: Tensor) -> Tensor:
    chosen = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def _check_fit(diffusion: GaussianDiffusion, images: Tensor) -> None:
    given, needed = tuple(images.shape[1:]), (diffusion.channels, *diffusion.image_size)
    if given != needed:
        raise ConfigError(f"data: the images are {given} (channels, H, W), but the model takes {needed}")
