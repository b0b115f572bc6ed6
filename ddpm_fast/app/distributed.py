"""The processes that a launcher started, where they share one piece of work."""

__all__ = ["Processes", "joined"]

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..training.trainer import RunError

PATIENCE = timedelta(days=30)  # for a slower process; one that ended is noticed by its closed connection
POLL = 0.05  # seconds
ENDED = "another process has ended before its work was done"


class Processes:
    """What the processes know of one another. One process alone waits for nobody.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
    """

    def __init__(self, group: Any = None) -> None:
        self._group, self._done = group, 0
        self.rank, self.count = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def add(self, amount: int) -> int:
        """Adds to what this process has done. Returns what all have, without waiting for them.

        Raises:
            RunError: the process that keeps the sum has ended.
        """
        if self._group is None:
            self._done += amount
            return self._done
        try:
            return self._group.get_group_store().add("done", amount)
        except dist.DistError as error:
            raise RunError(ENDED) from error

    def wait(self, meanwhile: Callable[[], object]) -> None:
        """Until all processes are here; the first calls `meanwhile`, many times a second and when all have come.

        Raises:
            RunError: one of them has ended.
        """
        if self._group is None:
            return
        work = dist.barrier(self._group, async_op=True)
        while not work.is_completed():  # not work.wait(), in which Ctrl-C would go unheard
            if self.rank == 0:  # which may keep the sum, and may have left when the others know that all are here
                meanwhile()
            time.sleep(POLL)
        try:
            work.wait()
        except RuntimeError as error:
            raise RunError(ENDED) from error
        if self.rank == 0:
            meanwhile()

    def gather(self, mine: list[Any]) -> list[Any]:
        """The items of all processes, in the first of them; in the others nothing. Call it after `wait`."""
        if self._group is None:
            return mine
        lists = [None] * self.count if self.rank == 0 else None
        dist.gather_object(mine, lists, group=self._group, group_dst=0)
        return [item for items in lists or [] for item in items]


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of torch.distributed, or else of the launcher's environment (RANK, WORLD_SIZE, ...), if any.

    All must enter. One that leaves by an error closes its connections, so that the others do not wait for it.
    """
    initialized = dist.is_available() and dist.is_initialized()
    if not initialized and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    if not initialized:
        dist.init_process_group("gloo")  # which stays for the next call
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # on the CPU, whatever the backend of the program is
    try:
        yield Processes(group)
    finally:
        dist.destroy_process_group(group)
