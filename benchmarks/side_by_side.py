"""Times contenders in turns, so that whatever else the machine does affects all of them alike."""

import statistics
import time
from collections.abc import Callable

ROUNDS = 15
AT_LEAST = 2e-3  # seconds of a measurement; shorter calls are repeated

Contenders = dict[str, Callable[[], object]]


def seconds_of(
    function: Callable[[], object], synchronize: Callable[[], object] = lambda: None, calls: int = 1
) -> float:
    """The mean seconds of a call; `synchronize` waits for the device before and after."""
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
    """The seconds of a call, for every contender and round.

    Args:
        calls: how often a measurement calls each contender.
        synchronize: waits for the device.
        progress: is called with the number of finished rounds before each round.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for done in range(rounds):
        progress(done)
        for name, function in contenders.items():
            times[name].append(seconds_of(function, synchronize, calls=calls[name]))
    return times


def calls_for(seconds: float) -> int:
    """How many calls of so many seconds are one measurement."""
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


def bandwidth_table(
    title: str, times: dict[str, tuple[float, float, float]], ours: str, copy: str, moved: dict[str, int]
) -> str:
    """One contender a line: seconds beside ours, and bytes a second beside those of a copy.

    Args:
        times: of `medians`.
        ours: the contender that the others are compared with.
        copy: the contender that copies a tensor, whose rate is the ceiling.
        moved: the fewest bytes that a contender can read and write, where they are known.
    """
    header = f"{'':<46}{'ms':>9}{'quartiles':>18}{'x ours':>8}{'MiB':>8}{'GB/s':>8}{'of copy':>9}"
    ceiling = moved[copy] / times[copy][1]
    lines = ["", title, header]
    for name, (low, median, high) in times.items():
        spread = f"{low * 1e3:.2f} to {high * 1e3:.2f}"
        line = f"{name:<46}{median * 1e3:>9.2f}{spread:>18}{median / times[ours][1]:>8.2f}"
        if name in moved:
            rate = moved[name] / median
            line += f"{moved[name] / 2**20:>8.3g}{rate / 1e9:>8.3g}{rate / ceiling:>9.0%}"
        lines.append(line)
    return "\n".join(lines)
