"""What a training tells of itself while it goes on: the progress bar, progress.jsonl and the trackers."""

__all__ = ["LiveReport"]

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .config import RunConfig
from .progress import Progress
from .progress_log import ProgressLog, speed_facts
from .run import RunError
from .speed import Speed
from .trackers import Trackers


class LiveReport:
    """A context in which a run takes its steps. When it ends, progress.jsonl says how.

    Args:
        progress: where the run begins or goes on.
        speed: of the run.

    Raises:
        RunError: a tracker cannot be started.
    """

    def __init__(self, config: RunConfig, folder: Path, progress: Progress, speed: Speed) -> None:
        self.config, self.folder, self.progress, self.speed = config, folder, progress, speed
        self._facts = ""  # that the bar shows, other than the loss

    def __enter__(self) -> "LiveReport":
        c, first = self.config.training, self.progress.step
        self._log = ProgressLog(self.folder, first)
        names = c.trackers if first < c.steps else ()
        sent = {"run_id": self._log.id, "first": first, "last": self._log.last}
        try:
            self._trackers = Trackers(names, self.folder, self.config, **sent)
        except RunError as error:
            self._log.end("failed", first, str(error))
            raise
        self.bar = tqdm(desc="training", total=c.steps, initial=first, unit="step")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        self.bar.close()
        if error is None:
            how, message = "finished", ""
        else:
            how = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            message = (str(error) or kind.__name__).splitlines()[0]
        self._log.end(how, self.progress.step, message)
        self._trackers.finish()

    def tell(self, loss: float, point: dict[str, float] | None, *, lr: float, seconds: float) -> None:
        """Shows the loss of the last step in the bar, and logs a point.

        Args:
            point: of `Losses`; None if there is none at this step.
            lr: the learning rate of the last step.
            seconds: that the run has spent on its steps.
        """
        step = self.progress.step
        if point is not None:
            speed = self.speed.point(step, seconds)
            self._facts = "".join(f", {fact}" for fact in speed_facts(speed))
            values = point | {"learning_rate": lr} | speed
            self._log.point(step, values)
            self._trackers.log(step, values)
        self.bar.set_postfix_str(f"loss {loss:.4f}{self._facts}", refresh=False)

    def samples(self, path: Path) -> None:
        """Sends the picture of a preview to the trackers."""
        self._trackers.samples(self.progress.step, path)
