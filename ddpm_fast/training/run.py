"""A trained model and the folder it lies in: loading it, sampling from it, showing what it has learned.

RUN/
    config.json  metrics.json  checkpoints/  previews/  loss.png  loss_by_timestep.png  samples.png  denoising.png
    averages/    snapshots for post-hoc EMA
    progress.jsonl  tensorboard/  wandb/    for those who watch
    samplers/    fitted to the network
    report.json  report.png    of an evaluation
"""

__all__ = [
    "Run",
    "RunError",
    "load_run",
    "pick_device",
    "pictures_are_due",
    "sample_batches",
    "sampling_bar",
    "weights_of",
    "write_pictures",
]

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion import GaussianDiffusion
from ..fitting import weights_digest
from . import checkpoint
from .averages import load_average, weights_of
from .config import RunConfig, build_diffusion, build_network, check
from .fitted_samplers import FittedSamplers
from .pictures import save_grid
from .precision import in_precision
from .receipt import Receipt, receipt_of

ROWS = 8  # of denoising.png
REPORTS = 20  # per batch: few enough that waiting for the device costs nothing, and the bar shows finished work
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"  # n is a fraction


class RunError(RuntimeError):
    """Why a run cannot begin, go on or be sampled from."""


@dataclass
class Run:
    """A trained model: `diffusion` has averaged (EMA) weights, of which `ema` has the name, as for `load_run`.

    `float32_digest` identifies them where `diffusion` has them in another dtype.
    """

    folder: Path
    config: RunConfig
    diffusion: GaussianDiffusion
    metrics: dict[str, Any] = field(default_factory=dict)
    ema: str = "default"
    float32_digest: str | None = None

    def in_precision(self, precision: str) -> "Run":
        """The run with a network whose weights have the dtype of `auto`, `fp32`, `bf16` or `fp16`, to sample from."""
        reduced = in_precision(self.diffusion, precision)
        return self if reduced is self.diffusion else replace(self, diffusion=reduced, float32_digest=self.digest())

    def digest(self) -> str:
        """Identifies the weights, in whichever precision they are: see `weights_digest`."""
        return self.float32_digest or weights_digest(weights_of(self.diffusion))

    def receipt(self, n: int, *, batch_size: int | None = None, **how: Any) -> Receipt:
        """The receipt of n images that `sample_batches` samples.

        Args:
            batch_size: of the batches, if several processes share the images; see `batch_size`.
            how: seed, sampler, steps, eta and spacing, as `sample_batches` is given them.
        """
        size = batch_size or self.batch_size(n)
        return receipt_of(self.diffusion, self.ema, self.digest(), n, size, **({"seed": 0} | how))

    def batch_size(self, n: int, count: int = 1) -> int:
        """The size of the batches in which `count` processes sample n images, such as is known to fit into memory."""
        return min(self.config.training.batch_size, math.ceil(n / count))

    def write_metrics(self) -> None:
        checkpoint.write_text(self.folder / "metrics.json", json.dumps(self.metrics, indent=2) + "\n")


