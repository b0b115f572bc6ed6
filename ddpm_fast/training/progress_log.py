"""progress.jsonl: the course of a run, written while it goes on, for whoever watches it.

The first line is `{"id": ...}`, by which trackers know the run. Each line that follows is a point of the curves, and
the last one says how the training ended:

    {"step": 50, "time": 1764550000.0, "loss": 0.41, "grad_norm": 1.7, "learning_rate": 0.0002,
     "images_per_second": 90.5, "share_of_peak": 0.31, "loss_by_timestep/000-099": 0.73, ...}
    {"ended": "finished", "step": 5000, "time": 1764553600.0}

`time` is in seconds since 1970. Points are appended, so that a process that is killed leaves at most one line that is
not whole, which readers leave out. A run that goes on from a checkpoint first removes the points of later steps, and
writes them again as it takes these steps: the file is always one curve.
"""

__all__ = ["Course", "ProgressLog", "read_course", "speed_facts"]

import json
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .files import write_text

NAME = "progress.jsonl"


def speed_facts(point: dict[str, Any]) -> list[str]:
    """The speed and its share of the peak, as far as a point has them, in words."""
    rate, share = point.get("images_per_second"), point.get("share_of_peak")
    facts = [] if rate is None else [f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"]
    return facts + ([f"{share:.{0 if share >= 0.1 else 1}%} of peak"] if share else [])


@dataclass
class Course:
    """What progress.jsonl holds.

    Attributes:
        id: of the run; None if there is no such file.
        points: by step.
        ended: the line that says how the training ended; None while it goes on, or if it was killed.
    """

    id: str | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    ended: dict[str, Any] | None = None


def read_course(folder: Path) -> Course:
    """Reads the file of a run, which may be in the middle of being written."""
    course = Course()
    try:
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return course
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut off
        match values:
            case {"id": str(name)}:
                course.id = name
            case {"ended": str()}:
                course.ended = values
            case {"step": int()}:
                course.points.append(values)
    return course


class ProgressLog:
    """Writes progress.jsonl. If that fails, one line says so, and the training goes on.

    Args:
        folder: of the run.
        first: how many steps have been taken; points of later ones are removed.

    Attributes:
        id: of the run; a run that goes on keeps it.
        last: the step of the last point that was in the file before points were removed, at least `first`.
    """

    def __init__(self, folder: Path, first: int) -> None:
        before = read_course(folder)
        self.path, self.works = folder / NAME, True
        self.id = before.id if first and before.id else uuid.uuid4().hex[:8]
        self.last = max([first, *(point["step"] for point in before.points if first)])
        kept = [{"id": self.id}, *(point for point in before.points if point["step"] <= first)]
        self._try(lambda: write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in kept)))

    def point(self, step: int, values: dict[str, float]) -> None:
        """Appends a point.

        Args:
            values: by name, finite.
        """
        self._append({"step": step, "time": round(time.time(), 1)} | values)

    def end(self, how: str, step: int, message: str = "") -> None:
        """Appends the line that says how the training ended: `finished`, `stopped` or `failed`."""
        told = {"ended": how, "step": step, "time": round(time.time(), 1)}
        self._append(told | ({"message": message} if message else {}))

    def _append(self, line: dict[str, Any]) -> None:
        def append() -> None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")

        self._try(append)

    def _try(self, write: Any) -> None:
        if self.works:
            try:
                write()
            except OSError as error:
                self.works = False
                tqdm.write(f"{self.path} is not written any more: {error}")
