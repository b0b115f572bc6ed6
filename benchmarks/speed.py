"""What sample_speed.py and train_speed.py share: options, networks, measuring and the report."""

import argparse
import ctypes
import gc
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers_weights import to_ddpm_fast, unet_2d_config
from side_by_side import calls_for, in_turns, quartiles, seconds_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import ddpm_fast
from ddpm_fast import UNet, info
from ddpm_fast.nn.optimize import computes_in_bfloat16
from ddpm_fast.nn.unet import PRESETS

T = 1000  # timesteps, and steps of a sampling run
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
OURS, DIFFUSERS, LUCIDRAINS = FAMILIES = ("ddpm_fast", "diffusers", "denoising_diffusion_pytorch")

# Without --rounds, as many as fit into the budget.
SECONDS, FEWEST, MOST = 50, 5, 30


# Options


def options(description: str) -> argparse.Namespace:
    """The command line's; sets the threads and the device up."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=_at_least(1), default=8, help="images in a step (default: 8)")
    parser.add_argument("--preset", choices=PRESETS, default="ddpm-cifar10-32", help="the network")
    rounds = f"of all contenders in turns (default: as many as take {SECONDS} seconds, {FEWEST} at least)"
    parser.add_argument("--rounds", type=_at_least(3), help=rounds)
    parser.add_argument("--compile", action="store_true", help="torch.compile of diffusers too: minutes more")
    parser.add_argument("--threads", type=_at_least(1), default=1, help="on a CPU (default: 1, pinned to one core)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the environment and the seconds of all rounds")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a bar chart")
    args = parser.parse_args()
    if args.threads > 1 and "OMP_WAIT_POLICY" not in os.environ:
        # Threads that spin take the core from those that work. OpenMP reads this when torch is imported.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, sys.orig_argv)
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and args.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    return args


def _at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return whole


def dtypes(device: str) -> list[torch.dtype]:
    """float32, and bfloat16 where the device multiplies in it."""
    return [torch.float32, torch.bfloat16] if computes_in_bfloat16(device) else [torch.float32]


def _bf16_instructions() -> list[str]:
    found = torch.cpu.get_capabilities()
    return [name.upper().replace("_", "-") for name in ("amx_bf16", "avx512_bf16") if found.get(name)]


def synchronize(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def without_tf32(device: str) -> AbstractContextManager:
    """For comparisons in float32: PyTorch's convolutions take TF32 on a GPU otherwise."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device == "cuda" else nullcontext()


# Networks


class Networks(NamedTuple):
    """`ours` and `diffusers` have the same weights. Who is not installed is None, and `missing` says so."""

    ours: UNet
    diffusers: nn.Module | None
    lucidrains: nn.Module | None  # a GaussianDiffusion with a network of its own, of the same widths
    missing: dict[str, str]


def networks(preset: str, device: str) -> Networks:
    modules, missing = {}, {}
    for name in (DIFFUSERS, LUCIDRAINS):
        try:
            with warnings.catch_warnings():  # of theirs, about their own dependencies
                warnings.simplefilter("ignore")
                modules[name] = importlib.import_module(name)
                _ = getattr(modules[name], "UNet2DModel", None)  # diffusers imports the rest when it is first asked
        except (ImportError, RuntimeError) as error:
            modules.pop(name, None)
            missing[name] = f'{error}; pip install ".[compat]"'
            print(f"{name} is left out: {missing[name]}", file=sys.stderr)

    ours, diffusers, lucidrains = UNet.preset(preset, dropout=0.0), None, None
    if DIFFUSERS in modules:
        diffusers = _random(modules[DIFFUSERS].UNet2DModel(**unet_2d_config(preset)))
        to_ddpm_fast(diffusers, ours)
        diffusers.to(device)
    else:
        _random(ours)
    if LUCIDRAINS in modules:
        arguments = {"dim": PRESETS[preset].get("dim", 128), "dim_mults": PRESETS[preset]["dim_mults"]}
        network = modules[LUCIDRAINS].Unet(**arguments, channels=ours.channels)
        lucidrains = (
            modules[LUCIDRAINS]
            .GaussianDiffusion(
                network, image_size=ours.image_size, timesteps=T, objective="pred_noise", beta_schedule="linear"
            )
            .to(device)
        )
    return Networks(ours.to(device), diffusers, lucidrains, missing)


@torch.no_grad()
def _random(network: nn.Module) -> nn.Module:
    """Random weights everywhere: zeros, as networks end with, would hide what is wrong before them."""
    for p in network.parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.add_(torch.randn_like(p), alpha=0.1)
    return network


