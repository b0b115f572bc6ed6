"""Versions, devices and backends of this installation: `python -m ddpm_fast.info`."""

__all__ = ["backends", "cores", "devices", "environment", "main", "processor", "versions"]

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .ops import native
from .ops.dispatch import availability, chosen

DESCRIPTIONS = {
    "reference": "plain PyTorch, on any device",
    "cpu": "C++, on CPU tensors",
    "triton": "Triton, on GPU tensors",
    "cuda": "C++, on NVIDIA GPU tensors",
}


def versions() -> dict[str, str]:
    """The versions of the software that results depend on."""
    return {
        "ddpm_fast": _version("ddpm_fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda or "not supported by this torch",
    }


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """What the last bits of a result depend on, besides its input and the number of threads."""
    found = {"ddpm_fast": _version("ddpm_fast"), "torch": torch.__version__}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cudnn": str(torch.backends.cudnn.version())}
        found |= {"cuda": str(torch.version.cuda or torch.version.hip)}
    else:
        found |= {"device": processor() if device.type == "cpu" else device.type}
        found |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    loaded = native.modules[device.type].file if device.type in native.modules else ""
    return found | {"kernels": chosen() or loaded or "PyTorch"}


def devices() -> list[str]:
    """Descriptions of the CPU and of each CUDA device."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = [f"cpu: {cores()} cores, {torch.get_num_threads()} threads, {platform.machine()}, {capability}"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            capability = f"compute capability {properties.major}.{properties.minor}"
            found.append(f"cuda:{i}: {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    return found


def backends() -> dict[str, tuple[bool, str]]:
    """For each backend, whether it can be used, and its description or the reason why it cannot."""
    found = {}
    for name, description in DESCRIPTIONS.items():
        available, reason = availability(name)
        if available and name in native.modules:
            module = native.modules[name]
            description = f"{description}: {module.file}" + (
                f" (no faster one: {module.better})" if module.better else ""
            )
        found[name] = (available, description if available else reason)
    return found


def main() -> None:
    print("\n".join(f"{name:<11} {value}" for name, value in versions().items()))
    print("\ndevices")
    print("\n".join(f"  {device}" for device in devices()))
    print("\nbackends")
    for name, (available, reason) in backends().items():
        print(f"  {name:<11} {'yes' if available else 'no':<4} {reason}")


if __name__ == "__main__":
    main()
