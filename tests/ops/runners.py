"""Who runs an op in a test: a backend on its device, or in a simulator where that device is absent."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ptxsim import toolchain

from ddpm_fast.ops import native
from ddpm_fast.ops.backends import OPS, has_triton

GPU = torch.cuda.is_available()
SIMULATED = (80, 90, 100)


@dataclass(frozen=True)
class Runner:
    name: str
    call: Callable[[str, tuple], Any]  # op, strict arguments on the CPU -> results on the CPU
    simulated: bool = False

    def __str__(self) -> str:
        return self.name


def on_device(namespace: str, device: str) -> Callable[[str, tuple], Any]:
    def call(op: str, arguments: tuple) -> Any:
        moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        results = getattr(getattr(torch.ops, namespace), op)(*moved)
        return results.cpu() if isinstance(results, torch.Tensor) else tuple(x.cpu() for x in results)

    return call


def simulated_triton(cc: int) -> Callable[[str, tuple], Any]:
    import ptxsim.triton

    def call(op: str, arguments: tuple) -> Any:
        with ptxsim.triton.simulate(cc=cc):
            return getattr(torch.ops.ddpm_fast_triton, op)(*arguments)

    return call


def simulated_cuda(arch: int) -> Callable[[str, tuple], Any]:
    from simulated_cuda import Simulation

    simulation = functools.cache(lambda: Simulation(arch))  # compiled when the first test needs it
    return lambda op, arguments: getattr(simulation(), op)(*arguments)


def runners() -> list[Any]:
    """One of each kind; those that cannot run here, as skipped."""
    found = []

    def add(name: str, call: Callable[[], Callable], missing: str = "", simulated: bool = False) -> None:
        marks = [pytest.mark.skip(reason=missing)] if missing else []
        runner = None if missing else Runner(name, call(), simulated)
        found.append(pytest.param(runner, id=name, marks=marks))

    add("reference", lambda: lambda op, arguments: OPS[op].kernel(*arguments))
    add("cpu", lambda: on_device("ddpm_fast", "cpu"), native.modules["cpu"].reason)
    no_triton = "" if has_triton() else "Triton is not installed"
    if GPU:
        add("triton", lambda: on_device("ddpm_fast_triton", "cuda"), no_triton)
        add("cuda", lambda: on_device("ddpm_fast", "cuda"), native.modules["cuda"].reason)
        return found
    no_nvcc = "" if toolchain.has_tool("nvcc") else "nvcc was not found"
    for cc in SIMULATED:
        add(f"triton-sm{cc}", lambda cc=cc: simulated_triton(cc), no_triton, simulated=True)
        add(f"cuda-sm{cc}", lambda cc=cc: simulated_cuda(cc), no_nvcc, simulated=True)
    return found
