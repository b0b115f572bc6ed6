"""What a run will cost, from a few real steps of it."""

__all__ = ["Kept", "estimate"]

import resource
import statistics
import sys
import time
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..training.config import RunConfig, build_diffusion
from ..training.trainer import autocast, make_optimizer, pick_device

SECONDS = 10  # about how long the timed steps take together
STEPS = 4  # timed


def estimate(config: RunConfig) -> str:
    """Times real training steps on random images of the config's size.

    A batch that would take too long here is measured with fewer images: the time then scales with the batch.
    Memory is counted: weights, gradient, two moments and average, and what autograd keeps an image. The peak of
    the steps, which also holds what lives for one operation, is told beside it.

    Returns:
        Some lines to print.
    """
    device, batch = pick_device(), config.training.batch_size
    diffusion = build_diffusion(config).to(device)
    optimizer = make_optimizer(diffusion, config.training)
    parameters = sum(p.numel() for p in diffusion.model.parameters())

    def images(n: int) -> torch.Tensor:
        shape = (n, diffusion.channels, *diffusion.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def loss_of(data: torch.Tensor) -> torch.Tensor:
        with autocast(device, config.training):
            return diffusion(data)

    def kept_for(data: torch.Tensor) -> int:
        with Kept() as memory:
            loss = loss_of(data)
        return memory.bytes if loss.requires_grad else 0

    kept = kept_for(images(2)) - kept_for(images(1))  # without what is kept once, such as weights in bfloat16

    def step(n: int) -> float:
        data = images(n)
        started = time.perf_counter()
        loss_of(data).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    step(1)  # the first one also sets things up
    n = max(1, min(batch, int(SECONDS / STEPS / step(1))))
    step(n)
    seconds = statistics.median(step(n) for _ in range(STEPS)) * batch / n
    memory = parameters * 4 * 5 + kept * batch
    scaled = "" if n == batch else f", scaled from batches of {n}"
    weights = f"{parameters * 20 / 2**30:.2f} for weights, gradient, moments and average"
    lines = {
        "network": f"{parameters:,} parameters",
        "device": device,
        "step": f"{seconds:.3g} s for {batch} images{scaled}",
        "run": f"{_duration(seconds * config.training.steps)} for {config.training.steps:,} steps",
        "memory": f"at least {memory / 2**30:.2f} GiB: {weights}, and {kept / 2**20:.1f} MiB an image",
        "peak": f"{_peak_bytes(device) / 2**30:.2f} GiB reached here, with {n} images",
    }
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


class Kept(TorchDispatchMode):
    """The memory that was allocated within the context and is still in use: what a forward pass keeps for backward."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self._sizes.setdefault(StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self._sizes.items() if not storage.expired())


def _peak_bytes(device: torch.device) -> int:
    """The most that this process has held: on the CPU, PyTorch itself included."""
    if device.type == "cpu":
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes * (1 if sys.platform == "darwin" else 1024)
    return torch.accelerator.max_memory_allocated(device)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
