"""What the kit finds in diffusers, and what it finds no fault with: pip install ".[compat]"."""

import warnings

import pytest

from ddpm_fast.conformance import check

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = (10, 30)
HALF_NOISE = {"add_noise in float16", "add_noise in bfloat16"}
LANDING = {"noise level at each step", "mean after K steps", "variance after K steps"}
FRESH = {"add_noise before set_timesteps"}
LAST_NOISE = {"last step: no noise added", "noise of each step", "variance after K steps"}
TRAILING = {"timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", exc_type=ImportError)


@pytest.mark.parametrize(
    ("name", "options", "claims", "faults"),
    [
        ("DDPMScheduler", {}, "ddpm(variance = posterior)", {"timesteps: first"} | HALF_NOISE),
        ("DDPMScheduler", TRAILING, "ddpm(variance = posterior)", HALF_NOISE),
        (
            "DDPMScheduler",
            TRAILING | {"variance_type": "fixed_large"},
            "ddpm(variance = beta)",
            LAST_NOISE | HALF_NOISE,
        ),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "ddpm(variance = beta)", {"affine in x"}),
        ("DDIMScheduler", {}, "ddim(eta = 0.0)", {"timesteps: first"} | HALF_NOISE),
        ("DDIMScheduler", TRAILING, "ddim(eta = 0.0)", LANDING | HALF_NOISE),
        ("DPMSolverMultistepScheduler", TRAILING, "dpmpp_2m", FRESH),
        ("DPMSolverMultistepScheduler", TRAILING | {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", FRESH),
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", FRESH | {"finite: all T steps"}),
        ("UniPCMultistepScheduler", TRAILING, "nothing", FRESH),
    ],
)
def test_the_faults_of_diffusers_are_found_and_no_others(diffusers, name, options, claims, faults):
    report = check(getattr(diffusers, name), options=options, steps=STEPS)
    found = {finding.check for finding in report.failures}
    assert report.facts["claims"] == claims
    assert faults <= found if "affine in x" in faults else found == faults, report.markdown()
