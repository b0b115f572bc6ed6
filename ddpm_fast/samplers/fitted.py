"""A sampler whose rows were fitted to one network, and what it was fitted to."""

__all__ = ["FittedTable", "check_table", "conditions", "find"]

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import finite, integer
from ..schedules import NoiseSchedule
from .step_table import StepTable, columns_from

FORMAT = 1
# What a table is fitted to, and the type of each in JSON.
CONDITIONS = {"timesteps": int, "betas": str, "objective": str, "clip": list | None, "weights": str}


@dataclass(frozen=True, kw_only=True)
class FittedTable(StepTable):
    """A table whose coefficients and timesteps were fitted to a network; see `ddpm_fast.fit_sampler`.

    Args:
        fitted_to: `conditions`, and under `weights` a digest of the network's weights.
        start_distance: the distance to the teacher's samples, on held-out noise, of the sampler that the fit began
            with; `distance` is that of this table, and no larger.

    Raises:
        ValueError: as `StepTable`, or timesteps that are not in [0, T) or do not fall.
    """

    fitted_to: Mapping[str, Any]
    start_distance: float
    distance: float

    def __post_init__(self) -> None:
        super().__post_init__()
        timesteps = self.fitted_to["timesteps"]
        if not len(self) or self.t.min() < 0 or self.t.max() >= timesteps or (self.t.diff() >= 0).any():
            raise ValueError(f"a fitted sampler needs falling timesteps in [0, {timesteps}); got {self.t.tolist()}")

    def check_fits(self, found: Mapping[str, Any]) -> None:
        """Compares what the table was fitted to with what it is to be used with.

        Args:
            found: some or all of `fitted_to`.

        Raises:
            ValueError: they differ; the message has both.
        """
        changed = [name for name in found if found[name] != self.fitted_to[name]]
        if changed:
            differences = "; ".join(f"{name} was {self.fitted_to[name]}, now {found[name]}" for name in changed)
            raise ValueError(f"this sampler was fitted to another diffusion: {differences}; fit one to this diffusion")

    def _to_dict(self) -> dict[str, Any]:
        distances = {"start_distance": self.start_distance, "distance": self.distance}
        return {"format": FORMAT, "fitted_to": dict(self.fitted_to), **distances, "steps": super()._to_dict()}

    @classmethod
    def _from_dict(cls, found: dict[str, Any]) -> "FittedTable":
        wanted = {"format", "fitted_to", "start_distance", "distance", "steps"}
        if odd := sorted(found.keys() ^ wanted):
            raise ValueError(f"a fitted sampler has {', '.join(sorted(wanted))}; {odd[0]} is missing or unknown")
        if found["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {found['format']!r}")
        fitted_to, steps = found["fitted_to"], found["steps"]
        if not isinstance(fitted_to, dict) or not isinstance(steps, dict) or fitted_to.keys() != CONDITIONS.keys():
            raise ValueError(f"fitted_to must be an object with {', '.join(CONDITIONS)}, and steps one of columns")
        for name, kind in CONDITIONS.items():
            if not isinstance(fitted_to[name], kind):
                raise ValueError(f"fitted_to.{name} cannot be {fitted_to[name]!r:.80}")
        distances = {name: finite(name, found[name], 0) for name in ("start_distance", "distance")}
        return cls(**columns_from(steps), fitted_to=fitted_to, **distances)


def conditions(schedule: NoiseSchedule, objective: str, clip: tuple[float, float] | None) -> dict[str, Any]:
    """What the rows of a table depend on, but for the weights of the network, as it is in JSON.

    Args:
        clip: bounds of x0_hat, None for none.
    """
    betas = np.ascontiguousarray(schedule.betas.numpy())
    return {
        "timesteps": len(schedule),
        "betas": hashlib.sha256(betas).hexdigest()[:32],
        "objective": objective,
        "clip": None if clip is None else list(clip),
    }


def check_table(table: StepTable, schedule: NoiseSchedule, objective: str, clip: tuple[float, float] | None) -> None:
    """Checks that a table can be used with a diffusion, which may be another than it was made for.

    Raises:
        ValueError: it has no steps, a timestep outside [0, T), or was fitted to something else.
    """
    if isinstance(table, FittedTable):
        table.check_fits(conditions(schedule, objective, clip))
    if len(table) == 0 or table.t.min() < 0 or table.t.max() >= len(schedule):
        raise ValueError(f"a StepTable needs timesteps in [0, {len(schedule)}); got {table.t.tolist()}")


def find(fitted: Mapping[int, StepTable], steps: int) -> StepTable:
    """The table of so many steps.

    Raises:
        ValueError: there is none; the message says which there are.
    """
    table = fitted.get(integer("steps of a fitted sampler", steps, 1))
    if table is None:
        others = ", ".join(map(str, sorted(fitted))) or "no number"
        raise ValueError(
            f"no sampler is fitted for {steps} steps, but for {others} of steps; fit one with "
            f"ddpm_fast.fit_sampler, or for a run with `ddpm-fast fit-sampler RUN --steps {steps}`"
        )
    return table
