"""The command line of the scripts, and the device that it chooses."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ddpm_fast.nn.optimize import computes_in_bfloat16
from ddpm_fast.nn.unet import PRESETS

from .measuring import FEWEST, SECONDS


def options(description: str) -> argparse.Namespace:
    """Parses the command line, and prepares the threads and the device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=_at_least(1), default=8, help="images in a step (default: 8)")
    parser.add_argument("--preset", choices=PRESETS, default="ddpm-cifar10-32", help="the network")
    rounds = f"measurements of each contender (default: as many as take {SECONDS} seconds, at least {FEWEST})"
    parser.add_argument("--rounds", type=_at_least(3), help=rounds)
    parser.add_argument(
        "--compile", action="store_true", help="time diffusers with torch.compile as well; takes minutes"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print ddpm_fast's kernels (on a CPU, ops) and their times"
    )
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN time its algorithms and choose")
    parser.add_argument("--threads", type=_at_least(1), default=1, help="on a CPU (default: 1, pinned to one core)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the environment and all measurements there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a bar chart there")
    args = parser.parse_args()
    if args.threads > 1 and "OMP_WAIT_POLICY" not in os.environ:
        # Idle threads that spin take the core from those that compute. OpenMP reads this when torch is imported.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, sys.orig_argv)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    if args.device == "cpu" and args.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    return args


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} upwards")
        return int(text)

    return integer


def dtypes(device: str) -> list[torch.dtype]:
    """float32, and bfloat16 where the device has instructions for it."""
    return [torch.float32, torch.bfloat16] if computes_in_bfloat16(device) else [torch.float32]


def without_tf32(device: str) -> AbstractContextManager:
    """For comparisons in float32: PyTorch's convolutions on a GPU use TF32 otherwise."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device == "cuda" else nullcontext()
