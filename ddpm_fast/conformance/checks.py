"""The checks of what a sampler computes: where it goes, what it returns, and how fast it converges."""

__all__ = [
    "Case",
    "affine",
    "compare",
    "data_moments",
    "final_moments",
    "landing",
    "last_step",
    "order",
    "own_table",
    "table_error",
    "table_tolerance",
    "visited",
    "worst",
]

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import samplers, schedules
from .adapters import Claim, FunctionSampler, SchedulerSampler
from .gaussian import ROUNDINGS, Gaussian, reference, rounding
from .measure import Run, measure
from .report import Finding

ORDER_TIMESTEPS = 4000  # T of the schedule on which the order is measured: fine enough for the steps below
ORDER_STEPS = (20, 40, 80)
ORDER_TOLERANCE = 0.25  # a slope below the order by less is rounded to the order


@dataclass
class Case:
    """A sampler, the data, and its runs with each number of steps.

    claim: the published algorithm it should be, or None.
    eps: the precision of its tables and states.
    """

    sampler: SchedulerSampler | FunctionSampler
    data: Gaussian
    claim: Claim | None
    eps: float
    runs: dict[int, Run] = field(default_factory=dict)

    def evaluations(self, steps: int) -> int:
        """How often the network is called in K steps; diffusers' `order` is the number of calls in a step."""
        order = getattr(self.sampler.cls, "order", 1) if isinstance(self.sampler, SchedulerSampler) else 1
        return steps * order - (order - 1)


def worst(findings: Iterable[Finding]) -> Finding:
    """The finding to report of the same check with several K: a failure, then the one nearest to its tolerance."""
    rank = {"fail": 2, "pass": 1}
    return max(findings, key=lambda finding: (rank.get(finding.status, 0), finding.excess))


def compare(check: str, found: float, expected: float, tolerance: float, **more) -> Finding:
    close = abs(found - expected) <= tolerance  # false for NaN
    return Finding(check, "pass" if close else "fail", found, expected, tolerance, **more)


def visited(case: Case, steps: int, run: Run) -> list[Finding]:
    """Which timesteps are visited: how many, from which one on, without repetition, and spaced as the class says."""
    t, last = np.array(run.t), len(case.data.abar) - 1
    findings = [
        compare("timesteps: number", len(t), case.evaluations(steps), 0, steps=steps),
        compare("timesteps: first", float(t[0]), float(last), 0, steps=steps, detail="T - 1, where x_T is noise"),
    ]
    wrong = (np.diff(t) >= 0).sum() + (t < 0).sum() + (t > last).sum()
    repeated = len(t) - len(np.unique(t))
    detail = f"timesteps that do not fall or lie outside 0 ... {last}; {repeated} are repeated"
    findings.append(compare("timesteps: falling", int(wrong), 0, 0, steps=steps, detail=detail))
    said = _said_spacing(case)
    if said and not wrong and case.evaluations(steps) == steps:
        offset = case.sampler.said("steps_offset", 0) if said == "leading" else 0
        forms = [form + offset for form in _spacings(said, last + 1, steps) if len(form) == len(t)]
        distance = min((np.abs(t - form).max() for form in forms), default=math.inf)
        detail = f"largest distance from {said!r} of Lin et al. (2023), table 2"
        findings.append(compare("timesteps: spacing", float(distance), 0.0, 0.0, steps=steps, detail=detail))
    return findings


def _said_spacing(case: Case) -> str | None:
    """The `timestep_spacing` of a class, unless it is told to space its timesteps by their noise."""
    if isinstance(case.sampler, FunctionSampler):
        return None
    others = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    said = case.sampler.said("timestep_spacing")
    known = said in ("leading", "trailing", "linspace")
    return said if known and not any(case.sampler.said(other, False) for other in others) else None


