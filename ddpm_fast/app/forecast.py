"""How long an evaluation will take, measured before it starts."""

__all__ = ["announce", "seconds_of_features", "seconds_of_network"]

import itertools
import statistics
import sys
import time
from typing import Any

import torch

from ..training.data import ImageFiles, ImageTensor
from ..training.run import Run
from .distances import seconds_of_distances
from .estimate import duration
from .features import BATCH, FeatureNetwork

MEASURED = 8  # sampling steps
FEW = 10_000  # images, for a FID that others can be compared with


def seconds_of_network(run: Run, calls: dict[str, int], how: dict[str, Any], count: int) -> dict[str, float]:
    """How long numbers of calls of the network, each for one image, will take, measured over a few sampling steps."""
    size, device = run.config.training.batch_size, run.diffusion.device
    times = []
    for _ in itertools.islice(run.diffusion.sample_progressive(size, **how), MEASURED + 1):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter())
    step = statistics.median(after - before for before, after in itertools.pairwise(times))
    return {name: step / size * n / count for name, n in calls.items() if n}


def seconds_of_features(
    network: FeatureNetwork, data: ImageTensor | ImageFiles, n: int, unknown: int, count: int
) -> dict[str, float]:
    """How long the features of n samples and of `unknown` real images will take, and the distances, by measuring."""
    measured = 8 if network.device.type == "cpu" else BATCH  # an image takes as long in small batches on a CPU
    started = time.perf_counter()
    images = data[list(range(min(measured, len(data))))]
    reading = (time.perf_counter() - started) / len(images)
    size = network(images).shape[1]  # not timed: the first call allocates memory and loads kernels
    started = time.perf_counter()
    network(images)
    seconds = (time.perf_counter() - started) / len(images)
    return {
        f"the features of {n + unknown:,} images": (n * seconds + unknown * (seconds + reading)) / count,
        "the distances": seconds_of_distances(n, len(data), size),
    }


def announce(times: dict[str, float], images: int | None) -> None:
    """Prints how long each part will take, and a warning if there are few images.

    Args:
        images: the number of samples or of real images, whichever are fewer; None if no distances are computed.
    """
    parts = ", ".join(f"{duration(seconds)} for {name}" for name, seconds in times.items())
    print(f"this will take about {duration(sum(times.values()))}: {parts}", flush=True)
    if images is not None and images < FEW:
        message = f"FID of {images:,} images, fewer than {FEW:,}, is too large: compare it only with that of as many"
        print(message, file=sys.stderr)
