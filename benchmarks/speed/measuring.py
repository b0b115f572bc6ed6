"""Seconds, FLOPs and bytes of contenders, beside the machine's rate of matrix products."""

import argparse
import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from side_by_side import calls_for, in_turns, quartiles, seconds_of

from .networks import LUCIDRAINS

# Without --rounds, there are as many as fit into so many seconds, within these limits.
SECONDS, FEWEST, MOST = 50, 5, 30
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Contender:
    """What is timed.

    Attributes:
        family: the package that it is of.
        how: what distinguishes it from others of its family; may be empty.
        step: computes one step of a whole batch.
        flops: floating-point operations of a step.
        peer: whether the others are compared with it.
        compiled: whether its first two calls compile or capture.
        extra: further entries of its row in the report.
    """

    family: str
    dtype: torch.dtype
    how: str
    step: Callable[[], object]
    flops: int
    peer: bool = False
    compiled: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.family, SHORT[self.dtype], self.how)))


class MatrixProduct:
    """A large matrix product, whose rate is the ceiling of what a network can reach in this dtype."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.size = 8192 if device == "cuda" else 2048  # smaller ones do not occupy a whole GPU
        self.flops = 2 * self.size**3
        self.name = f"matrix product {SHORT[dtype]}"
        self._matrices = [torch.ones(self.size, self.size, dtype=dtype, device=device) for _ in range(3)]

    def step(self) -> None:
        a, b, out = self._matrices
        torch.mm(a, b, out=out)


def measure(contenders: list[Contender], dtypes: list[torch.dtype], args: argparse.Namespace) -> dict[str, Any]:
    """Times contenders and matrix products in turns.

    The first call of a contender is not timed: its memory is measured.

    Returns:
        "rounds", "first_peer" (a name, or None), "matrix_rate" (by dtype) and "contenders" (a row each).
    """
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    if args.device == "cuda":  # TF32, as in the convolutions, so that the matrix product has the same arithmetic
        torch.set_float32_matmul_precision("high")
    products = {dtype: MatrixProduct(dtype, args.device) for dtype in dtypes}
    peaks, steps, calls, estimate = {}, {}, {}, 0.0
    for c in (*products.values(), *contenders):
        print(f"first calls: {c.name}", file=sys.stderr)
        if isinstance(c, MatrixProduct) or c.compiled:
            for _ in range(2):  # a compiler's memory is not the step's, and it may compile twice
                c.step()
        else:
            peaks[c.name] = peak_bytes(c.step, args.device)
        seconds = seconds_of(c.step, wait)
        steps[c.name], calls[c.name] = c.step, calls_for(seconds)
        estimate += seconds * calls[c.name]
    rounds = args.rounds or min(MOST, max(FEWEST, int(SECONDS / estimate)))

    def progress(done: int) -> None:
        print(f"round {done + 1} of {rounds}, each of {estimate:.1f} s", file=sys.stderr)

    seconds = in_turns(steps, calls, rounds, synchronize=wait, progress=progress)
    rates = {dtype: product.flops / statistics.median(seconds[product.name]) for dtype, product in products.items()}
    peers = {c.dtype: statistics.median(seconds[c.name]) for c in reversed(contenders) if c.peer}
    first = next((c for c in contenders if c.peer), None)

    def row(c: Contender) -> dict[str, Any]:
        low, median, high = quartiles(seconds[c.name])
        same_network = c.family != LUCIDRAINS
        return {
            "name": c.name,
            "family": c.family,
            "dtype": SHORT[c.dtype],
            "how": c.how,
            "low_s": low,
            "median_s": median,
            "high_s": high,
            "gflop": c.flops / 1e9,
            "gflop_per_s": c.flops / median / 1e9,
            "of_matrix_rate": c.flops / median / rates[c.dtype],
            "speed_up": peers[first.dtype] / median if first and same_network else None,
            "speed_up_same_dtype": peers[c.dtype] / median if c.dtype in peers and same_network else None,
            "peak_bytes": peaks.get(c.name),
            **c.extra,
            "seconds": seconds[c.name],
        }

    return {
        "rounds": rounds,
        "first_peer": first.name if first else None,
        "matrix_rate": {
            SHORT[dtype]: {"size": p.size, "gflop_per_s": rates[dtype] / 1e9, "seconds": seconds[p.name]}
            for dtype, p in products.items()
        },
        "contenders": [row(c) for c in contenders],
    }


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The most memory that a call holds beyond what was held before it; None where it cannot be measured.

    On the CPU it is the growth of the resident set, oneDNN's memory included. Linux can reset the maximum that the
    kernel keeps; that of getrusage cannot be reset, and the first contender's peak would hide all others.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, or the call would reuse it unseen
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        step()
        return None
    step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
