"""The processes that a launcher has started, and the work that they share."""

__all__ = ["Processes", "joined"]

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from ..training.run import RunError

PATIENCE = timedelta(days=30)  # for slower processes; a process that has ended is noticed by its closed connection
POLL = 0.05  # seconds
ENDED = "another process has ended before its work was done"


class Processes:
    """A group of processes that report their progress and meet at the end. A single process never waits.

    Attributes:
        rank: the index of this process.
        count: the number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group, self._done = group, 0
        self.rank, self.count = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def add(self, amount: int) -> int:
        """Adds an amount to the common progress and returns the sum over all processes, without waiting for them.

        Raises:
            RunError: the process that stores the sum has ended.
        """
        if self._group is None:
            self._done += amount
            return self._done
        try:
            return self._group.get_group_store().add("done", amount)
        except dist.DistError as error:
            raise RunError(ENDED) from error

    def wait(self, meanwhile: Callable[[], object]) -> None:
        """Waits until all processes have called this method.

        Args:
            meanwhile: called by the first process, many times a second and once all have arrived.

        Raises:
            RunError: one of the processes has ended.
        """
        if self._group is None:
            return
        work = dist.barrier(self._group, async_op=True)
        while not work.is_completed():  # not work.wait(), which Ctrl-C does not interrupt
            if self.rank == 0:  # the others may still be waiting when this process, which may store the sum, has left
                meanwhile()
            time.sleep(POLL)
        try:
            work.wait()
        except RuntimeError as error:
            raise RunError(ENDED) from error
        if self.rank == 0:
            meanwhile()

    def gather(self, mine: list[Any]) -> list[Any]:
        """Returns the items of all processes in the first process, and an empty list in the others.

        Call it after `wait`.
        """
        if self._group is None:
            return mine
        lists = [None] * self.count if self.rank == 0 else None
        dist.gather_object(mine, lists, group=self._group, group_dst=0)
        return [item for items in lists or [] for item in items]

    def share(self, value: Any) -> Any:
        """Returns the value of the first process in all processes.

        Raises:
            RunError: one of the processes has ended.
        """
        self.wait(lambda: None)  # until it is there: Ctrl-C does not interrupt a broadcast
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def map_batches(self, n: int, size: int, function: Callable[[int, int], Any], name: str) -> list[Any]:
        """Calls a function with the first index and the end of each batch of n images; the processes share the batches.

        Args:
            size: of a batch. Batch k belongs to process k mod `count`.
            name: of the progress bar, which the first process shows.

        Returns:
            The results in the order of the batches in the first process, and an empty list in the others.

        Raises:
            RunError: one of the processes has ended.
        """
        mine = range(self.rank * size, n, self.count * size)
        bar = tqdm(mine, name, unit="batch", disable=self.rank > 0)
        found = [(first, function(first, min(first + size, n))) for first in bar]
        self.wait(lambda: None)
        return [result for _, result in sorted(self.gather(found), key=lambda pair: pair[0])]


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of torch.distributed if it is initialized, or else of the launcher (RANK, WORLD_SIZE, ...).

    Every process must enter the context. A process that leaves it with an error closes its connections, so that the
    others do not wait for it.
    """
    initialized = dist.is_available() and dist.is_initialized()
    if not initialized and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    if not initialized:
        dist.init_process_group("gloo")  # and keep it for the next call
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # on the CPU, whatever backend the program uses
    try:
        yield Processes(group)
    finally:
        dist.destroy_process_group(group)
