"""The folder of a run: which folders a training may write into, and what must stay the same when it goes on."""

__all__ = ["check_folder", "check_same", "config_text", "locked"]

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import checkpoint
from .config import ConfigError, RunConfig, check
from .data import OF_A_RUN
from .run import RunError

LOCK = ".lock"

# What may differ from the run that is resumed: it changes neither the steps taken so far nor what the weights mean.
FREE = {
    "model.gradient_checkpointing",
    "diffusion.sampler",
    "diffusion.sampling_timesteps",
    "diffusion.spacing",
    "diffusion.ddim_sampling_eta",
    "training.steps",
    "training.lr",
    "training.warmup",
    "training.cosine_decay",
    "training.grad_clip",
    "training.max_skipped",
    "training.save_every",
    "training.sample_every",
    "training.workers",
    "training.trackers",
}


def config_text(config: RunConfig) -> str:
    """The content of config.json."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in the folder. The lock of a process that has ended does not count.

    Raises:
        RunError: another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder}: another process is training in this folder; choose another folder") from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file
            (folder / LOCK).unlink()  # while it is held: a process that waits for the deleted file tries again
        lock.release()


def check_folder(folder: Path, *, resume: bool) -> None:
    """Checks that a run can begin, or go on, in a folder without touching what is not its own.

    Raises:
        RunError: there is nothing to resume, there is a run already, or there are other files.
    """
    written = [folder / f"{name}{ending}" for name in (*OF_A_RUN, LOCK) for ending in ("", ".tmp")]
    for path in (*written, *(folder / "previews").glob("*")):
        if path.is_symlink():
            raise RunError(f"{path} is a symbolic link, and a run writes only into its own folder; remove the link")
    begun = bool(checkpoint.steps(folder))
    if resume and not begun:
        raise RunError(f"{folder}: no checkpoint here to go on from; leave out --resume to start a run")
    if begun and not resume:
        raise RunError(f"{folder} holds a run already; continue it with --resume, or choose another folder")
    if not resume and folder.exists() and (others := _others(folder)):
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise RunError(f"{folder} is not empty and holds no run ({shown}); choose a new or an empty folder")


def _others(folder: Path) -> list[str]:
    """What is in a folder, but for hidden files and what a run leaves that ended before its first checkpoint."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    unfinished = [path.suffix == ".tmp" for path in (folder / "checkpoints").glob("*")]
    if names == ["checkpoints"] and all(unfinished):
        return []
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        own = text == config_text(check(json.loads(text)))
    except (OSError, ValueError):  # ConfigError is one
        own = False
    return [name for name in names if not own or name.removesuffix(".tmp") not in OF_A_RUN]


def check_same(config: RunConfig, fingerprint: str, checkpoint_folder: Path, state: dict[str, Any]) -> None:
    """Compares a config and its images with those of the run to be resumed.

    Args:
        fingerprint: identifies the images, wherever they are.
        state: of the checkpoint, as `checkpoint.load_state` gives it.

    Raises:
        RunError: the images are others, or a key differs that must not; the message has its old and its new value.
    """
    try:
        before = _keys(check(state["config"], checkpoint_folder / "state.json"))
    except ConfigError as error:
        raise checkpoint.CheckpointError(str(error)) from None
    now, free = _keys(config), set(FREE)
    if state["data"] is not None or _path(before) == _path(now):
        free.add("data.path")  # since the images themselves are compared
    if config.training.precision == "auto":
        free.add("training.precision")  # the run keeps the one that it has
    changed = [key for key in (before | now) if key not in free and before.get(key) != now.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise RunError(f"--resume cannot change what the run was started with: {differences}")
    if state["data"] not in (None, fingerprint):
        raise RunError(
            f"the images are not those that the run was started with: their fingerprint was {state['data']}, "
            f"now {fingerprint} ({config.data.name}{f', {path}' if (path := now.get('data.path')) else ''})"
        )


def _keys(config: RunConfig) -> dict[str, Any]:
    """A config as one dictionary, "section.key" -> value."""
    values = config.model_dump(mode="json")
    seed = {"seed": values.pop("seed")}
    return seed | {f"{name}.{key}": value for name, section in values.items() for key, value in section.items()}


def _path(keys: dict[str, Any]) -> Path | None:
    path = keys.get("data.path")
    return None if path is None else Path(path).expanduser().resolve()
