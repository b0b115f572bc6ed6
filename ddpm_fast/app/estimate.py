"""The time and the memory that a run will take, measured over a few of its steps."""

__all__ = ["SavedActivations", "duration", "estimate"]

import statistics
import sys
import time
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..training.config import RunConfig, build_diffusion
from ..training.optimization import make_optimizer
from ..training.precision import autocast, chosen
from ..training.run import pick_device

SECONDS = 10  # that the timed steps take together, approximately
STEPS = 4  # that are timed


def estimate(config: RunConfig) -> str:
    """Times training steps on random images of the config's size.

    If a step with the config's batch size would take too long, fewer images are used and the time is scaled by the
    number of images. The memory is a sum: weights, gradient, two moments and averages, plus what autograd saves for
    each image. The peak memory during the steps, which includes temporary tensors, is given as well.

    Returns:
        The results as lines of text.

    Raises:
        ConfigError: the values of the config are valid each, but not together.
    """
    device, batch = pick_device(), config.training.batch_size
    diffusion = build_diffusion(config).to(device)
    precision = chosen(config.training.precision, device)
    optimizer = make_optimizer(diffusion, config.training)
    parameters = sum(p.numel() for p in diffusion.model.parameters())

    def images(n: int) -> torch.Tensor:
        shape = (n, diffusion.channels, *diffusion.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def loss_of(data: torch.Tensor) -> torch.Tensor:
        with autocast(device, precision):
            return diffusion(data)

    def saved_for(data: torch.Tensor) -> int:
        with SavedActivations() as memory:
            loss = loss_of(data)
        return memory.bytes if loss.requires_grad else 0

    # The difference excludes what is saved once for all images, such as weights in bfloat16.
    saved = saved_for(images(2)) - saved_for(images(1))

    def step(n: int) -> float:
        data = images(n)
        started = time.perf_counter()
        loss_of(data).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    step(1)  # not timed: the first step allocates memory and loads kernels
    n = max(1, min(batch, int(SECONDS / STEPS / step(1))))
    step(n)
    seconds = statistics.median(step(n) for _ in range(STEPS)) * batch / n
    averages = len(config.training.ema_decays) + (2 if config.training.ema_snapshot_every else 0)
    own = parameters * 4 * (4 + averages)
    memory = own + saved * batch
    scaled = "" if n == batch else f", scaled from batches of {n}"
    weights = f"{own / 2**30:.2f} for weights, gradient, moments and average{'s' if averages > 1 else ''}"
    lines = {
        "network": f"{parameters:,} parameters",
        "device": f"{device}, {precision}",
        "step": f"{seconds:.3g} s for {batch} images{scaled}",
        "run": f"{duration(seconds * config.training.steps)} for {config.training.steps:,} steps",
        "memory": f"at least {memory / 2**30:.2f} GiB: {weights}, and {saved / 2**20:.1f} MiB for each image",
        "peak": _peak(device, n),
    }
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


class SavedActivations(TorchDispatchMode):
    """Counts the memory that is allocated within the context and still in use, which after a forward pass is what
    autograd has saved for the backward pass.

    Attributes:
        bytes: in use now.
    """

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


def _peak(device: torch.device, images: int) -> str:
    """The most memory that this process has used, on the CPU including PyTorch itself."""
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device)
    else:
        try:
            import resource
        except ImportError:
            return "not measured on this operating system"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.2f} GiB during these steps, with {images} images"


def duration(seconds: float) -> str:
    """Seconds in words, in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