def _spacings(said: str, T: int, K: int) -> list[np.ndarray]:
    """Lin et al. (2023), table 2, counted from 0: K timesteps, or the first K of K + 1 whose last stands for data."""
    if said == "trailing":
        return [np.round(np.arange(T, 0, -T / K))[:K] - 1]
    if said == "leading":
        return [np.arange(0, K)[::-1] * (T // K), np.arange(1, K + 1)[::-1] * (T // (K + 1))]
    return [np.round(np.linspace(0, T - 1, K))[::-1], np.round(np.linspace(0, T - 1, K + 1))[:0:-1]]


def affine(case: Case, steps: int, run: Run) -> Finding:
    """Whether the run is an affine map of finite numbers, without which nothing else can be said about it."""
    bound = 4 * rounding(case.data.levels(run.t), case.eps)[-1].item()
    detail = "how far from affine in x_T the states are" if run.finite else "the states hold NaN or inf"
    return compare("affine in x", run.bend.max().item(), 0.0, bound, steps=steps, detail=detail)


def landing(case: Case, steps: int, run: Run) -> Finding:
    """Whether the state has, at each timestep, the noise level at which the network is asked about it.

    For data that is a single point m, every published step goes from a m + noise to a' m + noise', with noise' / noise
    the same for all noise: the share of m in the state is a'.
    """
    data, levels = case.data, case.data.levels(run.t)
    point, m = Gaussian.POINT, data.mean[Gaussian.POINT]
    a = levels.sqrt()
    rest = run.gain[:-1, point] / run.gain[0, point]
    found = run.mean[:-1, point] / m + rest * (a[0] - run.mean[0, point] / m)
    tolerance = rounding(levels, case.eps)[:-1] / m
    excess = ((found - a).abs() / tolerance).nan_to_num(nan=math.inf)
    k = int(excess.argmax())
    roots = data.abar.sqrt().flip(0)
    nearest = len(roots) - 1 - int(torch.searchsorted(roots, found[k].clamp(roots[0], 1)).clamp(max=len(roots) - 1))
    detail = f"sqrt(abar) of the state at t = {run.t[k]:g}" + (
        "" if k == 0 else f", step {k} from t = {run.t[k - 1]:g}"
    )
    if excess[k] > 1:
        detail += f"; it is that of about t = {nearest}"
    figures = found[k].item(), a[k].item(), tolerance[k].item()
    return compare("noise level at each step", *figures, steps=steps, detail=detail)


def last_step(case: Case, steps: int, run: Run) -> list[Finding]:
    """Whether the run ends at abar = 1 and without noise: data that is a single point must be returned as it is."""
    data, point = case.data, Gaussian.POINT
    level = data.level(run.t[-1])
    tolerance = ROUNDINGS * case.eps * (1 + ((1 - level) / level).sqrt().item())
    late = [j for j, calls in enumerate(run.drawn) if calls >= len(run.t)]
    early = [j for j, calls in enumerate(run.drawn) if calls < len(run.t)]
    added = run.noise[-1, late, point].square().sum().sqrt().item()
    left = (run.gain[-1, point] ** 2 + run.noise[-1, early, point].square().sum()).sqrt().item()
    text = "standard deviation of the noise that the last step adds"
    ends = "standard deviation of the noise that is left in data that is a single point"
    if tolerance < left < 1:
        ends += f": the run ends at abar = {1 - left**2:.6g}"
    return [
        compare("last step: no noise added", added, 0.0, tolerance, steps=steps, detail=text),
        compare("last step: ends at abar = 1", left, 0.0, tolerance, steps=steps, detail=ends),
    ]


def final_moments(case: Case, steps: int, run: Run) -> list[Finding]:
    """Mean and variance of the result against those of the published algorithm, by its rows."""
    checks = ("mean after K steps", "variance after K steps", "noise of each step")
    if case.claim is None:
        return [Finding(check, "not checked", detail="no published algorithm is claimed") for check in checks]
    levels = case.data.levels(run.t)
    if (levels.diff() <= 0).any():
        return [Finding(check, "not checked", detail="the timesteps do not fall") for check in checks]
    claim, options = case.claim, case.claim.options
    exact = reference(case.data, levels, claim.sampler, options, case.sampler.objective, case.eps)
    spread = Gaussian.SPREAD

    def of(check: str, found, expected, tolerance, names) -> Finding:
        i = int(((found - expected).abs() / tolerance).nan_to_num(nan=math.inf).argmax())
        figures = found[i].item(), expected[i].item(), tolerance[i].item()
        return compare(check, *figures, steps=steps, detail=f"{names(i)}, of {claim}")

    def component(i: int) -> str:
        return f"data N({case.data.mean[i]:g}, {case.data.variance[i]:g})"

    mean, variance = run.mean[-1, spread], run.variance[-1, spread]
    return [
        of(checks[0], mean, exact.mean[spread], exact.mean_tolerance[spread], component),
        of(checks[1], variance, exact.variance[spread], exact.variance_tolerance[spread], component),
        of(checks[2], run.step_noise(), exact.sigma, exact.sigma_tolerance, lambda k: f"sigma at t = {run.t[k]:g}"),
    ]


def data_moments(case: Case) -> Finding:
    """Mean and variance of the result against the data's own, with the largest number of steps.

    No finite number of steps returns them exactly. The measure is DDIM, the solver of first order, with as many
    evaluations of the network evenly strided: with eta = 1 where noise is drawn. A sampler may be off by twice as much.
    """
    data, T, steps = case.data, len(case.data.abar), max(case.runs)
    run = case.runs[steps]
    t = samplers.strided_timesteps(T, min(case.evaluations(steps), T))
    ddim = reference(data, data.abar[t], "ddim", {"eta": float(bool(run.drawn))}, "pred_x0", case.eps)

    def error(mean: torch.Tensor, variance: torch.Tensor) -> float:
        """In standard deviations of the data, and as a share of its variance: the larger."""
        off = (mean - data.mean).abs() / data.variance.sqrt(), (variance / data.variance - 1).abs()
        return torch.cat([part[Gaussian.SPREAD] for part in off]).max().item()

    errors = {k: error(case.runs[k].mean[-1], case.runs[k].variance[-1]) for k in sorted(case.runs)}
    best = error(ddim.mean, ddim.variance)
    listed = ", ".join(f"{value:.2g} with {k}" for k, value in errors.items())
    detail = f"largest error of a mean, in deviations, or of a variance, relative: {listed}; at most twice DDIM's"
    return compare("moments of the data", errors[steps], 0.0, 2 * best, steps=steps, detail=detail)


def order(case: Case) -> Finding:
    """The slope of the error in the number of steps, from T - 1 down to about T / 5.

    Without noise, the error is that of the map from x_T to x, against the probability flow; with noise, that of the
    variance of x, from the variance that x_T has. The last steps, to no noise, are long in any schedule, and would hide
    the order. Errors below 100 eps are left out.
    """
    sampler = case.sampler
    fine = schedules.make("linear", ORDER_TIMESTEPS)
    if isinstance(sampler, FunctionSampler) or sampler.takes_betas:
        sampler = sampler.changed(fine)
    data = Gaussian(own_table(sampler))
    counts, errors = [], []
    for steps in ORDER_STEPS:
        run = measure(sampler, data, steps)
        levels = data.levels(run.t)
        k = int((torch.tensor(run.t) - len(data.abar) / 5).abs().argmin())
        start, end, spread = levels[0], levels[k], Gaussian.CENTRED
        if run.drawn:
            variance = run.gain[k] ** 2 * data.marginal(start) + run.noise[k].square().sum(0)
            error = (variance / data.marginal(end) - 1)[spread]
        else:
            error = (run.gain[k] / run.gain[0] / data.flow(start, end) - 1)[spread]
        size = error.square().mean().sqrt().item()
        if size > 100 * case.eps or not math.isfinite(size):
            counts.append(k)
            errors.append(size)
    expected = _order_of(case)
    if len(errors) < 2:
        return Finding("order", "not checked", detail=f"the errors are of the size of rounding: {errors}")
    slope = -float(np.polyfit(np.log(counts), np.log(errors), 1)[0]) if all(map(math.isfinite, errors)) else math.nan
    what = "of the variance" if run.drawn else "of the map from x_T to x"
    listed = ", ".join(f"{e:.2g} in {k}" for k, e in zip(counts, errors, strict=True))
    detail = f"slope of the error {what} at T / 5, with T = {len(data.abar)}: {listed} steps"
    status = "pass" if slope >= expected - ORDER_TOLERANCE else "fail"  # a higher order is no fault
    return Finding("order", status, slope, expected, ORDER_TOLERANCE, detail=detail)


def _order_of(case: Case) -> int:
    """The order that the algorithm should have in its intermediate states; with noise, in the variance, at least 1.

    Solvers of order 3 begin with steps of lower order, or take them in between: second order is sure.
    """
    if case.claim is not None:
        return 2 if case.claim.sampler == "dpmpp_2m" else 1
    if isinstance(case.sampler, FunctionSampler):
        return 1
    noisy = "sde" in f"{case.sampler.cls.__name__} {case.sampler.said('algorithm_type', '')}".lower()
    return 1 if noisy else min(2, int(case.sampler.said("solver_order", 1)))


def own_table(sampler: SchedulerSampler | FunctionSampler) -> torch.Tensor:
    """abar in float64: of the class's own table if it is one, so that its rounding is no error of the steps."""
    exact = sampler.schedule.alphas_cumprod
    table = sampler.table() if isinstance(sampler, SchedulerSampler) else None
    if table is None or not table.is_floating_point():
        return exact
    own = table.to(torch.float64)
    return own if table_error(own, exact) <= table_tolerance(table.dtype, len(exact)) else exact


def table_error(own: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative error of abar."""
    return (own / exact - 1).abs().max().item()


def table_tolerance(dtype: torch.dtype, T: int) -> float:
    """T products of factors, each rounded to float32 or better."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return (T + 1) * eps
