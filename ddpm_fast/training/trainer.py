"""Training: from a config to a folder with a model and pictures of what it makes."""

__all__ = [
    "Run",
    "RunError",
    "autocast",
    "load_run",
    "make_optimizer",
    "pick_device",
    "sample_in_batches",
    "train",
    "write_pictures",
]

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from ..diffusion import GaussianDiffusion
from ..info import versions
from ..noise import derive_seed
from . import checkpoint
from .config import ConfigError, RunConfig, TrainingConfig, build_diffusion, check
from .data import ShuffledBatches, batches, open_data
from .pictures import save_grid, save_loss

NOISE = 2  # and the noise of the images, apart from that of samples with the same seed
PREVIEW_STEPS = 50  # of DDIM, for the pictures made while training
STEP = 1  # what a run's seed is used for: all that a step draws but the noise
LOSS_POINTS = 200  # of the curve in metrics.json, at least
LONGEST_WINDOW = 50  # steps between two of them


class RunError(RuntimeError):
    """Why a run cannot begin or go on."""


@dataclass
class Run:
    """A trained model: `diffusion` has the averaged (EMA) weights."""

    folder: Path
    config: RunConfig
    diffusion: GaussianDiffusion
    metrics: dict[str, Any]

    def write_metrics(self) -> None:
        (self.folder / "metrics.json").write_text(json.dumps(self.metrics, indent=2) + "\n")


