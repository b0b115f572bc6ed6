"""A run in the terminal, drawn again while it goes on: its loss, its speed, the time left, and the newest samples.

Only the files of the run are read, so that it can be watched from another process or host, and after its end.
"""

__all__ = ["frame", "watch"]

import itertools
import math
import time
from pathlib import Path

from PIL import Image
from plotille import Canvas
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from rich_pixels import Pixels

from .watched import Watched, read

EVERY = 1.0  # seconds between two frames
LABELS = 8  # columns left of a curve
SMALLEST, LARGEST = (60, 16), (160, 48)  # columns and rows of a frame


def watch(folder: Path) -> None:
    """Draws a run until it has ended, or until Ctrl-C. If the output is no terminal, it is drawn once.

    Raises:
        RunError: there is no run.
    """
    console, run = Console(), read(folder)
    try:
        if console.is_terminal and run.ended is None:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while run.ended is None:
                    live.update(frame(run, *console.size), refresh=True)
                    time.sleep(EVERY)
                    run = read(folder)
    except KeyboardInterrupt:
        pass
    columns, rows = console.size
    console.print(frame(run, columns, rows - 1))  # which stays; the last line is the shell's


def frame(run: Watched, columns: int, rows: int) -> RenderableType:
    """A picture of at most so many columns and rows."""
    columns = max(SMALLEST[0], min(columns, LARGEST[0]))
    body = max(SMALLEST[1], min(rows, LARGEST[1])) - 4
    shown = min(body, (columns - 2) * 2 // 5) if run.preview else 0  # rows of the preview, which is a square
    width = columns - 2 * shown - 2
    low = max(3, (body - 4) * 2 // 5)
    curves = Group(
        _curve([(p["step"], p["loss"]) for p in run.points], "loss by step", width, body - 4 - low, log_x=True),
        _curve(run.by_timestep, "loss by timestep", width, low),
    )
    below = Table.grid()
    below.add_column(width=width + 2)
    below.add_column(width=2 * shown)
    below.add_row(curves, _samples(run.preview, shown) if shown else "")
    return Group(_title(run, columns), _line(run.facts), _line(run.state, _style(run)), below)


def _title(run: Watched, columns: int) -> Table:
    title = Table.grid()
    title.width = columns
    title.add_column(ratio=1, no_wrap=True)
    title.add_column(justify="right", no_wrap=True)
    title.add_row(Text(str(run.folder), style="bold"), f"step {run.step:,} of {run.steps:,}")
    whole = Table.grid()
    whole.add_row(title)
    whole.add_row(ProgressBar(total=run.steps, completed=run.step, width=columns))
    return whole


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _style(run: Watched) -> str:
    if run.ended is None:
        return "yellow" if run.late else "cyan"
    return {"finished": "green", "stopped": "yellow"}.get(run.ended.partition(":")[0], "red")


def _curve(
    points: list[tuple[float, float]], title: str, width: int, height: int, *, log_x: bool = False
) -> RenderableType:
    """A curve with its axes, `height` + 2 rows of `width` columns; the vertical axis is logarithmic if it can be."""
    width -= LABELS
    if not points:
        return Text(f"{title}: nothing yet" + "\n" * (height + 1), style="dim", no_wrap=True)
    ends = f"{points[0][0]:,.0f}", f"{points[-1][0]:,.0f}"
    log_y = all(y > 0 for _, y in points)
    points = [(math.log10(x) if log_x else x, math.log10(y) if log_y else y) for x, y in points]
    left, right = _apart(points[0][0], points[-1][0])
    points = _averaged(points, left, right, 2 * width)
    bottom, top = _apart(min(y for _, y in points), max(y for _, y in points))
    canvas = Canvas(width, height, xmin=left, ymin=bottom, xmax=right, ymax=top)
    canvas.point(*points[0])
    for one, other in itertools.pairwise(points):
        canvas.line(*one, *other)
    shown = {0: top, height // 2: (top + bottom) / 2, height - 1: bottom}
    labels = {row: f"{10**y if log_y else y:.2g}" for row, y in shown.items()}
    drawn = Text(title, style="bold", no_wrap=True)
    for row, dots in enumerate(canvas.plot().splitlines()):
        drawn.append(f"\n{labels.get(row, ''):>{LABELS - 2}} ┤", style="not bold dim")
        drawn.append(dots, style="not bold cyan")
    gap = " " * max(1, width - sum(map(len, ends)))
    return drawn.append(f"\n{' ' * LABELS}{ends[0]}{gap}{ends[1]}", style="not bold dim")


def _apart(low: float, high: float) -> tuple[float, float]:
    """Two ends of an axis, which differ."""
    return (low, high) if high - low > 1e-9 else (low - 0.1, high + 0.1)


def _averaged(points: list[tuple[float, float]], left: float, right: float, dots: int) -> list[tuple[float, float]]:
    """The mean of the points at each of so many places between `left` and `right`."""

    def place(point: tuple[float, float]) -> int:
        return int((point[0] - left) / (right - left) * (dots - 1))

    groups = (list(group) for _, group in itertools.groupby(points, place))
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]


def _samples(path: Path, rows: int) -> RenderableType:
    """The samples of a preview, or the first four, if there is no room for all, as a square of so many rows."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except OSError:  # it is being replaced, or is not there any more
        return ""
    if 2 * rows < picture.width // 4 * 3:
        picture = picture.crop((0, 0, picture.width // 2 + 1, picture.height // 2 + 1))
    return Pixels.from_image(picture.resize((2 * rows, 2 * rows), Image.Resampling.BOX))
