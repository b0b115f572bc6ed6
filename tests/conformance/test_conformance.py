"""The conformance kit finds planted faults, and passes what is right."""

import json
import math

import pytest
import table_scheduler
import torch
from table_scheduler import DDIM, DDPM, DPMSolverMultistep, DPMSolverMultistepSDE

from ddpm_fast import samplers, schedules
from ddpm_fast.app import cli
from ddpm_fast.conformance import CannotCheck, Claim, check
from ddpm_fast.conformance.adapters import SchedulerSampler
from ddpm_fast.conformance.gaussian import Gaussian, Network, reference
from ddpm_fast.conformance.measure import measure
from ddpm_fast.schedules import NoiseSchedule

RIGHT = {
    "ddpm": (DDPM, {"variance": "posterior"}),
    "ddim": (DDIM, {"eta": 0.0}),
    "dpmpp_2m": (DPMSolverMultistep, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepSDE, {}),
}


def by_table(sampler, change=lambda table: table, **options):
    """A sampler of this project through the plain interface."""

    def f(denoiser, x_T, abar, steps, generator):
        schedule = NoiseSchedule(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]]))
        table = change(samplers.make(sampler, schedule, "pred_x0", steps, **options))
        x, previous = x_T, torch.zeros_like(x_T)
        for k, t in enumerate(table.t):
            x_start = denoiser(x, t)
            following = table.A[k] * x + table.B[k] * x_start + table.C[k] * previous
            if table.sigma[k]:
                following += table.sigma[k] * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x, previous = following, x_start
        return x

    return f


def failed(report):
    return {finding.check for finding in report.failures}


@pytest.mark.parametrize("name", RIGHT)
def test_our_samplers_pass_as_schedulers(name):
    cls, _ = RIGHT[name]
    report = check(cls, steps=(10, 30))
    assert report.passed, report.markdown()
    assert report.facts["claims"].startswith(name)
    assert report.facts["tolerances for"] == "float64"
    assert {finding.status for finding in report.findings} == {"pass"}


@pytest.mark.parametrize("schedule", [schedules.make("cosine", 300), schedules.make("linear", 200)], ids=len)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, (_, options) in RIGHT.items()]
    + [("ddpm", {"variance": "beta"}), ("ddim", {"eta": 1.0})],
)
def test_our_samplers_pass_through_the_plain_interface(name, options, schedule):
    report = check(by_table(name, **options), schedule=schedule, claim=Claim(name, options), steps=(10, 30))
    assert report.passed, report.markdown()


def test_a_function_that_claims_nothing_is_held_against_the_data():
    report = check(by_table("dpmpp_2m"))
    assert report.passed, report.markdown()
    assert report["variance after K steps"].status == "not checked"
    assert report["moments of the data"].found < report["moments of the data"].tolerance / 10


SHORT = {"steps": (10, 30), "schedule": schedules.make("linear", 200)}
DTYPES = ("float32", "float16", "bfloat16")
FAULTS = {
    "WrongVariance": ("ddpm", {"variance after K steps", "noise of each step"}),
    "StepLeftOut": ("ddim", {"noise level at each step", "variance after K steps"}),
    "WrongSpacing": ("ddim", {"timesteps: spacing", "timesteps: first"}),
    "NoiseInTheLastStep": ("ddpm", {"last step: no noise added", "noise of each step"}),
    "HalfTable": ("ddim", {"schedule: alphas_cumprod"}),
    "FirstOrder": ("dpmpp_2m", {"order", "variance after K steps"}),
    "ExtrapolatesTooFar": ("dpmpp_2m", {"order", "variance after K steps"}),
    "WrongV": ("ddim", {"prediction_type v_prediction"}),
    "EndsAtTheFirstTimestep": ("ddim", {"last step: ends at abar = 1", "variance after K steps"}),
    "IgnoresTheList": ("ddim", {"noise level at each step", "variance after K steps"}),
    "HalfAddNoise": ("ddim", {"add_noise before set_timesteps", *(f"add_noise in {dtype}" for dtype in DTYPES)}),
    "LosesNoise": ("ddpm", {"steps in bfloat16"}),
    "IgnoresTheGenerator": ("ddpm", {"generator: same seed, same result", "generator: the only source of noise"}),
    "Clips": ("ddim", {"affine in x"}),
    "NotANumber": ("ddim", {"finite: all T steps"}),
}
ALONE = {"HalfAddNoise", "WrongV", "LosesNoise", "IgnoresTheGenerator", "Clips"}  # which fail nothing else


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    sampler, expected = FAULTS[fault]
    report = check(getattr(table_scheduler, fault), claim=Claim(sampler, RIGHT[sampler][1]), **SHORT)
    found = failed(report)
    assert found == expected if fault in ALONE else found >= expected, report.markdown()


def test_the_reference_has_the_moments_of_a_long_sample():
    """Independently of rows: DDPM's own loop, 50,000 samples, five standard errors."""
    schedule = schedules.make("linear", 50)
    data = Gaussian(schedule.alphas_cumprod)
    t = list(range(49, -1, -1))
    exact = reference(data, data.levels(t), "ddpm", {"variance": "posterior"}, "pred_noise", 2.2e-16)
    n = 50_000
    x = torch.randn(n, len(data), dtype=torch.float64)
    for i in t:
        abar, last = schedule.alphas_cumprod[i], schedule.alphas_cumprod_prev[i]
        x_start = data.mean + data.gain(abar) * (x - abar.sqrt() * data.mean)
        mean = schedule.posterior_mean_coef1[i] * x_start + schedule.posterior_mean_coef2[i] * x
        x = mean + (schedule.betas[i] * (1 - last) / (1 - abar)).sqrt() * torch.randn_like(x)
    bound = 5 * exact.variance.sqrt() / math.sqrt(n)
    assert ((x.mean(0) - exact.mean).abs() <= bound + 1e-12).all()
    assert ((x.var(0) - exact.variance).abs() <= 5 * exact.variance * math.sqrt(2 / n) + 1e-12).all()


