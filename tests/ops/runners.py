"""Who runs an op in a test: a backend on its device, or in a simulator where that device is absent."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import architectures
import pytest
import torch
from ptxsim import toolchain
from torch import Tensor

from ddpm_fast.ops import native
from ddpm_fast.ops.dispatch import OPS, has_triton

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Runner:
    name: str
    function: Callable[[str], Callable]  # of an op, by its name: what takes its strict arguments
    simulated: bool = False
    device: str = "cpu"

    def call(self, op: str, arguments: tuple) -> list[Tensor]:
        """The op's results on the CPU; of one that returns none, the tensors it has written to."""
        moved = [x.to(self.device) if isinstance(x, Tensor) else x for x in arguments]
        results = self.function(op)(*moved)
        if results is None:
            results = [x for x in moved[-3:] if x is not None]
        return [x.cpu() for x in ([results] if isinstance(results, Tensor) else results)]

    def __str__(self) -> str:
        return self.name


def simulated_triton(cc: int) -> Callable[[str], Callable]:
    def function(op: str) -> Callable:
        def call(*arguments: Any) -> Any:
            import ptxsim.triton

            with ptxsim.triton.simulate(cc=cc):
                return getattr(torch.ops.ddpm_fast_triton, op)(*arguments)

        return call

    return function


def simulated_cuda(arch: int) -> Callable[[str], Callable]:
    @functools.cache
    def simulation() -> Any:  # compiled when the first test needs it
        from simulated_cuda import Simulation

        return Simulation(arch)

    return lambda op: getattr(simulation(), op)


def runners() -> list[Any]:
    """One of each kind; those that cannot run here, as skipped."""
    found = []

    def add(name: str, function: Callable[[str], Callable], missing: str = "", **more: Any) -> None:
        marks = [pytest.mark.skip(reason=missing)] if missing else []
        found.append(pytest.param(Runner(name, function, **more), id=name, marks=marks))

    def namespace(name: str) -> Callable[[str], Callable]:
        return lambda op: getattr(getattr(torch.ops, name), op)

    add("reference", lambda op: OPS[op].kernel)
    add("cpu", namespace("ddpm_fast"), native.modules["cpu"].reason)
    no_triton = "" if has_triton() else "Triton is not installed"
    if GPU:
        add("triton", namespace("ddpm_fast_triton"), no_triton, device="cuda")
        add("cuda", namespace("ddpm_fast"), native.modules["cuda"].reason, device="cuda")
        return found
    no_nvcc = "" if toolchain.has_tool("nvcc") else "nvcc was not found"
    for cc in architectures.chosen:
        add(f"triton-sm{cc}", simulated_triton(cc), no_triton, simulated=True)
        add(f"cuda-sm{cc}", simulated_cuda(cc), no_nvcc, simulated=True)
    return found
