"""What was measured, with the environment: as a table, as JSON and as a chart."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ddpm_fast
from ddpm_fast import info

from .networks import DIFFUSERS, FAMILIES, LUCIDRAINS

Columns = dict[str, Callable[[dict[str, Any]], str]]  # heading -> the cell of a row


def publish(
    what: str, measured: dict[str, Any], missing: dict[str, str], columns: Columns, args: argparse.Namespace
) -> None:
    """Prints a table, and writes the files that the command line names.

    Args:
        what: was timed, for the title.
        measured: what `measure` returned; rows may have further entries.
        missing: packages that are not installed, and why.
        columns: are added to those that sampling and training have in common.
    """
    title = f"{what} of {args.batch} image{'s' if args.batch > 1 else ''}, {args.preset}"
    report = {"title": title, "environment": environment(args), **measured, "missing": missing}
    print(table(report, columns))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(report, args.plot)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    versions = info.versions()
    for name in (DIFFUSERS, LUCIDRAINS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": versions,
        "system": platform.platform(),
        "machine": _machine(args),
        "cpu": info.processor(),
        "isa": [torch.backends.cpu.get_cpu_capability(), *_bf16_instructions()],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "backends": {name: available for name, (available, _) in info.backends().items()},
        **{name: getattr(args, name) for name in ("device", "preset", "batch", "compile", "cudnn_benchmark")},
    }


def _bf16_instructions() -> list[str]:
    found = torch.cpu.get_capabilities()
    return [name.upper().replace("_", "-") for name in ("amx_bf16", "avx512_bf16") if found.get(name)]


def _machine(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    plural = "s" if args.threads > 1 else ""
    return f"{info.processor()}, {'AMX, ' if 'AMX-BF16' in _bf16_instructions() else ''}{args.threads} thread{plural}"


def _commit() -> str | None:
    """The commit of the package that is measured; None where it does not lie in a checkout."""
    command = ["git", "-C", str(Path(ddpm_fast.__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def table(report: dict[str, Any], columns: Columns) -> str:
    """One contender a line, with notes below."""
    shared: Columns = {
        "ms": lambda row: milliseconds(row["median_s"]),
        "quartiles": lambda row: f"{milliseconds(row['low_s'])} to {milliseconds(row['high_s'])}",
        **columns,
        "GFLOP/s": lambda row: f"{row['gflop_per_s']:.4g}",
        "of matmul": lambda row: f"{row['of_matrix_rate']:.0%}",
        "x first peer": lambda row: times(row["speed_up"]),
        "x same dtype": lambda row: times(row["speed_up_same_dtype"]),
        "peak MiB": lambda row: mebibytes(row["peak_bytes"]),
    }
    cells = [["", *shared], *([row["name"], *(cell(row) for cell in shared.values())] for row in report["contenders"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    rates = ", ".join(f"{name} {rate['gflop_per_s']:.4g} GFLOP/s" for name, rate in report["matrix_rate"].items())
    size = next(iter(report["matrix_rate"].values()))["size"]
    notes = [
        f"medians and quartiles of {report['rounds']} rounds in turns, {report['environment']['machine']}",
        f"matmul, {size} x {size} x {size}: {rates}",
        f"first peer: {report['first_peer'] or 'none is installed'}; x: times as fast",
        "peak MiB: the most memory that the first call held beyond what was held before it",
    ]
    if LUCIDRAINS not in report["missing"]:
        notes.append(f"{LUCIDRAINS}: a different network, so no ratio is given")
    notes += [f"left out: {name}: {reason}" for name, reason in report["missing"].items()]
    return "\n".join(["", report["title"], *lines, *notes])


def milliseconds(seconds: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.4g}"


def plot(report: dict[str, Any], file: Path) -> None:
    """Medians as bars, quartiles as error bars."""
    from matplotlib.figure import Figure

    rows, colors = report["contenders"], dict(zip(FAMILIES, ("#0b6e99", "#d9822b", "#8a8f98"), strict=True))
    medians = [row["median_s"] * 1e3 for row in rows]
    spread = [
        [(row["median_s"] - row["low_s"]) * 1e3 for row in rows],
        [(row["high_s"] - row["median_s"]) * 1e3 for row in rows],
    ]
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    error_bars = {"ecolor": "#222222", "capsize": 3, "elinewidth": 1}
    axes.barh(range(len(rows)), medians, xerr=spread, color=[colors[r["family"]] for r in rows], error_kw=error_bars)
    for i, row in enumerate(rows):
        faster = f"  ({times(row['speed_up'])} x)" if row["speed_up"] else ""
        axes.text(row["high_s"] * 1e3, i, f"  {milliseconds(row['median_s'])} ms{faster}", va="center", fontsize=9)
    names = [row["name"] + (" *" if row["family"] == LUCIDRAINS else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row["high_s"] for row in rows) * 1e3 * 1.3)
    peer = f"; x: times as fast as {report['first_peer']}" if report["first_peer"] else ""
    other = "; *: a different network" if LUCIDRAINS not in report["missing"] else ""
    axes.set_xlabel(f"ms, median and quartiles of {report['rounds']} rounds{peer}{other}")
    axes.spines[["top", "right"]].set_visible(False)
    where = f"{report['environment']['machine']}, PyTorch {report['environment']['versions']['torch']}"
    axes.set_title(f"{report['title']}\n{where}", fontsize=11, loc="left")
    figure.savefig(file, dpi=150, format="png")
