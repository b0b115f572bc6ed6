#!/usr/bin/env python3
"""Runs the conformance kit on the schedulers of diffusers and writes the table of docs/conformance.md.

pip install ".[compat]" scipy torchsde
"""

import sys
import warnings
from pathlib import Path

from ddpm_fast.conformance import CannotCheck, check
from ddpm_fast.conformance.report import Finding

PAGE = Path(__file__).resolve().parents[1] / "docs/conformance.md"
BEGIN, END = "<!-- table: written by tools/conformance_table.py -->\n", "<!-- end of table -->\n"

TRAILING = {"timestep_spacing": "trailing"}
# A class, its options, and the options of its step.
SCHEDULERS: list[tuple[str, dict, dict]] = [
    ("DDPMScheduler", {}, {}),
    *(("DDPMScheduler", {"variance_type": kind, **TRAILING}, {}) for kind in ("fixed_small", "fixed_small_log")),
    *(("DDPMScheduler", {"variance_type": kind, **TRAILING}, {}) for kind in ("fixed_large", "fixed_large_log")),
    ("DDPMScheduler", {"timestep_spacing": "linspace"}, {}),
    ("DDPMParallelScheduler", TRAILING, {}),
    ("DDIMScheduler", {}, {}),
    ("DDIMScheduler", TRAILING, {}),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, {}),
    ("DDIMScheduler", {**TRAILING, "set_alpha_to_one": False}, {}),
    ("DDIMScheduler", TRAILING, {"eta": 1.0}),
    ("DDIMParallelScheduler", TRAILING, {}),
    ("DDIMInverseScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", TRAILING, {}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", {**TRAILING, "solver_type": "heun"}, {}),
    ("DPMSolverMultistepScheduler", {**TRAILING, "solver_order": 1}, {}),
    ("DPMSolverMultistepScheduler", {**TRAILING, "solver_order": 3}, {}),
    ("DPMSolverMultistepScheduler", {**TRAILING, "algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverMultistepScheduler", {**TRAILING, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
    *(
        ("DPMSolverMultistepScheduler", {**TRAILING, "algorithm_type": kind, "final_sigmas_type": "sigma_min"}, {})
        for kind in ("dpmsolver", "sde-dpmsolver")
    ),
    ("DPMSolverSinglestepScheduler", {}, {}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, {}),
    ("DPMSolverSDEScheduler", {**TRAILING, "noise_sampler_seed": 0}, {}),
    ("DEISMultistepScheduler", TRAILING, {}),
    ("UniPCMultistepScheduler", TRAILING, {}),
    ("CosineDPMSolverMultistepScheduler", {}, {}),
]


def main() -> None:
    warnings.simplefilter("ignore")  # theirs, of options that will go
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    lines = [
        f"diffusers {diffusers.__version__}.",
        "",
        "| scheduler | options | passed | what fails |",
        "| --- | --- | --- | --- |",
    ]
    for name, options, step_options in SCHEDULERS:
        said = ", ".join(f"`{key}={value}`" for key, value in {**options, **step_options}.items()) or "defaults"
        try:
            report = check(getattr(diffusers, name), options=options, step_options=step_options)
            checked = [finding for finding in report.findings if finding.status != "not checked"]
            passed = f"{len(checked) - len(report.failures)} of {len(checked)}"
            fails = "<br>".join(map(failure, report.failures)) or "nothing"
        except (CannotCheck, ImportError) as error:
            passed, fails = "", f"not checked: {str(error).strip().splitlines()[0]}"
        lines.append(f"| {name} | {said} | {passed} | {fails} |")
        print(lines[-1])
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after)


def failure(finding: Finding) -> str:
    """The check and its figures; in words where they say more."""
    text = f"**{finding.check}**" + (f" (K = {finding.steps})" if finding.steps is not None else "")
    if finding.found is None or "no noise at all" in finding.detail:
        return f"{text}: {finding.detail.split('; ')[-1]}"
    figures = [
        f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in (finding.found, finding.expected)
    ]
    return f"{text}: {figures[0]}, not {figures[1]}"


if __name__ == "__main__":
    sys.exit(main())