def in_channels_last(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    network = deepcopy(network).to(memory_format=torch.channels_last)
    return network.bfloat16() if dtype == torch.bfloat16 else network  # their `to` warns of a dtype


def diffusers_scheduler(device: str) -> Any:
    scheduler = importlib.import_module(DIFFUSERS).DDPMScheduler(T, variance_type="fixed_small", clip_sample=True)
    scheduler.set_timesteps(T, device=device)
    return scheduler


def compiled(network: nn.Module, device: str) -> nn.Module:
    return torch.compile(network, mode="reduce-overhead" if device == "cuda" else "default")


def flop_counter() -> FlopCounterMode:
    """PyTorch's, which does not know attention on the CPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda q, k, v, *rest, out_shape=None, **named: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *rest, out_shape=None, **named: sdpa_backward_flop_count(grad, q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


# Measuring


@dataclass
class Contender:
    """Who is timed.

    Attributes:
        family: whose it is.
        how: what tells it from others of its family.
        step: takes one, of a whole batch.
        flops: of a step.
        peer: the others are compared with it.
        compiled: its first call compiles.
        extra: more that was found out, for the report.
    """

    family: str
    dtype: torch.dtype
    how: str
    step: Callable[[], object]
    flops: int
    peer: bool = False
    compiled: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.family, SHORT[self.dtype], self.how)))


def measure(contenders: list[Contender], missing: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Times the contenders and the machine's matrix products in turns, and gives all that is known as one dict.

    The first call of a contender is not timed: memory is measured in it.
    """
    wait = synchronize(args.device)
    if args.device == "cuda":  # as the convolutions have it; the matrix rate is then of the same arithmetic
        torch.set_float32_matmul_precision("high")
    peaks, steps, calls, estimate = {}, {}, {}, 0.0
    products = {dtype: _product(dtype, args.device) for dtype in dtypes(args.device)}
    named = {_product_name(dtype): (step, True) for dtype, (step, _) in products.items()}
    for name, (step, unmeasured) in (named | {c.name: (c.step, c.compiled) for c in contenders}).items():
        print(f"first calls: {name}", file=sys.stderr)
        peaks[name] = None if unmeasured else peak_bytes(step, args.device)
        for _ in range(2 if unmeasured else 0):  # a compiler's memory is not the step's, and it may compile twice
            step()
        seconds = seconds_of(step, wait)
        steps[name], calls[name] = step, calls_for(seconds)
        estimate += seconds * calls[name]
    rounds = args.rounds or min(MOST, max(FEWEST, int(SECONDS / estimate)))

    def progress(done: int) -> None:
        print(f"round {done + 1} of {rounds}, of {estimate:.1f} s each", file=sys.stderr)

    seconds = in_turns(steps, calls, rounds, synchronize=wait, progress=progress)
    rates = {dtype: flops / statistics.median(seconds[_product_name(dtype)]) for dtype, (_, flops) in products.items()}
    peers = {c.dtype: statistics.median(seconds[c.name]) for c in reversed(contenders) if c.peer}
    first = next((c for c in contenders if c.peer), None)
    rows = []
    for c in contenders:
        low, median, high = quartiles(seconds[c.name])
        same_network = c.family != LUCIDRAINS
        rows.append(
            {
                "name": c.name,
                "family": c.family,
                "dtype": SHORT[c.dtype],
                "how": c.how,
                "low_s": low,
                "median_s": median,
                "high_s": high,
                "gflop": c.flops / 1e9,
                "gflop_per_s": c.flops / median / 1e9,
                "of_matrix_rate": c.flops / median / rates[c.dtype],
                "speed_up": peers[first.dtype] / median if first and same_network else None,
                "speed_up_same_dtype": peers[c.dtype] / median if c.dtype in peers and same_network else None,
                "peak_bytes": peaks[c.name],
                **c.extra,
                "seconds": seconds[c.name],
            }
        )
    return {
        "environment": environment(args),
        "rounds": rounds,
        "first_peer": first.name if first else None,
        "matrix_rate": {
            SHORT[d]: {"size": _size(args.device), "gflop_per_s": rates[d] / 1e9, "seconds": seconds[_product_name(d)]}
            for d in products
        },
        "contenders": rows,
        "missing": missing,
    }


def _size(device: str) -> int:
    return 8192 if device == "cuda" else 2048  # smaller ones do not fill a GPU


def _product_name(dtype: torch.dtype) -> str:
    return f"matrix product {SHORT[dtype]}"


def _product(dtype: torch.dtype, device: str) -> tuple[Callable[[], object], int]:
    a, b, out = (torch.ones(_size(device), _size(device), dtype=dtype, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * _size(device) ** 3


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The most memory that a call holds beyond what was held before it; None where nobody tells.

    On the CPU it is the growth of the resident set, oneDNN's memory included. The kernel keeps its maximum, which
    can be reset on Linux; getrusage's cannot, and the first contender's peak would hide all others.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or the call would use it unnoticed
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        step()
        return None
    step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


# The report


def environment(args: argparse.Namespace) -> dict[str, Any]:
    versions = info.versions()
    for name in (DIFFUSERS, LUCIDRAINS):
        try:
            versions[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": versions,
        "system": platform.platform(),
        "machine": _machine(args),
        "cpu": _cpu(),
        "isa": [torch.backends.cpu.get_cpu_capability(), *_bf16_instructions()],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "backends": {name: available for name, (available, _) in info.backends().items()},
        **{name: getattr(args, name) for name in ("device", "preset", "batch", "compile")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    plural = "s" if args.threads > 1 else ""
    return f"{_cpu()}, {'AMX, ' if 'AMX-BF16' in _bf16_instructions() else ''}{args.threads} thread{plural}"


def _commit() -> str | None:
    """Of the package that is measured; None where it does not lie in a checkout."""
    command = ["git", "-C", str(Path(ddpm_fast.__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def table(title: str, report: dict[str, Any], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """The report's contenders, one a line; `columns` are added to those that sampling and training share."""
    shared = {
        "ms": lambda row: milliseconds(row["median_s"]),
        "quartiles": lambda row: f"{milliseconds(row['low_s'])} to {milliseconds(row['high_s'])}",
        **columns,
        "GFLOP/s": lambda row: f"{row['gflop_per_s']:.4g}",
        "of matmul": lambda row: f"{row['of_matrix_rate']:.0%}",
        "x first peer": lambda row: times(row["speed_up"]),
        "x same dtype": lambda row: times(row["speed_up_same_dtype"]),
        "peak MiB": lambda row: mebibytes(row["peak_bytes"]),
    }
    cells = [["", *shared], *([row["name"], *(f(row) for f in shared.values())] for row in report["contenders"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    rates = ", ".join(f"{name} {rate['gflop_per_s']:.4g} GFLOP/s" for name, rate in report["matrix_rate"].items())
    size = next(iter(report["matrix_rate"].values()))["size"]
    notes = [
        f"medians and quartiles of {report['rounds']} rounds in turns, {report['environment']['machine']}",
        f"matmul, {size} x {size} x {size}: {rates}",
        f"first peer: {report['first_peer'] or 'none is installed'}; x: times as fast",
        "peak MiB: the most that the first call held beyond what was held before it",
    ]
    notes += [f"{LUCIDRAINS}: another network, so no ratio"] if LUCIDRAINS not in report["missing"] else []
    notes += [f"left out: {name}: {reason}" for name, reason in report["missing"].items()]
    return "\n".join(["", title, *lines, *notes])


def milliseconds(seconds: float) -> str:
    """Three digits, or all before the point."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.4g}"


def publish(what: str, report: dict[str, Any], columns: dict, args: argparse.Namespace) -> None:
    """Prints the table, and writes the files that were asked for."""
    title = f"{what} of {args.batch} image{'s' if args.batch > 1 else ''}, {args.preset}"
    print(table(title, report, columns))
    if args.json:
        args.json.write_text(json.dumps({"title": title, **report}, indent=2) + "\n")
    if args.plot:
        plot(title, report, args.plot)


def plot(title: str, report: dict[str, Any], file: Path) -> None:
    """Medians as bars, quartiles as whiskers."""
    from matplotlib.figure import Figure

    rows, colors = report["contenders"], dict(zip(FAMILIES, ("#0b6e99", "#d9822b", "#8a8f98"), strict=True))
    medians = [row["median_s"] * 1e3 for row in rows]
    spread = [
        [(row["median_s"] - row["low_s"]) * 1e3 for row in rows],
        [(row["high_s"] - row["median_s"]) * 1e3 for row in rows],
    ]
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    whiskers = {"ecolor": "#222222", "capsize": 3, "elinewidth": 1}
    axes.barh(range(len(rows)), medians, xerr=spread, color=[colors[r["family"]] for r in rows], error_kw=whiskers)
    for i, row in enumerate(rows):
        faster = f"  ({times(row['speed_up'])} x)" if row["speed_up"] else ""
        axes.text(row["high_s"] * 1e3, i, f"  {milliseconds(row['median_s'])} ms{faster}", va="center", fontsize=9)
    names = [row["name"] + (" *" if row["family"] == LUCIDRAINS else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row["high_s"] for row in rows) * 1e3 * 1.3)
    axes.set_xlabel(
        f"ms, median and quartiles of {report['rounds']} rounds; x: times as fast as {report['first_peer']}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    where = f"{report['environment']['machine']}, PyTorch {report['environment']['versions']['torch']}"
    axes.set_title(f"{title}\n{where}", fontsize=11, loc="left")
    figure.savefig(file, dpi=150, format="png")
