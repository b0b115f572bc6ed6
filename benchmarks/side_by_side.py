"""Contenders timed in turns, so that whatever else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable

ROUNDS = 15
AT_LEAST = 2e-3  # seconds of a measurement: what is shorter is repeated

Contenders = dict[str, Callable[[], object]]


def seconds_of(
    function: Callable[[], object], synchronize: Callable[[], object] = lambda: None, calls: int = 1
) -> float:
    """The seconds of a call, the device's included."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls


def in_turns(
    contenders: Contenders,
    calls: dict[str, int],
    rounds: int,
    *,
    synchronize: Callable[[], object] = lambda: None,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, list[float]]:
    """The seconds of a call in every round.

    Args:
        calls: of each contender, in one measurement.
        synchronize: waits for the device.
        progress: is told how many rounds are done.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for done in range(rounds):
        progress(done)
        for name, function in contenders.items():
            times[name].append(seconds_of(function, synchronize, calls=calls[name]))
    return times


def calls_for(seconds: float) -> int:
    """How many calls of so many seconds make a measurement."""
    return max(1, round(AT_LEAST / seconds))


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return low, median, high


def medians(contenders: Contenders, rounds: int = ROUNDS) -> dict[str, tuple[float, float, float]]:
    """The median seconds of a call, and the quartiles around it: {name: (low, median, high)}.

    Each is called twice before it is timed (compilation, first touch of memory).
    """
    calls = {}
    for name, function in contenders.items():
        function()
        calls[name] = calls_for(seconds_of(function))
    return {name: quartiles(found) for name, found in in_turns(contenders, calls, rounds).items()}


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
