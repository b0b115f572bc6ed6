"""The memory of a training step: what it needs, and what the device has."""

__all__ = ["SavedActivations", "StepMemory", "free_memory"]

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Where Linux has the limit of a container, and what its processes have allocated: version 2 of cgroups, and version 1
CGROUPS = (("memory.max", "memory.stat", "anon"), ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"))


class SavedActivations(TorchDispatchMode):
    """Counts the memory that is allocated within the context and still in use, which after a forward pass is what
    autograd has saved for the backward pass.

    Args:
        existing: tensors whose memory is not counted.

    Attributes:
        bytes: in use now.
        course: bytes in use after each operation.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = 0
        self.course: list[int] = []
        self._known: dict[int, weakref.ref] = {}
        for tensor in existing:
            self._add(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), x.untyped_storage().nbytes())
        self.course.append(self.bytes)
        return result

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def freed(_: weakref.ref) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, freed)
        self.bytes += size


class StepMemory:
    """The memory of a training step as a function of the number of images.

    After each operation, what is in use is a constant (gradients, weights in another dtype) and a multiple of the
    number of images n (what is saved for the backward pass, and temporary tensors): a + b n. The memory of a step is
    the maximum over its operations, and what is there all the time. Kernels may allocate more for themselves.

    Args:
        static: bytes that are there all the time.
        courses: bytes in use after each operation of a step with 2 images, and of one with 3.
    """

    def __init__(self, static: int, courses: tuple[Sequence[int], Sequence[int]]) -> None:
        two, three = (np.array(course, dtype=np.int64) for course in courses)
        self._a, self._b = static + 3 * two - 2 * three, three - two

    def bytes(self, n: int) -> int:
        """With n images."""
        return int((self._a + self._b * n).max())

    def of_an_image(self, n: int) -> int:
        """By how much one image more raises it, at n images."""
        return int(self._b[(self._a + self._b * n).argmax()])

    def largest(self, room: float) -> int:
        """The largest number of images for which it is at most `room` bytes; 0 if there is none."""
        if (self._a[self._b <= 0] > room).any():
            return 0
        grows = self._b > 0
        return max(0, int(((room - self._a[grows]) // self._b[grows]).min()))


def free_memory(device: torch.device, cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The bytes that a program may still allocate; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    import psutil

    free = psutil.virtual_memory().available
    for limit, statistics, used in CGROUPS:
        try:
            lines = (cgroup / statistics).read_text().splitlines()
            free = min(free, int((cgroup / limit).read_text()) - int(dict(line.split() for line in lines)[used]))
        except (OSError, ValueError, KeyError):  # there are none, or no limit: "max"
            continue
    return free
