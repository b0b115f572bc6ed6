"""The time and the memory of a training step, measured over a few of them."""

__all__ = ["StepCost", "in_processes", "measure", "sampling_time"]

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..training import averages
from ..training.averages import weights_of
from ..training.config import RunConfig, build_diffusion
from ..training.graphed_step import GraphedStep
from ..training.optimization import make_optimizer
from ..training.precision import autocast, chosen, in_precision
from .memory import SavedActivations, StepMemory

SECONDS = 6  # that the timed steps take together, approximately
STEPS = 4  # that are timed, at most; at least two
PATIENCE = timedelta(minutes=10)  # of processes for one another


@dataclass(frozen=True)
class StepCost:
    """What a training step costs.

    Attributes:
        update: seconds that the optimizer takes, whatever the number of images.
        image: seconds of each image.
        images: of the batches that were timed.
        exchange: seconds in which processes add up their gradients.
        memory: of one process.
        weights: bytes of the network's weights.
    """

    update: float
    image: float
    images: int
    memory: StepMemory
    weights: int
    exchange: float = 0.0

    def seconds(self, batch: int) -> float:
        return self.update + self.image * batch + self.exchange


def measure(config: RunConfig, device: torch.device) -> StepCost:
    """Takes training steps on random images of the config's size.

    If steps with the config's batch size would take too long, they are taken with fewer images.

    Raises:
        ConfigError: the values of the config are valid each, but not together.
    """
    step = _Step(config, device)
    memory = step.memory()
    update, image, images = step.times(config.training.batch_size)
    return StepCost(update, image, images, memory, step.weights)


def sampling_time(config: RunConfig, device: torch.device, image: float) -> float:
    """The seconds of a call of the network for an image, in sampling.

    Args:
        image: those in a training step.
    """
    diffusion = in_precision(build_diffusion(config).to(device).eval(), chosen(config.training.precision, device))
    n = max(1, min(config.training.batch_size, int(SECONDS / STEPS / image)))
    steps = min(2, diffusion.num_timesteps)
    how = {"sampler": "ddim", "eta": 0.0, "seed": 0}
    diffusion.sample(n, steps=1, **how)
    return _seconds(device, lambda: diffusion.sample(n, steps=steps, **how)) / (steps * n)


class _Step:
    """A training step that can be timed."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.device, self.precision = device, chosen(config.training.precision, device)
        self.diffusion = build_diffusion(config).to(device)
        self.optimizer = make_optimizer(self.diffusion, config.training)
        scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        clip = config.training.grad_clip
        self._take = GraphedStep(self._loss, self.optimizer, clip=clip, scaler=scaler)
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self.parameters = list(self.diffusion.parameters())
        self.averages = averages.count(config.training)
        self.weights = sum(x.nbytes for x in weights_of(self.diffusion).values())

    def _loss(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.diffusion(images, seed=0, sample_offset=self._first)

    def _images(self, n: int) -> Tensor:
        shape = (n, self.diffusion.channels, *self.diffusion.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def memory(self) -> StepMemory:
        """Weights, averages and two moments are there all the time; the rest is counted in two small steps.

        A single image has fewer operations, since it is contiguous and channels-last at once.
        """
        moments = 2 * sum(p.nbytes for p in self.parameters)
        return StepMemory((1 + self.averages) * self.weights + moments, (self._course(2), self._course(3)))

    def _course(self, n: int) -> list[int]:
        images = self._images(n)
        with SavedActivations([images, *self.parameters, *self.diffusion.buffers()]) as memory:
            self._loss(images).backward()
        self.optimizer.zero_grad()
        return memory.course

    def times(self, batch: int) -> tuple[float, float, int]:
        """The seconds of the update and of an image, and the number of images in the batches that were timed."""
        self._timed(1)  # allocates memory and loads kernels
        first = self._timed(1)
        n = max(1, min(batch, int(SECONDS / STEPS / first)))
        steps = max(2, min(STEPS, int(SECONDS / (n * first))))
        if n > 1:
            for _ in range(1 if self.device.type == "cpu" else 3):  # on a GPU, until the step is captured
                self._timed(n)
        seconds = statistics.median(self._timed(n) for _ in range(steps))
        update = min(seconds / 2, self._update_time())  # which is small, unless something else has disturbed it
        return update, (seconds - update) / n, n

    def _timed(self, n: int) -> float:
        images = self._images(n)
        return _seconds(self.device, lambda: self._take(images))

    def _update_time(self) -> float:
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        seconds = _seconds(self.device, self.optimizer.step)
        self.optimizer.zero_grad()
        return seconds


def _seconds(device: torch.device, function: Callable[[], object]) -> float:
    """The time that a function takes."""
    started = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def in_processes(config: RunConfig, count: int, alone: StepCost) -> StepCost:
    """The cost of a step that is shared by processes on the CPU, which divide its threads and the images.

    Args:
        alone: what one process measured.
    """
    threads = max(1, torch.get_num_threads() // count)
    images = max(1, min(alone.images, config.training.batch_size // count))
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(count, torch.multiprocessing.get_context("spawn")) as pool,
    ):
        given = (count, threads, images, config.model_dump_json(), f"file://{folder}/meeting")
        results = [pool.submit(_one_of_several, rank, *given) for rank in range(count)]
        update, image, exchange = (max(times) for times in zip(*(result.result() for result in results), strict=True))
    return StepCost(update, image / count, images, alone.memory, alone.weights, exchange)


def _one_of_several(
    rank: int, count: int, threads: int, images: int, config: str, meeting: str
) -> tuple[float, float, float]:
    """The seconds of the update, of an image, and of adding up the gradients, in a process of its own."""
    torch.set_num_threads(threads)
    step = _Step(RunConfig.model_validate_json(config), torch.device("cpu"))
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        gradients = torch.zeros(sum(p.numel() for p in step.parameters))
        dist.all_reduce(gradients)
        update, image, _ = step.times(images)
        dist.barrier()
        exchange = statistics.median(_seconds(step.device, lambda: dist.all_reduce(gradients)) for _ in range(3))
    finally:
        dist.destroy_process_group()
    return update, image, exchange
