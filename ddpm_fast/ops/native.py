"""The compiled modules: loads them when it is imported, and records why one is absent, or has no kernels for a GPU.

A module is a shared library without Python in it. Loading it registers its kernels with PyTorch's dispatcher, which
then prefers them to the reference; where there is no module, the reference runs. The CPU has a module for each
instruction set. The one for the set that PyTorch itself uses is loaded (`ATEN_CPU_CAPABILITY` can lower that set), or,
if it could not be built, the one for the next lower set.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Module", "modules", "unserved_gpus"]

# The CPU's modules in the order of preference, from the instruction set that PyTorch uses on.
CPU_MODULES = {"AVX512": ("cpu_avx512", "cpu_avx2", "cpu"), "AVX2": ("cpu_avx2", "cpu")}


class Module(NamedTuple):
    available: bool
    reason: str  # why it is not available; empty if it is
    file: str = ""  # which library was loaded, if it is available
    better: str = ""  # why no library for a higher instruction set was loaded; empty if the processor has no higher one


def _load(name: str, package: Path = Path(__file__).parents[1]) -> Module:
    """Loads the first library of a backend that can be loaded."""
    if name == "cuda" and torch.version.cuda is None:
        return Module(False, f"torch has no CUDA ({torch.__version__})")
    record = package / "_build.json"
    if not record.exists():
        return Module(False, f"{package} holds sources that were never built: install them with pip")
    missing = json.loads(record.read_text())
    reasons = []
    for candidate in _candidates(name):
        library = package / f"_{candidate}.abi3.so"
        if not library.exists():
            reasons.append(f"the module was not built: {missing.get(candidate, 'it was removed')}")
            continue
        try:
            torch.ops.load_library(library)
        except OSError as error:
            reasons.append(f"the module does not load: {error.__cause__}")
        else:
            return Module(True, "", library.name, "; ".join(dict.fromkeys(reasons)))
    return Module(False, "; ".join(dict.fromkeys(reasons)))


def _candidates(name: str) -> tuple[str, ...]:
    """The modules that serve a backend on this machine, the fastest first."""
    if name == "cpu":
        return CPU_MODULES.get(torch.backends.cpu.get_cpu_capability(), ("cpu",))
    return (name,)


modules = {name: _load(name) for name in ("cpu", "cuda")}


def unserved_gpus(package: Path = Path(__file__).parents[1]) -> dict[int, str]:
    """The GPUs for which the CUDA module has no kernels, by their index, with the reason. Initialises CUDA.

    Code for a compute capability runs on GPUs of the same major and the same or a higher minor version, PTX on all
    that are as new. If the architectures were named in another way than by numbers, all GPUs count as served.
    """
    built = json.loads((package / "_build.json").read_text()).get("cuda_architectures", "")
    parts = [re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", part) for part in re.split(r"[; ]+", built)]
    if not all(parts):
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        served = (
            (int(part[1]) == major and int(part[2]) <= minor)
            or (part[3] and (int(part[1]), int(part[2])) <= (major, minor))
            for part in parts
        )
        if not any(served):
            found[index] = (
                f"the CUDA module was compiled for GPUs of compute capability {built}, and "
                f"{torch.cuda.get_device_name(index)} has {major}.{minor} (TORCH_CUDA_ARCH_LIST={major}.{minor} before "
                "pip install compiles for it, where nvcc still can)"
            )
    return found


# Freeing one large block raises glibc's mmap threshold, so that freed buffers are reused. Without it, glibc returns
# them to the system, which zeroes every page that it hands out again: a tenth of a network's time. The threshold
# rises to 32 MiB at most. With other allocators, this has no effect.
torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")


def _compute_in_one_thread() -> None:
    """In a forked child, the threads of the parent's OpenMP are gone, and GNU's waits for them forever."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_in_one_thread)
