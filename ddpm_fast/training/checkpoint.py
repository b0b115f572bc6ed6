"""Checkpoints: folders that are whole or not there.

    RUN/checkpoints/step-00005000/
        model.safetensors  ema.safetensors  optimizer.pt  state.json

Weights are safetensors, the optimizer's tensors load with weights_only=True, the rest is JSON: loading a file
cannot run code. A checkpoint is written under a temporary name, flushed to the disk and renamed; the one before
it is kept, so that an interrupted or damaged save costs one interval.
"""

__all__ = ["CheckpointError", "latest", "load_optimizer", "load_state", "load_weights", "save"]

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

KEEP = 2


class CheckpointError(ValueError):
    """Which file cannot be loaded, and what to load instead."""


def save(
    run: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Writes RUN/checkpoints/step-*; `state` is what JSON can hold."""
    target = run / "checkpoints" / f"step-{step:08d}"
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    safetensors.torch.save_file(_contiguous(model), temporary / "model.safetensors")
    safetensors.torch.save_file(_contiguous(ema), temporary / "ema.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps({"step": step} | state, indent=2))
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    temporary.rename(target)
    _flush(target.parent)
    for old in _steps(run)[:-KEEP]:
        shutil.rmtree(old)
    return target


def latest(run: Path) -> Path:
    """The newest checkpoint of a run; `run` itself where it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if (run / "state.json").is_file():
        return run
    steps = _steps(run)
    if not steps:
        raise CheckpointError(f"{run}: no checkpoint here; needed: the folder of a run, or one of its checkpoints")
    return steps[-1]


def load_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / "state.json", error) from None


def load_weights(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The state dict in `model` or `ema`."""
    path = checkpoint / f"{name}.safetensors"
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def load_optimizer(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "optimizer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    older = [p for p in _steps(path.parents[2]) if p < path.parent]
    hint = f"; the checkpoint before it is {older[-1]}" if older else ""
    return CheckpointError(f"{path}: truncated, missing or damaged ({error}){hint}")


def _steps(run: Path) -> list[Path]:
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".tmp")


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
