"""Contenders timed in turns, so that whatever else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable

ROUNDS = 15


def medians(contenders: dict[str, Callable[[], object]], rounds: int = ROUNDS, at_least: float = 2e-3) -> dict:
    """The median seconds of a call, and the quartiles around it: {name: (low, median, high)}.

    Args:
        contenders: each is called twice before it is timed (compilation, first touch of memory).
        at_least: short calls are repeated until a measurement lasts so many seconds.
    """
    repeats = {}
    for name, function in contenders.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, round(at_least / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: tuple(statistics.quantiles(found, n=4)) for name, found in times.items()}


def table(title: str, times: dict, ours: str, copy: str, copied_bytes: int, moved: dict[str, int]) -> str:
    """Milliseconds, how many times as long as ours, and the share of the copy's bandwidth where bytes are known.

    Args:
        ours: the contender that the others are compared with.
        copy: the contender that copies a tensor; copied_bytes: what it reads and writes.
        moved: least bytes that a contender reads and writes.
    """
    lines = ["", title, f"{'':<46}{'ms':>9}{'quartiles':>18}{'x ours':>8}{'of copy':>9}"]
    bandwidth = copied_bytes / times[copy][1]
    for name, (low, median, high) in times.items():
        share = f"{moved[name] / median / bandwidth:>8.0%}" if name in moved else ""
        spread = f"{low * 1e3:.2f} to {high * 1e3:.2f}"
        lines.append(f"{name:<46}{median * 1e3:>9.2f}{spread:>18}{median / times[ours][1]:>8.2f}{share:>9}")
    return "\n".join(lines)
