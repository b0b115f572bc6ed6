"""Checkpoints: folders that are complete or absent.

    RUN/checkpoints/step-00005000/
        model.safetensors  ema.safetensors  optimizer.pt  timesteps.safetensors  state.json  SHA256SUMS
        ema-0.9999.safetensors  ema-sigma_rel=0.05.safetensors    averages besides the first one, of runs that have them

Weights and the losses by timestep are safetensors, the optimizer's moments are tensors that load with
weights_only=True, the rest is JSON: loading a file cannot run code. `sha256sum --check SHA256SUMS` verifies a
checkpoint, and so does every load; checkpoints of versions that wrote no checksums, or no losses by timestep, still
load.

A checkpoint is written under a temporary name, flushed to the disk, read back and renamed. Only then are older ones
deleted, all but the last two. A folder belongs to the run only if it has exactly the name of a checkpoint and its
state.json says the same step: copies under other names, archives and links are neither loaded nor deleted.
"""

__all__ = [
    "CheckpointError",
    "advice",
    "check_room",
    "check_size",
    "latest",
    "load_optimizer",
    "load_state",
    "load_weights",
    "save",
    "steps",
]

import itertools
import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from .files import digest, flush, write_text

KEEP = 2
FORMAT = 3  # 1: without checksums; 2: without timesteps.safetensors
LARGEST_STATE = 1 << 26  # bytes of state.json; two million points of the loss
SUMS, LARGEST_SUMS = "SHA256SUMS", 1 << 16
CONTENT = ("state.json", "model.safetensors", "ema.safetensors", "optimizer.pt", "timesteps.safetensors")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam
IN_MOMENTS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")  # of a pickle
LOWER_RATE = "lower training.lr or training.grad_clip"


class CheckpointError(ValueError):
    """Which checkpoint cannot be loaded or saved, and what to do instead."""


class _Scaler(BaseModel):
    """The state of torch.amp.GradScaler."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    scale: float = Field(gt=0)
    growth_factor: float = Field(gt=1)
    backoff_factor: float = Field(gt=0, lt=1)
    growth_interval: int = Field(gt=0)
    growth_tracker: int = Field(alias="_growth_tracker", ge=0)


class _State(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format: int = Field(1, ge=1)
    step: int = Field(ge=0)
    config: dict[str, Any]
    data: str | None = None
    history: list[tuple[int, float]] = []
    recent: list[float] = []
    skipped_steps: int = Field(0, ge=0)
    skipped_in_a_row: int = Field(0, ge=0)
    seconds: float = Field(0.0, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # checkpoints from before it could be `auto` have none
    scaler: _Scaler | None = None


# Which checkpoints there are


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    numbered = {_number(path): path for path in (run / "checkpoints").glob("step-*")}
    return [path for number, path in sorted(numbered.items()) if number >= 0 and _belongs(path, number)]


def latest(run: Path) -> Path:
    """The newest checkpoint of a run; `run` itself if it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if (run / "state.json").is_file():
        return run
    if not steps(run):
        raise CheckpointError(f"{run}: no checkpoint here; needed: the folder of a run, or one of its checkpoints")
    return steps(run)[-1]


def check_room(run: Path, first: int, last: int) -> None:
    """Raises a CheckpointError if a checkpoint after step `first`, up to `last`, would meet something of its name."""
    own = steps(run)
    for path in sorted((run / "checkpoints").glob("step-*")):
        if first < _number(path) <= last and path not in own:
            raise CheckpointError(f"{path} has the name of a checkpoint, but is not one of this run; move it away")


def advice(run: Path) -> str:
    """How to go on after the training has diverged."""
    match steps(run):
        case []:
            return f"{LOWER_RATE} and start again; no checkpoint has been saved yet"
        case [only]:
            return f"the last good checkpoint is {only.name}: {LOWER_RATE} and go on from it with --resume"
        case [*_, older, newest]:
            return (
                f"the last good checkpoint is {newest.name}: {LOWER_RATE} and go on from it with --resume, "
                f"or delete {newest} to go on from {older.name}"
            )


def _number(path: Path) -> int:
    """The step in the name of a checkpoint, -1 for every other name."""
    digits = re.fullmatch(r"step-([0-9]{8,})", path.name)
    return int(digits[1]) if digits and path.name == f"step-{int(digits[1]):08d}" else -1


def _belongs(path: Path, number: int) -> bool:
    if path.is_symlink() or not (path / "state.json").is_file():
        return False
    try:
        return load_state(path)["step"] == number
    except CheckpointError:
        return True  # damaged: to be named when it is loaded, and never to be passed over


# Saving


