"""Samplers that are fitted to a network: nearer to the teacher, never farther, and for this network alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_gaussian import COVARIANCE, MEAN
from test_gaussian import make as make_gaussian
from training_runs import finished, without_curve  # noqa: F401  (fixtures)

from ddpm_fast import GaussianDiffusion, fit_sampler, fitting
from ddpm_fast.app import cli
from ddpm_fast.noise import FITTING, VALIDATION, gaussian
from ddpm_fast.samplers import FittedTable, StepTable
from ddpm_fast.training import trainer
from ddpm_fast.training.run import RunError, load_run


def probability_flow(schedule, x_T):
    """Where the flow ends, exactly: (S + e^2 I)^(-1/2) (x / a - mu) with e = s / a does not change along it."""
    eigenvalues, vectors = torch.linalg.eigh(COVARIANCE)
    shrink = (eigenvalues / (eigenvalues + 1 / schedule.snr[-1])).sqrt()
    return MEAN + (x_T / schedule.sqrt_alphas_cumprod[-1] - MEAN) @ (vectors * shrink) @ vectors.T


@pytest.mark.parametrize(("steps", "objective"), [(2, "pred_noise"), (3, "pred_v"), (4, "pred_x0"), (5, "pred_v")])
def test_a_fitted_sampler_is_nearer_to_the_exact_flow_than_the_solver_it_began_with(steps, objective, monkeypatch):
    monkeypatch.setattr(fitting, "UPDATES", 60)  # it takes no more here
    diffusion = make_gaussian("cosine", 1000, objective, "posterior")
    x_T = gaussian((500, 3), seed=5, dtype=torch.float64)
    exact = probability_flow(diffusion.schedule, x_T)

    def error(**sampler):
        return (diffusion.sample(500, noise=x_T, **sampler) - exact).square().mean().item()

    table = fit_sampler(diffusion, steps, n=128, seed=0)
    assert len(table) == steps
    solver = error(sampler="dpmpp_2m", steps=steps)
    assert error(sampler=table) < solver / 4
    assert table.distance < table.start_distance / 4
    assert not table.sigma.any()
    assert (table.t.diff() < 0).all()


@pytest.fixture(scope="module")
def small():
    """A diffusion of vectors, and a sampler fitted to it in a few updates."""
    diffusion = make_gaussian("cosine", 100, "pred_v", "posterior")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "UPDATES", 20)
        return diffusion, fit_sampler(diffusion, 3, n=16, seed=1)


@pytest.fixture
def few_updates(monkeypatch):
    monkeypatch.setattr(fitting, "UPDATES", 20)


def same(one, other):
    return torch.equal(one.t, other.t) and torch.equal(one.rows, other.rows)


@pytest.mark.usefixtures("few_updates")
def test_the_same_seed_gives_the_same_table(small):
    diffusion, table = small
    torch.manual_seed(7)  # PyTorch's own generator has no part in it
    again = fit_sampler(diffusion, 3, n=16, seed=1)
    assert same(again, table)
    assert (again.fitted_to, again.distance) == (table.fitted_to, table.distance)
    assert not same(fit_sampler(diffusion, 3, n=16, seed=2), table)


def test_noise_that_is_fitted_held_out_and_sampled_is_not_the_same():
    draws = [gaussian((4, 3), seed=0, stream=stream) for stream in (0, 1, FITTING, VALIDATION)]
    for i, draw in enumerate(draws):
        assert all((draw - other).abs().min() > 0 for other in draws[:i])


@pytest.mark.parametrize("rates", [{"LR": 1e3}, {"LR_TIMESTEPS": 10.0}, {"LR": float("inf")}])
@pytest.mark.usefixtures("few_updates")
def test_a_fit_that_goes_wrong_returns_the_best_table_that_it_has_seen(monkeypatch, rates):
    """Measured again here, on the noise that was held out."""
    diffusion = make_gaussian("cosine", 100, "pred_v", "posterior")
    for name, rate in rates.items():
        monkeypatch.setattr(fitting, name, rate)
    table = fit_sampler(diffusion, 3, n=16, seed=4)
    assert table.distance <= table.start_distance
    x_T = gaussian((fitting.HELD_OUT, 3), seed=4, stream=VALIDATION, dtype=torch.float64)
    teacher = diffusion.sample(len(x_T), sampler="dpmpp_2m", steps=fitting.TEACHER_STEPS, noise=x_T)
    for sampler, distance in (
        ({"sampler": table}, table.distance),
        ({"sampler": "dpmpp_2m", "steps": 3}, table.start_distance),
    ):
        found = (diffusion.sample(len(x_T), noise=x_T, **sampler) - teacher).square().mean().item()
        assert found == pytest.approx(distance, rel=1e-9)


# What is kept, and for whom


@pytest.mark.parametrize("kind", ["fitted", "plain", "of a learned variance"])
def test_json_gives_back_every_bit(small, kind):
    _, table = small
    if kind != "fitted":
        columns = {name: getattr(table, name) for name in ["t", "u", "w", "A", "B", "C", "sigma"]}
        bounds = torch.rand(3, 2, dtype=torch.float64) if kind == "of a learned variance" else None
        table = StepTable(**columns, log_bounds=bounds)
    again = type(table).from_json(table.to_json())
    assert again.t.dtype == torch.int64
    assert same(again, table)
    assert again.to_json() == table.to_json()
    if kind == "fitted":
        for name in ("fitted_to", "start_distance", "distance"):
            assert getattr(again, name) == getattr(table, name)


def changed(table, **changes):
    """The JSON of a table with some of its values replaced; of its columns by `steps`."""
    found = json.loads(table.to_json())
    found["steps"] |= changes.pop("steps", {})
    return json.dumps(found | changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: "", "not JSON"),
        (lambda table: table.to_json()[:-40], "not JSON"),
        (lambda table: "[" * 100_000, "not JSON"),
        (lambda table: "[1]", "a JSON object, got list"),
        (lambda table: table.to_json().replace('"sigma"', '"sigmas"'), "sigma is missing or unknown"),
        (lambda table: changed(table, steps={"A": [1.0]}), "as many finite numbers in A"),
        (lambda table: changed(table, steps={"A": [1.0, float("nan"), 2.0]}), "as many finite numbers in A"),
        (lambda table: changed(table, steps={"A": [1.0, "2", 2.0]}), "A must be a list of numbers"),
        (lambda table: changed(table, steps={"B": 3.0}), "B must be a list of numbers"),
        (lambda table: changed(table, steps={"t": [9.5, 4.0, 1.0]}), "t must be a list of integers"),
        (lambda table: changed(table, steps={"t": [True, False, True]}), "t must be a list of integers"),
        (lambda table: changed(table, steps={"t": [2**70, 4, 1]}), "t cannot be a tensor"),
        (lambda table: changed(table, steps={"t": [100, 4, 1]}), r"timesteps in \[0, 100\)"),
        (lambda table: changed(table, steps={"t": [9, 4, -1]}), r"timesteps in \[0, 100\)"),
        (lambda table: changed(table, steps={"t": [4, 9, 1]}), r"falling timesteps in \[0, 100\)"),
        (
            lambda table: changed(table, steps={name: [] for name in ("t", "u", "w", "A", "B", "C", "sigma")}),
            "timesteps",
        ),
        (lambda table: changed(table, format=2), "format must be 1, got 2"),
        (lambda table: changed(table, more=1), "more is missing or unknown"),
        (lambda table: changed(table, fitted_to={}), "fitted_to must be an object with timesteps"),
        (lambda table: changed(table, fitted_to=dict(table.fitted_to) | {"betas": 3}), "fitted_to.betas cannot be 3"),
        (lambda table: changed(table, distance=-1), "distance must be a finite number of at least 0, got -1"),
    ],
)
def test_a_damaged_table_is_an_error_that_says_what_is_wrong(small, change, told):
    with pytest.raises(ValueError, match=told):
        FittedTable.from_json(change(small[1]))


def test_a_table_refuses_a_diffusion_that_it_was_not_fitted_to(small):
    diffusion, table = small
    assert diffusion.sample(2, sampler=table, seed=0).isfinite().all()
    others = {
        "timesteps was 100, now 50": make_gaussian("cosine", 50, "pred_v", "posterior"),
        "betas was .*, now": make_gaussian("linear", 100, "pred_v", "posterior"),
        "objective was pred_v, now pred_noise": make_gaussian("cosine", 100, "pred_noise", "posterior"),
    }
    clipped = GaussianDiffusion(
        diffusion.model, image_size=(), timesteps=100, beta_schedule="cosine", channels=3, clip_denoised=(-2, 3)
    )
    for told, other in (others | {r"clip was None, now \[-2.0, 3.0\]": clipped}).items():
        with pytest.raises(ValueError, match=f"fitted to another diffusion: .*{told}"):
            other.sample(2, sampler=table, seed=0)


def test_a_fitted_sampler_is_found_by_its_name_and_number_of_steps(small):
    diffusion, table = small
    with pytest.raises(ValueError, match="no sampler is fitted for 3 steps, but for no number of steps; fit one"):
        diffusion.sample(2, sampler="fitted", steps=3)
    diffusion.fitted = {3: table}
    assert torch.equal(
        diffusion.sample(2, sampler="fitted", steps=3, seed=1), diffusion.sample(2, sampler=table, seed=1)
    )
    for steps, told in (
        (4, "fitted for 4 steps, but for 3 of steps"),
        (None, "fitted for 100 steps"),
        ([3, 1], "must be"),
    ):
        with pytest.raises(ValueError, match=told):
            diffusion.sample(2, sampler="fitted", steps=steps)
    diffusion.fitted = {}


@pytest.mark.usefixtures("few_updates")
def test_a_fit_leaves_the_network_as_it_was(tiny_network):
    """In training mode, with gradients of its own."""
    diffusion = GaussianDiffusion(tiny_network, image_size=4, timesteps=20, beta_schedule="cosine")
    diffusion(torch.rand(2, 2, 4, 4)).backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in tiny_network.named_parameters()}
    fit_sampler(diffusion, 3, n=16)
    assert tiny_network.training
    for name, p in tiny_network.named_parameters():
        assert p.requires_grad
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])


class SelfConditioned(torch.nn.Module):
    channels, self_condition = 2, True

    def forward(self, x, t, x_self_cond=None):
        return 0.5 * x if x_self_cond is None else 0.5 * x + 0.3 * x_self_cond


@pytest.mark.usefixtures("few_updates")
@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_what_is_fitted_is_what_sampling_computes(rng):
    """With self-conditioning, and bounds that clip: the distance on held-out noise is that of `sample`."""
    diffusion = GaussianDiffusion(
        SelfConditioned(), image_size=4, timesteps=20, beta_schedule="cosine", clip_denoised=(-0.2, 0.3), rng=rng,
        auto_normalize=False,
    )  # fmt: skip
    table = fit_sampler(diffusion, 3, n=16, seed=2)
    x_T = gaussian((fitting.HELD_OUT, 2, 4, 4), seed=2, stream=VALIDATION)
    teacher = diffusion.sample(len(x_T), sampler="dpmpp_2m", steps=20, noise=x_T)  # no more than T steps
    found = (diffusion.sample(len(x_T), sampler=table, noise=x_T) - teacher).square().mean().item()
    assert found == pytest.approx(table.distance, rel=1e-4)  # float32: a few hundred roundings of the samples


def test_what_cannot_be_fitted_is_refused(small):
    diffusion, _ = small

    class Own(GaussianDiffusion):
        def model_predictions(self, *args, **kwargs):
            return super().model_predictions(*args, **kwargs)

    own = Own(diffusion.model, image_size=(), timesteps=100, channels=3).double()
    with pytest.raises(ValueError, match="Own overrides methods that sampling calls"):
        fit_sampler(own, 3)
    table = own.step_table("dpmpp_2m", 3)
    assert own.sample(2, sampler=table, seed=1).isfinite().all()
    with pytest.raises(ValueError, match="with u and w of its own, as a fitted one"):
        own.sample(2, sampler=dataclasses.replace(table, u=table.u + 0.1), seed=1)
    for arguments, told in (
        ((0,), r"steps must be an integer in \[1, 101\)"),
        ((101,), "got 101"),
        ((2.5,), "got 2.5"),
    ):
        with pytest.raises(ValueError, match=told):
            fit_sampler(diffusion, *arguments)
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        fit_sampler(diffusion, 3, n=0)


# The run


@pytest.fixture
def folder(finished, tmp_path):  # noqa: F811
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


@pytest.mark.usefixtures("few_updates")
def test_a_sampler_is_fitted_and_used_by_the_command_line(folder, tmp_path, capsys):
    command = ["sample", str(folder), "-n", "3", "--sampler", "fitted", "--out", str(tmp_path / "grid.png")]
    with pytest.raises(SystemExit, match="ddpm-fast sample: no sampler is fitted for 4 steps, but for no number"):
        cli.main([*command, "--steps", "4"])
    for steps in ("3", "4"):
        cli.main(["fit-sampler", str(folder), "--steps", steps, "-n", "8", "--seed", "1"])
    told = capsys.readouterr().out
    assert f"{folder}/samplers/fitted-4.json" in told
    assert "before the fit" in told
    cli.main([*command, "--steps", "4"])
    assert (tmp_path / "grid.png").exists()
    loaded = load_run(folder)
    assert list(loaded.diffusion.fitted) == [3, 4]
    table = fit_sampler(loaded.diffusion, 4, n=8, seed=1)
    assert same(loaded.diffusion.fitted[4], table)
    found = loaded.diffusion.sample(2, sampler="fitted", steps=4, seed=0)
    assert torch.equal(found, loaded.diffusion.sample(2, sampler=table, seed=0))
    # The same, of the newest checkpoint; and with weights in another dtype.
    assert list(load_run(folder / "checkpoints" / "step-00000012").diffusion.fitted) == [3, 4]
    assert loaded.in_precision("bf16").diffusion.sample(2, sampler="fitted", steps=4).isfinite().all()
    with pytest.raises(SystemExit, match="ddpm-fast fit-sampler: steps must be an integer"):
        cli.main(["fit-sampler", str(folder), "--steps", "11"])


@pytest.mark.usefixtures("few_updates")
def test_a_run_refuses_samplers_of_other_weights_and_damaged_files(folder, capsys):
    loaded = load_run(folder)
    path = loaded.diffusion.fitted.save(fit_sampler(loaded.diffusion, 3, n=8))
    text = path.read_text()
    older = load_run(folder / "checkpoints" / "step-00000008")
    with pytest.raises(ValueError, match=r"fitted-3.json: this sampler was fitted to another diffusion: weights was"):
        older.diffusion.sample(1, sampler="fitted", steps=3)
    (path.parent / "fitted-2.json").write_text(text)
    for content, told in (
        (text[:-50], "not JSON"),
        ("", "not JSON"),
        (" " * (1 << 21), "more than 1,048,576 characters"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit, match=rf"ddpm-fast sample: .*fitted-3.json: damaged \(.*{told}"):
            cli.main(["sample", str(folder), "-n", "1", "--sampler", "fitted", "--steps", "3"])
        assert load_run(folder).diffusion.sample(1, steps=2, seed=0).isfinite().all()  # other samplers go on
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"fitted-3\.json: cannot be read"):
        load_run(folder).diffusion.sample(1, sampler="fitted", steps=3)
    with pytest.raises(ValueError, match=r"fitted-2.json: damaged \(it has 3 steps\)"):
        load_run(folder).diffusion.sample(1, sampler="fitted", steps=2)


@pytest.mark.usefixtures("few_updates")
def test_a_run_with_fitted_samplers_goes_on_and_its_folder_is_not_left(folder, tmp_path):
    loaded = load_run(folder)
    table = fit_sampler(loaded.diffusion, 2, n=8)
    loaded.diffusion.fitted.save(table)
    resumed = trainer.train(replace_steps(loaded.config, 13), folder, resume=True)
    assert resumed.metrics["steps"] == 13
    with pytest.raises(ValueError, match="weights was"):
        load_run(folder).diffusion.sample(1, sampler="fitted", steps=2)
    shutil.move(folder / "samplers", tmp_path / "elsewhere")
    (folder / "samplers").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="samplers is a symbolic link"):
        loaded.diffusion.fitted.save(table)
    with pytest.raises(RunError, match="samplers is a symbolic link"):
        trainer.train(replace_steps(loaded.config, 14), folder, resume=True)


def replace_steps(config, steps):
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
