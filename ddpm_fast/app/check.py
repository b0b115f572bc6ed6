"""ddpm-fast check: the conformance kit on the command line."""

__all__ = ["load", "run"]

import ast
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import schedules
from ..conformance import CannotCheck, Claim, Report, check


def load(name: str) -> Any:
    """The class or function MODULE:NAME. The current folder is searched too, as `python -m` does.

    Raises:
        CannotCheck: there is no such module, or nothing of that name in it.
    """
    module, separator, attribute = name.partition(":")
    if not separator or not module or not attribute:
        raise CannotCheck(f"give MODULE:CLASS or MODULE:FUNCTION, such as diffusers:DDIMScheduler; got {name!r}")
    sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks another one
        raise CannotCheck(f"there is no module {error.name!r} in the current folder or in this environment") from error
    finally:
        sys.path.remove("")
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CannotCheck(f"{module} has nothing of the name {attribute!r}")
        found = getattr(found, part)
    return found


def run(
    name: str,
    *,
    steps: Sequence[int],
    schedule: str,
    timesteps: int,
    claim: str | None,
    settings: Sequence[str],
    step_settings: Sequence[str],
    precision: str | None,
    json_file: Path | None,
) -> Report:
    """Checks MODULE:NAME and writes the report as JSON, if a file is given.

    Raises:
        CannotCheck: as `load` and `conformance.check` do.
    """
    report = check(
        load(name),
        steps=steps,
        schedule=_schedule(schedule, timesteps),
        claim=None if claim is None else _claim(claim),
        options=dict(map(_setting, settings)),
        step_options=dict(map(_setting, step_settings)),
        precision=None if precision is None else getattr(torch, precision),
    )
    if json_file is not None:
        findings = [{key: _json(value) for key, value in dataclasses.asdict(f).items()} for f in report.findings]
        written = {"name": report.name, "passed": report.passed, "facts": report.facts, "findings": findings}
        json_file.write_text(json.dumps(written, indent=2) + "\n")
    return report


def _json(figure: Any) -> Any:
    """JSON has no NaN and no infinity: these are texts."""
    return str(figure) if isinstance(figure, float) and not math.isfinite(figure) else figure


def _schedule(name: str, timesteps: int) -> schedules.NoiseSchedule:
    try:
        return schedules.make(name, timesteps)
    except ValueError as error:
        raise CannotCheck(str(error)) from error


def _claim(text: str) -> Claim:
    sampler, *settings = text.split(",")
    try:
        return Claim(sampler, dict(map(_setting, settings)))
    except ValueError as error:
        raise CannotCheck(str(error)) from error


def _setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE, with the value as Python writes it, or a text."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise CannotCheck(f"give KEY=VALUE, such as timestep_spacing=trailing; got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value