def test_the_map_that_is_measured_gives_the_samples_of_a_real_run():
    """x_0 = mean + gain x_T + sum of noise z, with the numbers that the generator draws."""
    schedule = schedules.make("linear", 1000)
    sampler, data = SchedulerSampler(DPMSolverMultistepSDE, schedule), Gaussian(schedule.alphas_cumprod)
    run = measure(sampler, data, 10)
    x_T = torch.randn(5, len(data), 1, 1, dtype=torch.float64)
    found = sampler.run(Network(data, sampler.objective), x_T, 10, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    z = torch.stack([torch.randn(x_T.shape, generator=generator, dtype=torch.float64) for _ in run.drawn])[..., 0, 0]
    expected = run.mean[-1] + run.gain[-1] * x_T[..., 0, 0] + (run.noise[-1][:, None] * z).sum(0)
    torch.testing.assert_close(found[..., 0, 0], expected, rtol=0, atol=1e-12)


def test_a_draw_that_is_repeated_counts_once():
    """As by a Brownian tree, which makes the noise of an interval again from its seed."""

    class Repeats(DDPM):
        def noise(self, x, generator):
            return super().noise(x, torch.Generator().manual_seed(5))

    schedule = schedules.make("linear", 1000)
    sampler, data = SchedulerSampler(Repeats, schedule), Gaussian(schedule.alphas_cumprod)
    run = measure(sampler, data, 10)
    assert run.noise.shape[1] == 1
    independent = measure(SchedulerSampler(DDPM, schedule), data, 10)
    torch.testing.assert_close(run.noise[-1].sum(0), independent.noise[-1].sum(0), rtol=1e-12, atol=1e-14)


def test_noise_that_cannot_be_seen_is_named():
    def hidden(denoiser, x_T, abar, steps, generator):
        seed = generator.initial_seed()
        return by_table("ddim")(denoiser, x_T, abar, steps, generator) + seed

    assert "generator: draws are seen" in failed(check(hidden))


def test_what_cannot_be_checked_is_an_error():
    with pytest.raises(CannotCheck, match="int has no set_timesteps and no step"):
        check(int)
    with pytest.raises(CannotCheck, match="must be a class or a function, got an object of DDIM"):
        check(DDIM(3, [0.1, 0.2, 0.3]))
    with pytest.raises(CannotCheck, match="DDIM has no argument 'eta'; it takes num_train_timesteps, trained_betas"):
        check(DDIM, options={"eta": 1.0})
    with pytest.raises(CannotCheck, match=r"steps must be integers of at least 2, got \[1\]"):
        check(DDIM, steps=[1])
    with pytest.raises(ValueError, match="unknown claim 'euler'"):
        Claim("euler")
    with pytest.raises(ValueError, match="sampler 'ddpm' has no argument 'eta'; it takes variance"):
        Claim("ddpm", {"eta": 1.0})
    with pytest.raises(ValueError, match="predicts no variance"):
        Claim("ddpm", {"variance": "learned_range"})
    with pytest.raises(CannotCheck, match=r"from x_T of shape \(4, 6, 1, 1\) the sampler returned \(1, 6, 1, 1\)"):
        check(lambda denoiser, x_T, abar, steps, generator: denoiser(x_T, 5)[:1])


def test_the_command_prints_a_table_and_exits_with_1_for_a_fault(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["check", "table_scheduler:DDIM", "--steps", "10", "--json", "report.json"])
    told = capsys.readouterr().out
    assert told.startswith("## table_scheduler.DDIM\n\nT 1000; steps 10; claims ddim(eta = 0.0)")
    assert "| variance after K steps | pass | 10 |" in told
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert {finding["status"] for finding in report["findings"]} == {"pass"}

    with pytest.raises(SystemExit) as raised:
        cli.main(["check", "table_scheduler:WrongVariance", "--steps", "10", "--claim", "ddpm,variance=posterior"])
    assert raised.value.code == 1
    assert "| noise of each step | fail | 10 |" in capsys.readouterr().out
    cli.main(["check", "table_scheduler:WrongVariance", "--steps", "10", "--claim", "ddpm,variance=beta"])

    with pytest.raises(SystemExit):
        cli.main(["check", "table_scheduler:NotANumber", "--steps", "10", "--set", "timestep_spacing=leading"])
    told = capsys.readouterr().out
    assert "options timestep_spacing=leading" in told
    assert "| timesteps: spacing | fail |" in told

    (tmp_path / "mine.py").write_text("def f(denoiser, x_T, abar, steps, generator):\n    return denoiser(x_T, 999)\n")
    with pytest.raises(SystemExit) as raised:
        cli.main(["check", "mine:f"])
    assert raised.value.code == 1
    for name, message in [
        ("mine", "give MODULE:CLASS"),
        ("mine:g", "mine has nothing of the name 'g'"),
        ("nowhere:f", "there is no module 'nowhere'"),
        ("json:JSONDecoder", "JSONDecoder has no set_timesteps and no step"),
    ]:
        with pytest.raises(SystemExit) as raised:
            cli.main(["check", name])
        assert message in str(raised.value.code)
