"""The checks of how a sampler behaves: with a generator, with other predictions, and at the ends of the schedule."""

__all__ = ["determinism", "ends", "predictions"]

import math

import torch
from torch import Tensor

from .adapters import PREDICTIONS, FunctionSampler, SchedulerSampler
from .checks import Case, compare
from .gaussian import Gaussian, Network, rounding
from .measure import measure
from .report import Finding

BATCH = 3  # images of a real run


def determinism(case: Case, steps: int) -> list[Finding]:
    """The same generator must give the same bits, and PyTorch's own generator is to be left alone."""
    before = torch.get_rng_state()
    first, drew = _sample(case, steps, 0)
    second, _ = _sample(case, steps, 0)
    other, _ = _sample(case, steps, 1)
    torch.set_rng_state(before)
    differ = int((first != second).sum())
    findings = [
        compare(
            "generator: same seed, same result",
            differ,
            0,
            0,
            steps=steps,
            detail="numbers that differ in two runs with the same x_T and the same seed",
        ),
        compare(
            "generator: the only source of noise",
            int(drew),
            0,
            0,
            steps=steps,
            detail="1 if a run that is given a generator draws from PyTorch's default one",
        ),
    ]
    if not case.runs[steps].drawn and not differ and not first.equal(other):
        detail = "two seeds give two results, but no noise is drawn by torch.randn, randn_like, normal or normal_"
        findings.append(Finding("generator: draws are seen", "fail", steps=steps, detail=detail))
    return findings


def _sample(case: Case, steps: int, seed: int) -> tuple[Tensor, bool]:
    """A real run, and whether it has drawn from PyTorch's default generator."""
    x_T = torch.randn(BATCH, len(case.data), 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = torch.get_rng_state()
    with torch.no_grad():
        result = case.sampler.run(
            Network(case.data, case.sampler.objective), x_T, steps, torch.Generator().manual_seed(seed)
        )
    return result, not torch.get_rng_state().equal(before)


def predictions(case: Case, steps: int) -> list[Finding]:
    """The same network as eps, x_0 and v must give the same map from x_T to x_0."""
    sampler, base = case.sampler, case.runs[steps]
    if isinstance(sampler, FunctionSampler) or not sampler.takes("prediction_type"):
        return []
    findings = []
    tolerance = 2 * rounding(case.data.levels(base.t), case.eps)[-1].item()
    for name, objective in PREDICTIONS.items():
        if name == sampler.said("prediction_type"):
            continue
        check = f"prediction_type {name}"
        try:
            run = measure(sampler.changed(prediction_type=name), case.data, steps, objective)
        except (NotImplementedError, ValueError, KeyError) as error:
            findings.append(Finding(check, "not checked", detail=f"not offered: {error}"))
            continue
        parts = [run.gain[-1] - base.gain[-1], run.mean[-1] - base.mean[-1]]
        if run.noise.shape == base.noise.shape:
            parts.append((run.noise[-1] - base.noise[-1]).flatten())
        error = torch.cat(parts).abs().nan_to_num(nan=math.inf).max().item()
        detail = f"largest difference from prediction_type {sampler.said('prediction_type')!r}"
        findings.append(compare(check, error, 0.0, tolerance, steps=steps, detail=detail))
    return findings


def ends(case: Case) -> list[Finding]:
    """One step, all T steps, and a schedule without signal at its end, where the class offers it."""
    findings = [_finite(case, steps) for steps in (1, len(case.data.abar))]
    sampler = case.sampler
    if isinstance(sampler, SchedulerSampler) and sampler.takes("rescale_betas_zero_snr"):
        findings.append(_zero_snr(sampler))
    return findings


def _finite(case: Case, steps: int) -> Finding:
    check = "finite: one step" if steps == 1 else "finite: all T steps"
    detail = "values of the result that are NaN or inf"
    try:
        result, _ = _sample(case, steps, 0)
    except Exception as error:  # whatever the user's class raises is a finding
        return Finding(check, "fail", steps=steps, detail=f"raises {type(error).__name__}: {error}")
    return compare(check, int((~result.isfinite()).sum()), 0, 0, steps=steps, detail=detail)


def _zero_snr(sampler: SchedulerSampler) -> Finding:
    """`rescale_betas_zero_snr` with v, which x_0 can be found from where there is no signal (Lin et al., 2023)."""
    check, steps = "zero terminal SNR", 10
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    if sampler.takes("timestep_spacing"):
        options["timestep_spacing"] = "trailing"
    if not sampler.takes_betas:
        return Finding(check, "not checked", detail="the schedule is given by options of the class")
    rescaled = sampler.changed(**options)
    abar = rescaled.table()
    if abar is None:
        return Finding(check, "not checked", detail="there is no alphas_cumprod to read the levels from")
    if abar[-1] > torch.finfo(torch.float32).eps:
        return compare(check, abar[-1].item(), 0.0, torch.finfo(torch.float32).eps, detail="alphas_cumprod at T - 1")
    case = Case(rescaled, Gaussian(abar.to(torch.float64)), None, 0.0)
    result, _ = _sample(case, steps, 0)
    wrong = int((~result.isfinite()).sum())
    return compare(check, wrong, 0, 0, steps=steps, detail="values of the result that are NaN or inf, predicting v")
