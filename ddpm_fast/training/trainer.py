"""Training: from a config to a folder with a model and pictures of what it generates.

Image n of a run always meets the same timestep, noise and flip: they follow from the seed and the number of the step
alone. So a run that was interrupted and resumed is the run that was not, bit for bit on a CPU.
"""

# `load_run` is defined in run, the functions of the optimizer and the averages in files of their own; they were here.
__all__ = ["Trainer", "ema_decay", "load_run", "lr_factor", "make_optimizer", "set_lr", "train", "update_average"]

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..diffusion import GaussianDiffusion
from ..noise import derive_seed
from ..timestep_sampling import TIMESTEP_SAMPLERS
from . import checkpoint
from .averages import Averages, ema_decay, update_average, weights_of
from .config import ConfigError, RunConfig, build_diffusion
from .data import ShuffledBatches, batches, fingerprint, open_data
from .files import write_text
from .folder import check_folder, check_same, config_text, locked
from .graphed_step import GraphedStep
from .live import LiveReport
from .optimization import lr_factor, make_optimizer, set_lr
from .precision import autocast, chosen
from .progress import Losses, Progress, StepLosses
from .report import preview_path, write_preview, write_report
from .run import Run, RunError, load_run, pick_device
from .signals import Stopped, deferred_signals
from .speed import Speed
from .timestep_losses import TimestepLosses
from .trackers import check_installed

STEP = 1  # what the seed is used for: everything that a step draws except the noise
NOISE = 2  # and the noise of the training, which must differ from that of samples with the same seed


