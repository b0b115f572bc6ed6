"""The checks of arithmetic: the class's table, `add_noise`, and steps in half precision."""

__all__ = ["add_noise", "half_steps", "table"]

import math
from typing import Any

import torch
from torch import Tensor

from .adapters import SchedulerSampler
from .checks import Case, compare, table_error, table_tolerance
from .gaussian import ROUNDINGS
from .measure import Draws
from .report import Finding

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
HALF_ROUNDINGS = 8  # of a sum of a few products, each rounded


def table(case: Case) -> Finding:
    """`alphas_cumprod` against float64, within what T products in float32 may be off by."""
    check = "schedule: alphas_cumprod"
    own = case.sampler.table() if isinstance(case.sampler, SchedulerSampler) else None
    if own is None or not own.is_floating_point():
        return Finding(check, "not checked", detail="there is no such table")
    exact, wide = case.sampler.schedule.alphas_cumprod, own.to(torch.float64)
    noise = ((1 - wide) / (1 - exact) - 1).abs().max().item()
    dtype = str(own.dtype).removeprefix("torch.")
    detail = f"largest relative error, in {dtype}; that of 1 - alphas_cumprod is {noise:.2g}"
    return compare(check, table_error(wide, exact), 0.0, table_tolerance(own.dtype, len(exact)), detail=detail)


def add_noise(case: Case) -> list[Finding]:
    """The factors of x_0 and of the noise in `add_noise`, at every timestep, in three precisions."""
    checks = {"float32": torch.float32} | HALF
    if not isinstance(case.sampler, SchedulerSampler) or not hasattr(case.sampler.cls, "add_noise"):
        return [Finding(f"add_noise in {name}", "not checked", detail="there is no add_noise") for name in checks]
    findings = [_add_noise(case, name, dtype, fresh=False) for name, dtype in checks.items()]
    return [_add_noise(case, "float32", torch.float32, fresh=True), *findings]


def _add_noise(case: Case, name: str, dtype: torch.dtype, *, fresh: bool) -> Finding:
    check = "add_noise before set_timesteps" if fresh else f"add_noise in {name}"
    scheduler = case.sampler.make() if fresh else _visiting_all(case)
    t = scheduler.timesteps.sort().values
    if t.is_floating_point() and (t != t.round()).any():
        return Finding(check, "not checked", detail="the timesteps are no integers")
    t = t.long().unique()
    abar = case.data.abar[t]
    one, zero = (torch.full((len(t), 1, 1, 1), value, dtype=dtype) for value in (1.0, 0.0))
    try:
        signal, noise = (
            scheduler.add_noise(*pair, t).to(torch.float64).flatten() for pair in ((one, zero), (zero, one))
        )
    except Exception as error:  # whatever the user's class raises is a finding
        return Finding(check, "fail", detail=f"raises {type(error).__name__}: {error}")
    a, s = abar.sqrt(), (1 - abar).sqrt()
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) > 2:  # x_0 + (s / a) noise, which scale_model_input scales
        a, s = torch.ones_like(a), s / a
    eps = max(torch.finfo(dtype).eps, case.eps)
    # A table in float32 has lost some of 1 - abar already, which is no error of `add_noise`.
    tolerance = HALF_ROUNDINGS * eps + HALF_ROUNDINGS * case.eps / (1 - abar)
    lost = int((noise == 0).sum())
    errors = torch.stack([(signal / a - 1).abs(), (noise / s - 1).abs()])
    excess = (errors / tolerance).nan_to_num(nan=math.inf)
    i = int(excess.amax(0).argmax())
    detail = f"relative error of the factor of x_0 or of the noise, at t = {t[i]}"
    if lost:
        detail += f"; no noise at all at {lost} timesteps"
    return compare(check, errors[excess[:, i].argmax(), i].item(), 0.0, tolerance[i].item(), detail=detail)


def _visiting_all(case: Case) -> Any:
    """A scheduler set to all timesteps, or if it visits some twice, to all but one, or else to the most of the runs.

    Some find the noise of a timestep by its place among those that they visit.
    """
    T = len(case.data.abar)
    for steps in (T, T - 1, max(case.runs)):
        scheduler = case.sampler.make()
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps.unique()) == len(scheduler.timesteps):
            break
    return scheduler


def half_steps(case: Case, steps: int) -> list[Finding]:
    """Each step in half precision against float64: its noise, and if it depends on x and the prediction alone, these.

    What a step makes of former predictions is left out: how large the terms are that it adds up is not known.
    """
    if not isinstance(case.sampler, SchedulerSampler):
        return []
    names = [f"steps in {name}" for name in HALF]
    if case.runs[steps].drawn and not case.sampler.takes_generator:
        return [Finding(name, "not checked", detail="step takes no generator") for name in names]
    exact = _steps(case, steps, torch.float64)
    # Of noise there is one term, of x and the prediction several, which add up to no more than about x does.
    terms = 1 + exact[:, 2:4].abs().amax(1)
    size = torch.stack([exact[:, 1].abs(), terms, terms], 1)
    findings = []
    for name, dtype in zip(names, HALF.values(), strict=True):
        try:
            half = _steps(case, steps, dtype)
        except Exception as error:  # whatever the user's class raises is a finding
            findings.append(Finding(name, "fail", steps=steps, detail=f"raises {type(error).__name__}: {error}"))
            continue
        remembers = not exact[::2, 4].equal(exact[::2, 2])  # x was 1 in every second step alone
        columns = [1] if remembers else [1, 2, 3]
        tolerance = HALF_ROUNDINGS * torch.finfo(dtype).eps * size[:, [i - 1 for i in columns]] + ROUNDINGS * case.eps
        error = (half - exact).abs()[:, columns] / tolerance
        k, i = divmod(int(error.nan_to_num(nan=math.inf).argmax()), len(columns))
        column, what = columns[i], ("noise of 1", "x of 1", "a prediction of 1")[columns[i] - 1]
        figures = half[k, column].item(), exact[k, column].item(), tolerance[k, i].item()
        detail = f"what step {k} makes of {what}; expected: the same in float64"
        findings.append(compare(name, *figures, steps=steps, detail=detail))
    return findings


def _steps(case: Case, steps: int, dtype: torch.dtype) -> Tensor:
    """What each step makes of 0, of noise, of x, of a prediction of 1, and in every second step of x, (K, 5)."""
    sampler = case.sampler
    scheduler = sampler.make()
    scheduler.set_timesteps(steps)
    outputs, generator = [], torch.Generator().manual_seed(0)

    def fill(number: int, z: Tensor) -> None:
        z[1] = 1

    with torch.no_grad(), Draws(fill):
        for k, t in enumerate(scheduler.timesteps):
            x, prediction = torch.zeros(5, 1, 1, 1, dtype=dtype), torch.zeros(5, 1, 1, 1, dtype=dtype)
            x[2], prediction[3], x[4] = 1, 1, 1 - k % 2
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # some count their steps by it
            outputs.append(sampler.step(scheduler, prediction, t, x, generator).to(torch.float64).flatten())
    return torch.stack(outputs)