def pick_device() -> torch.device:
    """The current accelerator, or else the CPU. Of several processes on a machine, each takes one of its own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:  # which a launcher sets; processes share accelerators where there are more of them
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return accelerator


def train(config: RunConfig, folder: Path, *, resume: bool = False) -> Run:
    """Trains as `config` says and writes into `folder`: config.json, checkpoints, metrics.json and pictures.

    Image n of the run always meets the same timestep, noise and flip, so that a run that was interrupted and
    resumed is the run that was not, bit for bit on a CPU. Ctrl-C stops after the step and saves it.

    Raises:
        ConfigError, DataError, CheckpointError: input that cannot be used.
        RunError: the folder holds another run, or the loss is no longer finite.
        KeyboardInterrupt: after Ctrl-C, once the step is saved.
    """
    device, c = pick_device(), config.training
    torch.manual_seed(config.seed)
    diffusion = build_diffusion(config).to(device)
    data = open_data(config.data)
    _check_fit(diffusion, data[[0]])
    optimizer = make_optimizer(diffusion, c)
    ema = AveragedModel(diffusion)  # each step sets its decay

    first_step, history, recent, seconds = 0, [], [], 0.0
    if checkpoint.steps(folder):
        if not resume:
            raise RunError(f"{folder} holds a run already; continue it with --resume, or choose another folder")
        newest = checkpoint.latest(folder)
        state = checkpoint.load_state(newest)
        _check_same(config, state["config"])
        checkpoint.load_weights(newest, "model", diffusion.model)
        checkpoint.load_weights(newest, "ema", ema.module.model)
        ema.n_averaged.fill_(state["step"])
        optimizer.load_state_dict(checkpoint.load_optimizer(newest))
        first_step, history, recent, seconds = (state[key] for key in ("step", "history", "recent", "seconds"))
        if first_step >= c.steps:
            raise RunError(f"{folder} has taken {first_step} steps already, and training.steps is {c.steps}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")

    run = Run(folder, config, ema.module, metrics={})

    def save(done: int) -> None:
        state = {"config": config.model_dump(mode="json"), "history": history, "recent": recent, "seconds": seconds}
        checkpoint.save(folder, done, model=diffusion.model, ema=ema.module.model, optimizer=optimizer, state=state)
        last = [loss for _, loss in history[-10:]] or recent
        run.metrics = {
            "loss": sum(last) / len(last),
            "steps": done,
            "images_per_second": round(done * c.batch_size / seconds, 1),
            "seconds": round(seconds, 1),
            "seed": config.seed,
            "device": str(device),
            "versions": versions(),
            "history": history,
        }
        run.write_metrics()
        save_loss(history, folder / "loss.png")

    sampler = ShuffledBatches(len(data), c.batch_size, seed=config.seed, first_step=first_step, last_step=c.steps)
    bar = tqdm(batches(data, sampler, workers=c.workers), "training", total=c.steps, initial=first_step, unit="step")
    window, pending = max(1, min(LONGEST_WINDOW, c.steps // LOSS_POINTS)), []
    noise_seed = derive_seed(config.seed, NOISE)
    started = time.perf_counter()
    diffusion.train()
    with _deferred_interrupt() as interrupted:
        for step, images in enumerate(bar, first_step):
            torch.manual_seed(derive_seed(config.seed, STEP, step))  # flips, timesteps and dropout follow from the step
            images = images.to(device, non_blocking=True)
            if config.data.flip:
                images = _flip_half(images)
            with autocast(device, c):
                loss = diffusion(images, seed=noise_seed, sample_offset=step * c.batch_size)
            loss.backward()
            if c.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(diffusion.model.parameters(), c.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = c.lr * lr_factor(step, c)
            optimizer.step()
            optimizer.zero_grad()
            ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay(step, c))
            ema.update_parameters(diffusion)

            pending.append(loss.detach())
            done = step + 1
            stop = done == c.steps or interrupted()
            saving = stop or done % c.save_every == 0
            if saving or done % window == 0:  # not each step: to read a loss is to wait for it
                recent += torch.stack(pending).tolist()
                pending = []
                if not all(map(math.isfinite, recent)):
                    raise RunError(f"the loss is {recent[-1]} at step {done}: lower training.lr or training.grad_clip")
                bar.set_postfix(loss=f"{recent[-1]:.4f}")
            if done % window == 0 or done == c.steps:
                history.append((done, sum(recent) / len(recent)))
                recent = []
            if saving:
                now = time.perf_counter()
                seconds, started = seconds + now - started, now
                save(done)
            if stop:
                break
            if done % c.sample_every == 0:
                pause = time.perf_counter()
                (folder / "previews").mkdir(exist_ok=True)
                preview_steps = min(PREVIEW_STEPS, diffusion.num_timesteps)
                preview = ema.module.sample(16, sampler="ddim", steps=preview_steps, eta=0.0, seed=config.seed)
                save_grid(preview, folder / "previews" / f"step-{done:08d}.png")
                started += time.perf_counter() - pause
    bar.close()
    if interrupted() and done < c.steps:
        raise KeyboardInterrupt(f"stopped after step {done}; go on with --resume")
    ema.module.eval()
    return run


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the step, so that it can be saved; a second one stops at once."""
    asked = []

    def handler(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def ema_decay(step: int, c: TrainingConfig) -> float:
    """The average's decay at step (from 0): it rises to the configured one, lest a short run keep its beginning."""
    return min(c.ema_decay, (1 + step) / (10 + step))


def make_optimizer(diffusion: GaussianDiffusion, c: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        diffusion.model.parameters(), lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=True
    )


def autocast(device: torch.device, c: TrainingConfig) -> torch.autocast:
    """The forward pass in the config's precision: convolutions and products in bfloat16, losses in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=c.precision == "bf16")


def lr_factor(step: int, c: TrainingConfig) -> float:
    """The share of the learning rate that step (from 0) takes."""
    factor = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
    if c.cosine_decay:
        factor *= 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return factor


def sample_in_batches(run: Run, n: int, **arguments: Any) -> Iterator[torch.Tensor]:
    """Samples n images, [0, 1], no more at once than the training has seen to fit; `arguments` as in `sample`."""
    size = run.config.training.batch_size
    for first in range(0, n, size):
        yield run.diffusion.sample(min(size, n - first), sample_offset=first, **arguments).cpu()


def write_pictures(run: Run, *, seed: int = 0, n: int = 64) -> torch.Tensor:
    """samples.png, a grid of n, and denoising.png, rows from x_T to x_0. Returns the samples, in [0, 1]."""
    samples = torch.cat(list(sample_in_batches(run, n, seed=seed, progress=True)))
    save_grid(samples[:64], run.folder / "samples.png")
    last = len(run.diffusion.step_table())
    shown = {round(i * last / 10) for i in range(11)}
    states = [s.x for s in run.diffusion.sample_progressive(8, seed=seed) if s.step in shown]
    save_grid(torch.stack(states, dim=1).flatten(0, 1), run.folder / "denoising.png", columns=len(states))
    return samples


def load_run(folder: Path) -> Run:
    """A trained model from the folder of a run (its newest checkpoint), or from one of its checkpoints.

    Raises:
        CheckpointError: there is none, or a file of it is damaged.
    """
    newest = checkpoint.latest(folder)
    config = check(checkpoint.load_state(newest)["config"], newest / "state.json")
    diffusion = build_diffusion(config)
    checkpoint.load_weights(newest, "ema", diffusion.model)
    return Run(folder, config, diffusion.to(pick_device()).eval(), {})


def _flip_half(images: torch.Tensor) -> torch.Tensor:
    chosen = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def _check_fit(diffusion: GaussianDiffusion, images: torch.Tensor) -> None:
    given, needed = tuple(images.shape[1:]), (diffusion.channels, *diffusion.image_size)
    if given != needed:
        raise ConfigError(f"data: the images are {given} (channels, H, W), but the model takes {needed}")


def _check_same(config: RunConfig, before: dict[str, Any]) -> None:
    """Only the number of steps and the intervals may differ from the run that is resumed."""
    free = {"steps", "save_every", "sample_every", "workers"}
    now = config.model_dump(mode="json")
    for section in now:
        a, b = now[section], before.get(section)
        if section == "training":
            a, b = ({k: v for k, v in d.items() if k not in free} for d in (a, b or {}))
        if a != b:
            raise RunError(f"the run was started with another {section}: {b}, now {a}")
