"""A run as its files tell of it, while it goes on and afterwards."""

__all__ = ["Watched", "read"]

import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.progress_log import read_course, speed_facts
from ..training.run import RunError

AVERAGED = 10  # points, for the loss by timestep and the time that is left
LATE = 10  # a point that comes so many times later than usual is missed
SHOWN = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm"}


@dataclass
class Watched:
    """A run as its files tell of it.

    Attributes:
        steps: to take.
        points: of progress.jsonl; the loss of steps from before there was such a file is that of metrics.json.
        by_timestep: (timestep, mean loss) pairs, of the last points.
        ended: `finished`, `stopped` or `failed`, with the reason; None while it goes on.
        left: seconds; None if it is not known.
        silent: seconds since the last point; None if it is not known.
        late: whether that is much longer than between the points before.
        preview: the picture of the newest samples.
    """

    folder: Path
    steps: int
    points: list[dict[str, Any]]
    by_timestep: list[tuple[float, float]]
    ended: str | None
    left: float | None
    silent: float | None
    late: bool
    preview: Path | None

    @property
    def step(self) -> int:
        return self.points[-1]["step"] if self.points else 0

    @property
    def facts(self) -> str:
        """The last values, in one line."""
        last = self.points[-1] if self.points else {}
        facts = [f"{words} {last[name]:.3g}" for name, words in SHOWN.items() if name in last]
        return " · ".join(facts + speed_facts(last)) or "no loss so far"

    @property
    def state(self) -> str:
        """How the run ended, or the time that is left."""
        if self.ended is not None:
            return self.ended
        if self.late:
            return f"no point for {_duration(self.silent)}: the training is slow, or it was killed"
        left = "" if self.left is None else f"{_duration(self.left)} left"
        silent = "" if self.silent is None else f"last point {_duration(self.silent)} ago"
        return ", ".join(filter(None, [left, silent]))


def read(folder: Path) -> Watched:
    """Reads what is there of a run.

    Raises:
        RunError: there is no run.
    """
    try:
        steps = json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: no run here, since its config.json cannot be read ({error})") from None
    course, metrics = read_course(folder), _metrics(folder)
    ended, first = course.ended, course.points[0]["step"] if course.points else math.inf
    points = [{"step": step, "loss": loss} for step, loss in metrics.get("history", []) if step < first]
    points += course.points
    by_timestep = _by_timestep(course.points[-AVERAGED:])
    if course.id is None:  # a run from before there was progress.jsonl
        by_timestep = [(t, loss) for t, loss in metrics.get("loss_by_timestep", [])]
        ended = {"ended": "finished"} if metrics.get("steps") == steps else None
    how = None if ended is None else ended["ended"] + (f": {ended['message']}" if ended.get("message") else "")
    previews = sorted((folder / "previews").glob("step-*.png"))
    left, silent, late = _time(course.points, steps)
    return Watched(folder, steps, points, by_timestep, how, left, silent, late, previews[-1] if previews else None)


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _by_timestep(points: list[dict[str, Any]]) -> list[tuple[float, float]]:
    found: dict[str, list[float]] = {}
    for point in points:
        for name, value in point.items():
            if name.startswith("loss_by_timestep/"):
                found.setdefault(name.partition("/")[2], []).append(value)
    ranges = ((name.split("-"), sum(values) / len(values)) for name, values in sorted(found.items()))
    return [((int(first) + int(last)) / 2, mean) for (first, last), mean in ranges]


def _time(points: list[dict[str, Any]], steps: int) -> tuple[float | None, float | None, bool]:
    """The seconds that are left, those since the last point, and whether the next one should be there by now."""
    if not points:
        return None, None, False
    silent = max(0.0, time.time() - points[-1]["time"])  # the clocks of two hosts may differ
    if len(points) < 2:
        return None, silent, False
    recent = points[-AVERAGED - 1 :]
    intervals = sorted(b["time"] - a["time"] for a, b in itertools.pairwise(recent))
    usual = intervals[len(intervals) // 2]  # the median: a run may have stood still between two points
    a_step = usual / max(1, recent[-1]["step"] - recent[-2]["step"])
    late = silent > max(60.0, LATE * usual)
    return max(0.0, (steps - points[-1]["step"]) * a_step - (0 if late else silent)), silent, late


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
