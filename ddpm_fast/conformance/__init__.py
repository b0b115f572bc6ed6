"""A conformance kit for samplers: what a scheduler or a sampling function does, against what it should do.

For Gaussian data the best denoiser is known in closed form (`gaussian`), and with it as the network every sampler is an
affine map from x_T and its draws of noise to x_0. The kit finds this map exactly (`measure`), without drawing samples,
and compares it with the published algorithm, with the probability flow and with the data.

    from diffusers import DDIMScheduler
    from ddpm_fast.conformance import check

    report = check(DDIMScheduler, options={"timestep_spacing": "trailing"})
    print(report.markdown())

What is checked is a class with diffusers' scheduler interface (`adapters.SchedulerSampler`), or a function

    f(denoiser, x_T, abar, steps, generator) -> x_0

where `denoiser(x, t)` returns E[x_0 | x_t = x] in the shape of x, for one timestep t of 0 ... T - 1; x_T is
(N, D, 1, 1), standard normal; abar is (T,), float64, falling; steps is an int; and all noise is to be drawn from the
torch.Generator. The kit runs the class or function, as any program does that uses it.
"""

__all__ = ["CannotCheck", "Claim", "Finding", "Report", "check"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import schedules
from . import behaviour, checks, precision
from .adapters import Claim, FunctionSampler, SchedulerSampler, claim_of
from .checks import Case, own_table
from .gaussian import Gaussian
from .measure import CannotCheck, Run, measure
from .report import Finding, Report

STEPS = (10, 30, 100)  # 30 does not divide 1000


def check(
    sampler: type | Callable[..., torch.Tensor],
    *,
    steps: Sequence[int] = STEPS,
    schedule: schedules.NoiseSchedule | None = None,
    claim: Claim | None = None,
    options: Mapping[str, Any] | None = None,
    step_options: Mapping[str, Any] | None = None,
    precision: torch.dtype | None = None,
) -> Report:
    """Checks a scheduler class or a sampling function. A few seconds.

    Args:
        sampler: a class with diffusers' scheduler interface, or a function (see the module's text).
        steps: numbers of steps K, each at least 2.
        schedule: of the forward process; None for `linear` with T = 1000. A class takes it as `trained_betas`; one
            that does not, or whose options name a schedule, is checked on its own.
        claim: the published algorithm it should be, such as Claim("ddim", {"eta": 1.0}); None for the one that the
            names and options of diffusers say, or none.
        options: arguments of the class.
        step_options: arguments of the class's `step`, such as {"eta": 1.0}.
        precision: that the sampler computes its coefficients in, float64 or float32; None for that of the class's
            table, and for float64 of a function.

    Raises:
        CannotCheck: neither a class with the interface nor a function, arguments that the class does not take, steps
            that are no numbers of steps, or noise or results of other shapes than that of x. It is a ValueError.
    """
    if not all(isinstance(count, int) and count > 1 for count in steps) or not steps:
        raise CannotCheck(f"steps must be integers of at least 2, got {steps}")
    schedule = schedule or schedules.make("linear", 1000)
    adapter = _adapter(sampler, schedule, options, step_options)
    claim = claim or claim_of(adapter)
    data = Gaussian(own_table(adapter))
    runs = {count: measure(adapter, data, count) for count in steps}
    float32 = any(run.float32 for run in runs.values())
    case = Case(adapter, data, claim, _eps(adapter, precision, float32), runs)
    report = Report(_name(sampler), _facts(case, float32))
    report.findings.extend(_findings(case))
    return report


def _adapter(sampler, schedule, options, step_options) -> SchedulerSampler | FunctionSampler:
    if isinstance(sampler, type):
        return SchedulerSampler(sampler, schedule, options, step_options)
    if not callable(sampler):
        raise CannotCheck(f"sampler must be a class or a function, got an object of {type(sampler).__name__}")
    if options or step_options:
        raise CannotCheck("options are those of a class; a function takes none")
    return FunctionSampler(sampler, schedule)


def _eps(sampler: SchedulerSampler | FunctionSampler, given: torch.dtype | None, float32_state: bool) -> float:
    """The precision of tables and states. Half precision is never what a sampler may compute in."""
    if given is None:
        table = sampler.table() if isinstance(sampler, SchedulerSampler) else None
        of_class = isinstance(sampler, SchedulerSampler) and (table is None or table.dtype != torch.float64)
        given = torch.float32 if of_class or float32_state else torch.float64
    if given not in (torch.float32, torch.float64):
        raise CannotCheck(f"precision must be torch.float32 or torch.float64, got {given}")
    return torch.finfo(given).eps


def _findings(case: Case) -> list[Finding]:
    by_check: dict[str, list[Finding]] = {}

    def add(*findings: Finding) -> None:
        for finding in findings:
            by_check.setdefault(finding.check, []).append(finding)

    add(precision.table(case))
    for steps, run in case.runs.items():
        add(*checks.visited(case, steps, run))
    for steps, run in case.runs.items():
        add(checks.affine(case, steps, run))
    reason = None
    if all(run.t[0] < run.t[-1] for run in case.runs.values()):
        reason = "the other checks are for samplers whose timesteps fall, from noise to data"
    elif any(finding.status == "fail" for finding in by_check["affine in x"]):
        reason = "the other checks take an affine map, of finite numbers"
    if reason:
        add(Finding("everything else", "not checked", detail=reason))
        return [checks.worst(findings) for findings in by_check.values()]
    for steps, run in case.runs.items():
        add(*_of_a_run(case, steps, run))
    add(checks.data_moments(case), checks.order(case))
    first = min(case.runs)
    add(*precision.add_noise(case), *precision.half_steps(case, max(case.runs)))
    add(*behaviour.determinism(case, first), *behaviour.predictions(case, first), *behaviour.ends(case))
    return [checks.worst(findings) for findings in by_check.values()]


def _of_a_run(case: Case, steps: int, run: Run) -> list[Finding]:
    return [
        checks.landing(case, steps, run),
        *checks.final_moments(case, steps, run),
        *checks.last_step(case, steps, run),
    ]


def _name(sampler: Any) -> str:
    return f"{sampler.__module__}.{sampler.__qualname__}" if hasattr(sampler, "__qualname__") else repr(sampler)


def _facts(case: Case, float32_state: bool) -> dict[str, Any]:
    sampler = case.sampler
    facts = {"T": len(case.data.abar), "steps": ", ".join(map(str, case.runs)), "claims": str(case.claim or "nothing")}
    facts["tolerances for"] = "float64" if case.eps < 1e-10 else "float32"
    facts["states"] = "computed in float32 or less" if float32_state else "computed in float64"
    if isinstance(sampler, SchedulerSampler):
        options = {**sampler.given, **sampler.step_options}
        facts["options"] = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
    return facts