def save(
    run: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    timesteps: Mapping[str, Tensor],
    state: dict[str, Any],
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Writes RUN/checkpoints/step-*, then deletes all but the last two checkpoints.

    Args:
        model, ema: the weights and their average, by name.
        timesteps: what the run knows of the losses at its timesteps, by name.
        state: what else to keep, as JSON.
        averages: more averages of the weights, by the names of their files, `ema-*`.

    Raises:
        CheckpointError: a weight or moment is not finite, or the files cannot be written. What was there before is
            still there, and nothing else.
    """
    weights = {"model": _on_cpu(model), "ema": _on_cpu(ema), "timesteps": _on_cpu(timesteps)}
    weights |= {name: _on_cpu(tensors) for name, tensors in (averages or {}).items()}
    content = (*CONTENT, *(f"{name}.safetensors" for name in averages or {}))
    moments = {key: _on_cpu(values) for key, values in optimizer.state_dict()["state"].items()}
    for kind, tensors in (*weights.items(), *(("optimizer", values) for values in moments.values())):
        if name := _not_finite(tensors):
            raise CheckpointError(f"step {step} is not saved: {name} ({kind}) is not finite; {advice(run)}")

    target = run / "checkpoints" / f"step-{step:08d}"
    temporary = target.with_suffix(".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob("step-*.tmp"):
            if _number(leftover.with_suffix("")) >= 0:
                _delete(leftover)
        temporary.mkdir()
        for name, tensors in weights.items():
            safetensors.torch.save_file(tensors, temporary / f"{name}.safetensors")
        groups = [  # a learning rate that is a tensor on a GPU as a number, as on a CPU
            {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in optimizer.state_dict()["param_groups"]
        ]
        torch.save({"state": moments, "param_groups": groups}, temporary / "optimizer.pt")
        write_text(temporary / "state.json", json.dumps({"format": FORMAT, "step": step} | state, indent=2))
        write_text(temporary / SUMS, "".join(f"{digest(temporary / name)}  {name}\n" for name in content))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        _read_back(temporary, weights, moments)
        temporary.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        _delete(temporary)
        kept = f"; the newest checkpoint is {steps(run)[-1].name}" if steps(run) else ""
        raise CheckpointError(f"{target}: cannot be saved ({_first_line(error)}){kept}") from None
    except BaseException:
        _delete(temporary)
        raise
    for old in steps(run)[:-KEEP]:
        if all(_is_own(path.name) for path in old.iterdir()):  # otherwise somebody keeps files there
            _delete(old.rename(old.with_suffix(".tmp")))  # so that a deletion that is interrupted is completed later
    return target


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinity."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _read_back(folder: Path, weights: dict[str, dict[str, Tensor]], moments: dict[int, dict[str, Tensor]]) -> None:
    """Raises an OSError unless the files hold what was written."""
    found = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    pairs = [(moments[key], found[key]) for key in moments]
    pairs += [
        (tensors, safetensors.torch.load_file(folder / f"{name}.safetensors")) for name, tensors in weights.items()
    ]
    for written, read in pairs:
        if not all(torch.equal(tensor, read[name]) for name, tensor in written.items()):
            raise OSError("the files do not hold what was written to them")


def _is_own(name: str) -> bool:
    """Whether `save` writes files of this name."""
    return name in (*CONTENT, SUMS) or bool(re.fullmatch(r"ema-(sigma_rel=)?[0-9.e-]+\.safetensors", name))


def _delete(folder: Path) -> None:
    """Deletes the files of a checkpoint, and its folder if nothing else is in it. A link is deleted, not followed."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        for path in list(folder.iterdir()):
            if _is_own(path.name.removesuffix(".tmp")):
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


# Loading


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The step, the config and what else was given to `save`.

    Raises:
        CheckpointError: state.json is missing, damaged or of a later version.
    """
    path = checkpoint / "state.json"
    try:
        if path.stat().st_size > LARGEST_STATE:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {LARGEST_STATE:,} can be")
        text = path.read_text(encoding="utf-8")
        state = _State.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if state.format > FORMAT:
        raise CheckpointError(
            f"{path}: written by a later version of ddpm_fast (format {state.format}, known: {FORMAT})"
        )
    if state.format > 1 and not (checkpoint / SUMS).is_file():
        raise _damaged(checkpoint / SUMS, "no such file")
    _check_digest(path)
    return state.model_dump(by_alias=True)


def load_weights(checkpoint: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copies what was saved as `model`, `ema`, `ema-*` or `timesteps` into tensors of the same names.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors have other names, shapes or dtypes than those
            given, or are not finite.
    """
    path = checkpoint / f"{name}.safetensors"
    check_size(checkpoint, name, tensors.values())
    _check_digest(path)
    try:
        found = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None
    _check_tensors(path, found, tensors, "not the tensors of the run in state.json")
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(found[key])


def check_size(checkpoint: Path, name: str, tensors: Iterable[Tensor]) -> None:
    """Raises a CheckpointError unless a file of weights has about the size of these tensors, which may be meta ones.

    A file that lies is then refused before memory is taken, for itself or for the network that its config describes.
    """
    sizes = [tensor.nbytes for tensor in tensors]
    names = 4096 * (len(sizes) + 1)
    _check_size(checkpoint / f"{name}.safetensors", 2 * sum(sizes) + names, (sum(sizes) - names) // 2)


def _check_size(path: Path, most: int, least: int = 0) -> None:
    try:
        if not least <= (size := path.stat().st_size) <= most:
            needed = f"at most {most:,}" if size > most else f"at least {least:,}"
            raise ValueError(f"it has {size:,} bytes; the network in state.json needs {needed}")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads Adam's moments and numbers of steps; learning rates and the like stay as they are.

    Raises:
        CheckpointError: the file is missing or damaged, or it does not fit the parameters of the optimizer.
    """
    path = checkpoint / "optimizer.pt"
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    wanted = {
        f"{i}.{key}": torch.empty_like(p, device="cpu") if key.startswith("exp") else torch.empty(())
        for i, p in parameters.items()
        for key in MOMENTS
    }
    room = 2 * sum(tensor.nbytes for tensor in wanted.values()) + 4096 * (len(wanted) + 1)
    _check_size(path, 2 * room)  # with the names of its entries, and what pads them
    _check_digest(path)
    found = _load_moments(path, room)
    _check_tensors(path, found, wanted, "not the moments of the network in state.json")
    for name, tensor in found.items():
        if (tensor < 0).any() and not name.endswith("exp_avg"):
            raise _damaged(path, f"{name} is below what it can be")
        wanted[name].copy_(tensor)  # in the memory format of the parameter, as the fused update needs it
    state = {i: {key: wanted[f"{i}.{key}"] for key in MOMENTS} for i in parameters}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _load_moments(path: Path, room: int) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named "index.key", from a file that holds no more than `room` bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [archive.read(e) for e in entries if e.filename.endswith(".pkl") and e.file_size <= room]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if (size := sum(entry.file_size for entry in entries)) > room:
            raise ValueError(f"it holds {size:,} bytes, more than the {room:,} that the network can need")
        for opcode, name, _ in itertools.chain(*map(pickletools.genops, pickles)):
            # The loader's own list has functions that allocate whatever a file says, such as bytearray.
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not IN_MOMENTS.fullmatch(str(name)):
                raise ValueError(f"it holds {name}, and moments are tensors")
        states = torch.load(path, map_location="cpu", weights_only=True)["state"]
        return {f"{i}.{key}": tensor for i, state in states.items() for key, tensor in state.items()}
    except Exception as error:  # the loader raises whatever the content of a damaged file leads to
        raise _damaged(path, error) from None


def _check_tensors(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Tensor], reason: str) -> None:
    """Compares names, shapes and dtypes, then the values with NaN and infinity."""
    problem = None
    if odd := next(iter(sorted(found.keys() ^ wanted.keys())), None):
        problem = f"{odd} is missing" if odd in wanted else f"{odd} is unknown"
    for name in () if problem else wanted:
        x, y = found[name], wanted[name]
        if not isinstance(x, Tensor) or (x.shape, x.dtype, x.layout) != (y.shape, y.dtype, y.layout):
            given = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            problem = f"{name} is {given}, needed {tuple(y.shape)} {y.dtype}"
            break
    if problem:
        raise CheckpointError(f"{path}: {reason} ({problem})")
    if name := _not_finite(found):
        raise CheckpointError(f"{path}: {name} is not finite{_older(path)}")


def _check_digest(path: Path) -> None:
    """Compares a file with its checksum, where there is one."""
    sums = path.parent / SUMS
    try:
        if not sums.is_file():
            return
        with open(sums, encoding="utf-8") as file:
            lines = file.read(LARGEST_SUMS).splitlines()
        if f"{digest(path)}  {path.name}" not in lines:
            raise ValueError(f"it differs from its checksum in {SUMS}")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{path}: truncated, missing or damaged ({_first_line(reason)}){_older(path)}")


def _first_line(reason: object) -> str:
    """Of what may be hundreds of lines in PyTorch's errors."""
    return (str(reason) or type(reason).__name__).splitlines()[0]


def _older(path: Path) -> str:
    """What to do about a bad file of a checkpoint, if there is an older one."""
    bad = path.resolve().parent
    siblings = sorted((_number(p), p) for p in bad.parent.glob("step-*") if not p.is_symlink())
    older = [p for number, p in siblings if 0 <= number < _number(bad) and (p / "state.json").is_file()]
    return f"; delete {path.parent} to go on from {older[-1].name}" if older else ""
