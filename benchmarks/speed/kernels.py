"""A step's time by kernel, as PyTorch's profiler sees it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .measuring import Contender
from .networks import OURS

STEPS = 5
LINES = 25


def kernels_of_ours(contenders: list[Contender], device: str) -> str:
    """The table of `kernels_of` for ddpm_fast in the lowest precision that was timed."""
    ours = [c for c in contenders if c.family == OURS and c.how == ""][-1]
    return kernels_of(ours.step, ours.name, device)


def kernels_of(step: Callable[[], object], name: str, device: str) -> str:
    """A table of the kernels of a step on a GPU, or of PyTorch's ops on a CPU, the longest first.

    Args:
        step: is called twice before it is profiled.
        name: of what takes the step.
    """
    on_gpu = device == "cuda"
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    found = [(e.key, e.count / STEPS, (e.self_device_time_total if on_gpu else e.self_cpu_time_total)) for e in events]
    found = sorted(((key, count, us / STEPS) for key, count, us in found if us > 0), key=lambda row: -row[2])
    total = sum(us for *_, us in found)
    count = sum(count for _, count, _ in found)
    what = "kernels" if on_gpu else "ops"
    title = f"{what} of a step of {name}: {count:.0f}, {total / 1e3:.3g} ms"
    lines = ["", title, f"{'us':>9}{'share':>7}{'calls':>7}  name"]
    lines += [f"{us:>9.1f}{us / total:>7.1%}{calls:>7.1f}  {key[:110]}" for key, calls, us in found[:LINES]]
    if len(found) > LINES:
        rest = sum(us for *_, us in found[LINES:])
        lines.append(f"{rest:>9.1f}{rest / total:>7.1%}{'':7}  {len(found) - LINES} more")
    return "\n".join(lines)
