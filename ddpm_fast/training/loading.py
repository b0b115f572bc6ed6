"""Which images form the batch of each step, and the worker processes that load the batches."""

__all__ = ["ShuffledBatches", "batches"]

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..info import cores
from ..noise import derive_seed
from .image_files import DataError, ImageFiles

MAX_WORKERS = 8  # of those that are chosen here
ORDER = 0  # the stream of the run's seed that the order of the images is drawn from
PREFETCH = 2  # batches that each worker prepares in advance
TIMEOUT = 600  # seconds that a batch may take before its workers are taken to be stuck
SHARED_MEMORY = "/dev/shm"  # where Linux keeps what processes share; workers hand over batches through it
ADVICE = "training.workers sets their number, and with 0 the training process loads images itself"


class ShuffledBatches(Sampler[list[int]]):
    """The indices of the images of each training step. Each epoch has all images once, in an order of its own.

    The batch of a step depends on the seed and the step alone, so a resumed run continues with the same batches.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, first_step: int, last_step: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in range(self.first_step, self.last_step):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
                    order = torch.randperm(self.length, generator=generator).tolist()
                batch.append(order[position % self.length])
            yield batch


def batches(data: Dataset, sampler: ShuffledBatches, *, workers: int | None = None) -> Iterator[Tensor]:
    """The batches of a run, uint8, (N, C, H, W).

    Worker processes ignore Ctrl-C, SIGTERM and SIGHUP, which a terminal or a job scheduler sends to every process of
    a run: the training process decides when to stop, and ends its workers.

    Args:
        workers: how many processes load batches. None: for image files, one for each core, at most 8; else none.
            If the shared memory has no room for their batches, fewer are used, with a warning. 0: batches are loaded
            in this process.

    Raises:
        DataError: an image cannot be read, a worker process has died, or a batch takes longer than ten minutes.
    """
    if workers is None:
        workers = min(MAX_WORKERS, cores()) if isinstance(data, ImageFiles) else 0
    if workers:
        workers = _workers_with_room(workers, data[[0]].nbytes * sampler.batch_size)
    loader = DataLoader(
        data,
        sampler=sampler,
        batch_size=None,
        collate_fn=_share,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        timeout=TIMEOUT if workers else 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )
    return _loaded(loader)


def _loaded(loader: DataLoader) -> Iterator[Tensor]:
    others = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    # At exit, multiprocessing sends SIGTERM to the workers, which ignore it, and waits for them. Finalizers run before.
    stop = Finalize(None, _kill, (workers,), exitpriority=0)
    try:
        yield from iterator
    except (DataError, RuntimeError) as error:
        traceback.clear_frames(error.__traceback__)  # which refer to the iterator
        if isinstance(error, DataError):
            # From a worker, the message is a traceback, whose last line has the message that was raised.
            raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None
        if str(error).startswith("DataLoader"):
            raise DataError(f"a process that loads images has failed: {error}; {ADVICE}") from None
        raise
    finally:
        del iterator  # which asks the workers to end, and gives them a few seconds
        stop()


def _workers_with_room(wanted: int, batch_bytes: int) -> int:
    """The number of workers, at most `wanted`, whose batches fit into the shared memory."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (AttributeError, OSError):  # not Linux
        return wanted
    free = status.f_bavail * status.f_frsize
    # In flight are those that workers prepare in advance, the one in training and the one that follows it.
    fitting = max(0, (free // batch_bytes - 2) // PREFETCH)
    if fitting >= wanted:
        return wanted
    needed = (PREFETCH * wanted + 2) * batch_bytes
    warnings.warn(
        f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and {wanted} worker processes need "
        f"{needed / 2**20:.0f} MiB for batches of {batch_bytes / 2**20:.1f} MiB each: {fitting or 'none'} "
        f"{'is' if fitting == 1 else 'are'} used{'' if fitting else ', and the training process loads the images'}. "
        "In Docker, --shm-size makes it larger",
        stacklevel=3,
    )
    return fitting


def _share(batch: Tensor) -> Tensor:
    """In a worker, moves the batch to shared memory here, where a failure is an exception that reaches `batches`.

    The thread that sends it would do so otherwise, and if it fails, drops the batch, which is then waited for.
    """
    if get_worker_info() is None:
        return batch
    try:
        return batch.share_memory_()
    except RuntimeError as error:
        raise DataError(f"the memory that processes share is full ({error}); {ADVICE}") from None


def _ignore_signals(worker: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _kill(workers: set[BaseProcess]) -> None:
    for worker in workers:
        while worker.is_alive():
            with suppress(RuntimeError):  # torch's handler of SIGCHLD raises it for a worker that was killed
                worker.kill()
                worker.join()
