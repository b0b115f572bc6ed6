"""Checkpoints: folders that are whole or not there.

    RUN/checkpoints/step-00005000/
        model.safetensors  ema.safetensors  optimizer.pt  state.json

Weights are safetensors, the optimizer's tensors load with weights_only=True, the rest is JSON: loading a file
cannot run code. A checkpoint is written under a temporary name, flushed to the disk and renamed; the one before
it is kept, so that an interrupted or damaged save costs one interval.
"""

__all__ = ["CheckpointError", "latest", "load_optimizer", "load_state", "load_weights", "save", "steps"]

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
    for old in steps(run)[:-KEEP]:
        shutil.rmtree(old)
    return target


def latest(run: Path) -> Path:
    """The newest checkpoint of a run; `run` itself where it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if (run / "state.json").is_file():
        return run
    if not steps(run):
        raise CheckpointError(f"{run}: no checkpoint here; needed: the folder of a run, or one of its checkpoints")
    return steps(run)[-1]


def load_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not isinstance(state, dict) or not {"step", "config"} <= set(state):
            raise ValueError("it lacks the step or the config")
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / "state.json", error) from None
    return state


def load_weights(checkpoint: Path, name: str, module: nn.Module) -> None:
    """Loads the weights in `model` or `ema` into a module."""
    path = checkpoint / f"{name}.safetensors"
    try:
        module.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()  # the first of what may be hundreds of lines
        raise CheckpointError(f"{path}: not the weights of the network in state.json ({reason})") from None


def load_optimizer(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "optimizer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    damaged = path.resolve().parent
    older = [p for p in steps(damaged.parents[1]) if p.resolve() < damaged]
    hint = f"; delete {path.parent} to go on from {older[-1].name}" if older else ""
    return CheckpointError(f"{path}: truncated, missing or damaged ({error}){hint}")


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".tmp")


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
