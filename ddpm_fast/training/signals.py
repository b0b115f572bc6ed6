"""Signals that end a training only after its step is saved."""

__all__ = ["Stopped", "deferred_signals"]

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C; a scheduler's or docker's stop; a closed terminal


class Stopped(KeyboardInterrupt):
    """A signal has ended the training, and its last step is saved.

    Attributes:
        number: of the signal. A shell expects the exit status 128 + number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns the number of the first signal that has asked to stop, or None.

    After it, Ctrl-C stops at once; further SIGTERM and SIGHUP are ignored, since a closed terminal and service managers
    send several. SIGHUP has no effect under nohup. Only the main thread can handle signals: elsewhere None is returned.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []

    def handler(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers}
    try:
        for number in numbers:
            if number == signal.SIGINT or before[number] != signal.SIG_IGN:
                signal.signal(number, handler)
        yield lambda: asked[0] if asked else None
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
