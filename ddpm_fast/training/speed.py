"""How fast a run is, and which share of the device's speed that is.

The share is known as model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): the floating-point operations
of the network's convolutions and matrix products in a training step, counted as three forward passes, times the steps a
second, divided by what the device reaches in a large matrix product. Recomputed activations do not count.
"""

__all__ = ["Speed", "forward_flops", "matrix_flops_per_second"]

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from .config import RunConfig, build_network
from .precision import PRECISIONS

QUIET = 10.0  # seconds of a run before the device is measured, so that short runs do without
LARGEST = 8192  # rows of the matrices
LONG_ENOUGH = 0.01  # seconds that a product takes
REPETITIONS = 5


def forward_flops(config: RunConfig) -> int:
    """The floating-point operations of the network's convolutions and matrix products for one image.

    They are counted on tensors without values, which takes neither memory nor computation.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(config)
        size = network.image_size
        with torch.no_grad():
            network(torch.empty(1, network.channels, size, size), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def matrix_flops_per_second(device: torch.device, precision: str) -> float:
    """The floating-point operations a second of a large matrix product, measured in less than half a second.

    The matrices grow until a product takes 10 ms, or has 8192 rows. The best of five products counts.

    Args:
        precision: a name of `PRECISIONS`, of the matrices.
    """

    def seconds(n: int) -> float:
        a, b = (torch.randn(n, n, device=device, generator=generator).to(PRECISIONS[precision]) for _ in range(2))
        found = []
        for _ in range(REPETITIONS + 1):
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            began = time.perf_counter()
            a @ b
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            found.append(time.perf_counter() - began)
        return min(found[1:])  # without the first, which may load a kernel

    generator = torch.Generator(device).manual_seed(0)
    n = 256
    while (taken := seconds(n)) < LONG_ENOUGH and n < LARGEST:
        n *= 2
    return 2 * n**3 / taken


class Speed:
    """Images a second between two points of a run, and their share of the device's peak.

    Args:
        device, precision: that the network is computed on and in.
        step, seconds: how many steps the run has taken, and the time it has spent on them.
    """

    def __init__(self, config: RunConfig, device: torch.device, precision: str, step: int, seconds: float) -> None:
        self.config, self.device, self.precision = config, device, precision
        self._first = self._before = (step, seconds)
        self._peak: float | None = None  # images a second

    def point(self, step: int, seconds: float) -> dict[str, float]:
        """The speed since the last call, by name. The device is measured in the first call after ten seconds."""
        if self._peak is None and seconds - self._first[1] > QUIET:
            self._peak = self._measured()
        (last, then), self._before = self._before, (step, seconds)
        if seconds <= then:
            return {}
        rate = (step - last) * self.config.training.batch_size / (seconds - then)
        share = self.share(rate)
        return {"images_per_second": rate} | ({} if share is None else {"share_of_peak": share})

    def share(self, images_per_second: float) -> float | None:
        """The share of the peak, in [0, 1]; None if the device has not been measured."""
        return images_per_second / self._peak if self._peak else None

    def _measured(self) -> float:
        """Images a second if the device computed them as fast as a matrix product; 0 if there is no memory for one."""
        try:
            return matrix_flops_per_second(self.device, self.precision) / (3 * forward_flops(self.config))
        except torch.OutOfMemoryError:
            return 0.0
