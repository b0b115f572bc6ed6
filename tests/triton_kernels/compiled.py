"""Triton's kernels on the CPU: what was launched, and what ptxas makes of it."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ptxsim
import ptxsim.triton
from ptxsim import static

from ddpm_fast import ops
from ddpm_fast.ops import dispatch


class Launched(NamedTuple):
    stats: ptxsim.LaunchStats
    ptx: str
    shared: int  # bytes
    warps: int

    @property
    def report(self) -> static.KernelReport:
        return _report(self.ptx)


@functools.cache
def _report(ptx: str) -> static.KernelReport:
    (report,) = static.from_ptx(ptx)
    return report


@contextlib.contextmanager
def simulated(cc: int, **launch_options: Any) -> Iterator[list[Launched]]:
    """The public functions run as Triton's kernels for a GPU of compute capability cc / 10; gives the launches.

    launch_options: of ptxsim's `Module.launch`.
    """
    launched = []
    original = ptxsim.triton._Launcher.__call__

    def launch(self, *arguments):
        original(self, *arguments)
        ptx = ptxsim.triton._ptx_of_kernel[self.metadata.hash]
        launched.append(Launched(launches[-1], ptx, self.metadata.shared, self.metadata.num_warps))

    with ptxsim.triton.simulate(cc=cc, **launch_options) as launches, ops.backend("triton"):
        dispatch.triton_fault("cpu")  # launches a kernel when it is called first
        ptxsim.triton._Launcher.__call__ = launch
        try:
            yield launched
        finally:
            ptxsim.triton._Launcher.__call__ = original
