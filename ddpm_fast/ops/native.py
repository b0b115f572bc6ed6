"""The compiled modules: loads them when it is imported, and keeps why one is absent.

A module is a shared library with no Python in it. Loading it registers its kernels with PyTorch's dispatcher,
which from then on prefers them to the reference; where there is none, the reference serves. Of the CPU's modules, one
for each instruction set, the one is loaded that PyTorch would choose (ATEN_CPU_CAPABILITY is heeded).
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Module", "modules"]


class Module(NamedTuple):
    available: bool
    reason: str  # why it is not available; empty if it is
    file: str = ""  # which library it is, if it is available


def _load(name: str) -> Module:
    if name == "cuda" and torch.version.cuda is None:
        return Module(False, f"torch has no CUDA ({torch.__version__})")
    package = Path(__file__).parents[1]
    library, record = package / f"_{name}{_suffix(name)}.abi3.so", package / "_build.json"
    if not record.exists():
        return Module(False, f"{package} holds sources that were never built: install them with pip")
    if not library.exists():
        reason = json.loads(record.read_text()).get(name, "it was removed")
        return Module(False, f"the module was not built: {reason}")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return Module(False, f"the module does not load: {error.__cause__}")
    return Module(True, "", library.name)


def _suffix(name: str) -> str:
    capability = torch.backends.cpu.get_cpu_capability() if name == "cpu" else ""
    return {"AVX512": "_avx512", "AVX2": "_avx2"}.get(capability, "")


modules = {name: _load(name) for name in ("cpu", "cuda")}

# glibc returns freed memory to the system, which zeroes every page that it hands out again: a tenth of a network's
# time. How much it keeps instead, it learns from the blocks that come and go, and 32 MiB is the most that it learns
# from. Elsewhere, this does nothing.
torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")