def train(config: RunConfig, folder: str | Path, *, resume: bool = False) -> Run:
    """Trains as `config` says and writes config.json, checkpoints, metrics.json and pictures into `folder`.

    Ctrl-C, SIGTERM and SIGHUP stop the training after the current step, which is saved.

    Args:
        folder: new or empty; with `resume`, the folder of a run that has a checkpoint.
        resume: go on from the newest checkpoint. If all steps have been taken, only the metrics are written anew.

    Raises:
        ConfigError, DataError, CheckpointError: input that cannot be used, or a checkpoint that cannot be saved.
        RunError: the folder cannot be used, another process trains in it, or the loss has not been finite for
            `training.max_skipped` steps in a row.
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


class Trainer:
    """A run in progress: the network, its optimizer and its averages (EMA).

    Raises:
        ConfigError, DataError: input that cannot be used.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        check_installed(config.training.trackers)
        self.config, self.folder, self.device = config, folder, pick_device()
        torch.manual_seed(config.seed)
        self.diffusion = build_diffusion(config).to(self.device)
        self.data = open_data(config.data)
        _check_fit(self.diffusion, self.data[[0]])
        self.fingerprint = fingerprint(self.data)
        self.optimizer = make_optimizer(self.diffusion, config.training)
        self.ema = Averages(self.diffusion, config.training, folder)
        timesteps = self.diffusion.num_timesteps
        self.timestep_sampler = TIMESTEP_SAMPLERS[config.training.timestep_sampling](timesteps).to(self.device)
        self.timestep_losses = TimestepLosses(timesteps).to(self.device)
        self._sample_offset = torch.zeros((), dtype=torch.int64, device=self.device)
        self._set_precision(chosen(config.training.precision, self.device))
        self.progress = Progress()
        self.losses = Losses(self.progress, config, folder)
        self.result = Run(folder, config, self.ema.module)
        self._noise_seed = derive_seed(config.seed, NOISE)
        self._saved, self._started = 0, 0.0

    def _set_precision(self, precision: str) -> None:
        """Gradients in float16 are scaled, since most are too small for it."""
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        clip = self.config.training.grad_clip
        self._update = GraphedStep(self._loss, self.optimizer, clip=clip, scaler=self.scaler, after=self._add_losses)

    def run(self) -> Run:
        """Takes the steps that are left."""
        c, p = self.config.training, self.progress
        first = p.step
        order = ShuffledBatches(
            len(self.data), c.batch_size, seed=self.config.seed, first_step=first, last_step=c.steps
        )
        self.diffusion.train()
        self.ema.begin(first)
        self.speed = Speed(self.config, self.device, self.precision, first, p.seconds)
        self.live = LiveReport(self.config, self.folder, p, self.speed)
        due = False
        loading = closing(batches(self.data, order, workers=c.workers))
        with self.live, deferred_signals() as stopped, loading as images:
            self._started = time.perf_counter()
            if 0 < first < c.steps and not preview_path(self.folder, first).exists():
                self.preview_if_due(stopped)  # the run ended between saving this step and its preview
            while p.step < c.steps:
                self.step(self._next(images))
                signal = stopped()
                if signal is not None:
                    self.live.bar.disable = True  # the terminal may be closed
                ending = signal is not None or p.step == c.steps
                due = due or p.step % c.save_every == 0
                if ending or due or p.step % self.losses.window == 0:
                    self._tell()
                self.live.bar.update()
                # Weights that give no finite loss must not replace those of older checkpoints.
                if ending or (due and not p.skipped_in_a_row):
                    self.save()
                    due = False
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
        self.timestep_losses.begin(step)
        loss, losses, t = self._update(images)
        self.losses.pending.append(StepLosses(loss, self._update.skipped, self._update.norm, losses, t))
        # Outside of the graph: the decay is another in each step, and a foreach op takes it from the host.
        self.ema.update(self.diffusion, step)
        self.progress.step += 1

    def _tell(self) -> None:
        """Reads the losses and tells of them. The time that this takes is not counted."""
        loss, now = self.losses.read(), time.perf_counter()
        lr = self.config.training.lr * lr_factor(self.progress.step - 1, self.config.training)
        self.live.tell(loss, self.losses.point, lr=lr, seconds=self.progress.seconds + now - self._started)
        self._started += time.perf_counter() - now

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, that of each sample, and their timesteps."""
        if self.config.data.flip:
            images = _flip_half(images)
        t, weights = self.timestep_sampler(len(images))
        how = {"seed": self._noise_seed, "sample_offset": self._sample_offset}
        with autocast(self.device, self.precision):
            shares = self.diffusion(images, times=t, loss_reduction="share", **how)
        return (weights * shares).sum(), shares * len(images), t

    def _add_losses(self, loss: Tensor, losses: Tensor, t: Tensor) -> None:
        self.timestep_losses.add(t, losses)
        self.timestep_sampler.update(t, losses)

    def _timesteps(self) -> dict[str, Tensor]:
        """What the run knows of the losses at its timesteps, by the names that a checkpoint has for it."""
        modules = {"timestep_losses": self.timestep_losses, "timestep_sampler": self.timestep_sampler}
        return nn.ModuleDict(modules).state_dict()

    def save(self) -> None:
        """Writes a checkpoint, metrics.json and the plots of the loss."""
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
            averages=self.ema.others(),
            optimizer=self.optimizer,
            timesteps=self._timesteps(),
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
        self.ema.load(newest)
        checkpoint.load_optimizer(newest, self.optimizer)
        if state["format"] > 2:
            checkpoint.load_weights(newest, "timesteps", self._timesteps())
        # What `auto` chooses may be another on this device.
        self._set_precision(state["precision"] or state["config"]["training"]["precision"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**{each.name: state[each.name] for each in fields(Progress)})
        self.losses = Losses(self.progress, self.config, self.folder)
        self._saved = first

    def report(self) -> None:
        write_report(self.result, self.progress, self.timestep_losses, self.speed)

    def preview_if_due(self, stopped: Callable[[], int | None]) -> None:
        """Writes previews/step-*.png every `sample_every` steps. If that fails, the training goes on."""
        step = self.progress.step
        if step % self.config.training.sample_every:
            return

        def give_up(_: int) -> None:
            if stopped():
                raise InterruptedError("stopped")

        began = time.perf_counter()
        try:
            write_preview(self.result, preview_path(self.folder, step), self.precision, give_up)
            self.live.samples(preview_path(self.folder, step))
        except InterruptedError:
            pass  # to be drawn when the run goes on
        except (OSError, RunError) as error:
            tqdm.write(f"no preview of step {step}: {error}")
        self._started += time.perf_counter() - began

    def _next(self, images: Iterator[Tensor]) -> Tensor:
        """The next batch. If it cannot be read, the steps taken so far are saved before the error is raised."""
        try:
            return next(images)
        except Exception:
            if self.progress.step > self._saved:
                if self.losses.pending:
                    self.losses.read()
                self.save()
            raise


def _flip_half(images: Tensor) -> Tensor:
    chosen = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def _check_fit(diffusion: GaussianDiffusion, images: Tensor) -> None:
    given, needed = tuple(images.shape[1:]), (diffusion.channels, *diffusion.image_size)
    if given != needed:
        raise ConfigError(f"data: the images are {given} (channels, H, W), but the model takes {needed}")