def pick_device() -> torch.device:
    """The current accelerator, or else the CPU. Each process of a launcher takes an accelerator of its own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:  # set by launchers; with fewer accelerators than processes, they are shared
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return accelerator


def load_run(folder: str | Path, *, ema: str | float = "default") -> Run:
    """Loads a trained model from the folder of a run (its newest checkpoint), or from one of its checkpoints.

    Args:
        ema: which average of the weights. `default` is the first of `training.ema_decay`; another is chosen by its
            decay, such as 0.9999. If the run has kept snapshots, `sigma_rel=0.08` is the power-function average of
            that relative width (`power_average`), made from them. `none` is the weights themselves.

    Raises:
        CheckpointError: there is no checkpoint, it has no such average, or one of its files is damaged.
        ConfigError: the configuration in the checkpoint is not valid.
    """
    folder = Path(folder)
    newest = checkpoint.latest(folder)
    config = check(checkpoint.load_state(newest)["config"], newest / "state.json")
    with torch.device("meta"):  # no memory is taken before the weights are known to be there
        weights = list(build_network(config).state_dict().values())
        if config.diffusion.variance == "learnable":
            weights.append(torch.empty(config.diffusion.timesteps))
    checkpoint.check_size(newest, "ema", weights)
    diffusion = build_diffusion(config)
    name = load_average(newest, _run_of(newest), config.training, ema, weights_of(diffusion))
    diffusion.fitted = FittedSamplers(_run_of(newest), diffusion.model)
    return Run(folder, config, diffusion.to(pick_device()).eval(), ema=name)


def _run_of(newest: Path) -> Path:
    """The run that a checkpoint belongs to; the checkpoint itself if it was copied elsewhere."""
    return newest.parent.parent if newest.parent.name == "checkpoints" else newest


def sample_batches(
    run: Run,
    n: int,
    *,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    rank: int = 0,
    count: int = 1,
    report: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Samples n images in batches no larger than those of the training, which are known to fit into memory.

    Batch k belongs to process k mod `count`. The last steps of a batch are reported when the next batch is requested,
    because the caller has then written its images.

    Args:
        seed, sampler, steps, eta, spacing: as in `GaussianDiffusion.sample`.
        rank, count: the index of this process, and the number of processes that share the images.
        report: called with the number of sampling steps taken since its last call, times the images of the batch.

    Yields:
        The index of a batch's first image, and the batch: (N, C, H, W), float32, in [0, 1], on the CPU.

    Raises:
        RunError: an image has values that are not finite.
    """
    diffusion, report = run.diffusion, report or (lambda steps: None)
    total = len(diffusion.step_table(sampler, steps, eta, spacing))
    size = run.batch_size(n, count)
    chosen = {"seed": seed, "sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing}
    chosen["every"] = math.ceil(total / REPORTS)
    for first in range(rank * size, n, count * size):
        length, done = min(size, n - first), 0
        for state in diffusion.sample_progressive(length, sample_offset=first, **chosen):
            if state.x.device.type != "cpu":
                torch.accelerator.synchronize(state.x.device)
            if state.step < total:
                report(length * (state.step - done))
                done = state.step
        yield first, check_finite(run, state.x.cpu())
        report(length * (total - done))


def sampling_bar(n: int, *, disable: bool = False) -> tqdm:
    """A progress bar over n images, which can be advanced by fractions of an image."""
    return tqdm(desc="sampling", total=n, unit=" images", bar_format=BAR, disable=disable)


def check_finite(run: Run, images: Tensor) -> Tensor:
    """Returns the images.

    Raises:
        RunError: one of them has values that are not finite, which a picture would show as black.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise RunError(
            f"{run.folder}: {int((~finite).sum())} of {len(images)} sampled images have values that are not finite: "
            "the training has diverged; sample from an older checkpoint, or train with a lower training.lr"
        )
    return images


def write_pictures(run: Run, *, seed: int = 0, n: int = 64) -> Tensor:
    """Writes samples.png, a grid of at most 64 samples, and denoising.png, rows from x_T to x_0.

    The network is computed in the precision of the training.

    Returns:
        The n samples, (n, C, H, W), in [0, 1].
    """
    run = run.in_precision(run.metrics.get("precision", run.config.training.precision))
    steps = len(run.diffusion.step_table())
    taken = 0
    with sampling_bar(n) as bar:

        def report(done: int) -> None:
            nonlocal taken
            taken += done
            bar.update(taken / steps - bar.n)

        batches = sample_batches(run, n, seed=seed, report=report)
        samples = torch.cat([images for _, images in batches])
    shown = {round(i * steps / 10) for i in range(11)}
    states = [s.x for s in run.diffusion.sample_progressive(ROWS, seed=seed) if s.step in shown]
    rows = check_finite(run, torch.stack(states, dim=1).flatten(0, 1))
    receipt = run.receipt(n, seed=seed).of_grid(min(n, 64))
    save_grid(samples[:64], run.folder / "samples.png", receipt=receipt)
    receipt = run.receipt(ROWS, batch_size=ROWS, seed=seed).of_states(shown)
    save_grid(rows, run.folder / "denoising.png", columns=len(states), receipt=receipt)
    return samples


def pictures_are_due(run: Run) -> bool:
    """Whether a picture of `write_pictures` is missing, or older than the newest checkpoint."""
    made = (checkpoint.latest(run.folder) / "state.json").stat().st_mtime
    pictures = (run.folder / "samples.png", run.folder / "denoising.png")
    return any(not path.exists() or path.stat().st_mtime < made for path in pictures)
