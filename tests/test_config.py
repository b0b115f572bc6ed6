import json
from pathlib import Path

import pytest
import torch

from ddpm_fast import diffusion, loss_weights, parameterization, samplers, schedules, variances
from ddpm_fast.timestep_sampling import TIMESTEP_SAMPLERS
from ddpm_fast.training.config import ConfigError, build_diffusion, check, expanded, load

SMALL = {
    "data": {"name": "digits"},
    "model": {"preset": "digits-8", "dim": 8},
    "training": {"steps": 10, "batch_size": 4, "lr": 1e-3},
}


def changed(**changes):
    """SMALL with `section__key=value`."""
    values = json.loads(json.dumps(SMALL))
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            changed(training__learning_rate=1),
            "training.learning_rate: unknown key, given 1; allowed here: steps, batch_size, lr, warmup",
        ),
        (
            changed(trainning={}),
            "trainning: unknown key, given {}; allowed here: seed, data, model, diffusion, training",
        ),
        (changed(data__shuffle=True), "data.shuffle: unknown key, given True; allowed here: name, flip"),
        (changed(training__lr=-1), "training.lr: given -1; needed: input should be greater than 0"),
        (changed(training__lr=True), "training.lr: given True; needed: input should be a valid number"),
        (changed(training__steps="6"), "training.steps: given '6'; needed: input should be a valid integer"),
        (changed(data__flip="yes"), "data.flip: given 'yes'; needed: input should be a valid boolean"),
        (changed(training__lr="fast"), "training.lr: given 'fast'; needed: input should be a valid number"),
        (changed(training__betas=[0.9, 1.5]), "training.betas.1: given 1.5; needed: input should be less than 1"),
        (changed(training={"steps": 1, "lr": 1}), "training.batch_size: missing"),
        *(
            (
                changed(training__ema_decay=value),
                f"training.ema_decay: given {value!r}; needed: a number of at least 0 and below 1, or a list",
            )
            for value in (1, -0.1, "0.9", True, None, [], [0.9, 1.0], [0.9, 0.9], [[0.9]], {"a": 0.9})
        ),
        (changed(data__name="mnist"), "data.name: given 'mnist'; allowed: celeba, cifar10, digits, folder, idx"),
        (changed(data={}), "data.name: given None; allowed: celeba"),
        (changed(diffusion__objective="eps"), "diffusion.objective: given 'eps'; needed: one of pred_noise, pred_x0"),
        (changed(diffusion__objective=3), "diffusion.objective: given 3; needed: input should be a valid string"),
        (changed(training__workers=-1), "training.workers: given -1; needed: input should be greater than or equal"),
        (changed(data__name=["idx"]), "data.name: given ['idx']; allowed: celeba"),
        (changed(data__name="idx", data__path="\ud800"), "the file: Invalid JSON"),
        (changed(seed=-1), "seed: given -1; needed: input should be greater than or equal to 0"),
        (changed(model__dropout=1.0), "model.dropout: given 1.0; needed: input should be less than 1"),
        ([], "the file: given []"),
    ],
)
def test_errors_name_the_key_what_was_given_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError) as raised:
        check(values, "run.json")
    assert str(raised.value).startswith("run.json: " + message)


REGISTRIES = {
    "sampler": samplers.SAMPLERS,
    "spacing": samplers.SPACINGS,
    "objective": parameterization.OBJECTIVES,
    "beta_schedule": schedules.SCHEDULES,
    "variance": variances.NAMES,
    "loss_weight": loss_weights.LOSS_WEIGHTS,
    "loss_type": diffusion.LOSS_TYPES,
}


@pytest.mark.parametrize("key", REGISTRIES)
def test_every_name_of_a_registry_is_valid_and_an_error_lists_them(key):
    for name in REGISTRIES[key]:
        further = {"diffusion__variance": "learned"} if name == "hybrid" else {}
        build_diffusion(check(changed(**{f"diffusion__{key}": name}, **further)))
    with pytest.raises(ConfigError) as raised:
        check(changed(**{f"diffusion__{key}": "no such name"}))
    assert str(raised.value).endswith(f"given 'no such name'; needed: one of {', '.join(REGISTRIES[key])}")


def test_timestep_samplers_are_names_of_their_registry(monkeypatch):
    monkeypatch.setitem(TIMESTEP_SAMPLERS, "mine", TIMESTEP_SAMPLERS["uniform"])
    for name in TIMESTEP_SAMPLERS:
        assert check(changed(training__timestep_sampling=name)).training.timestep_sampling == name
    message = "training.timestep_sampling: given 'no'; needed: one of uniform, loss_second_moment, mine"
    with pytest.raises(ConfigError, match=message):
        check(changed(training__timestep_sampling="no"))
    with pytest.raises(ConfigError, match=r"training\.max_skipped: given 0; needed: input should be greater than 0"):
        check(changed(training__max_skipped=0))


def test_a_sampler_and_a_schedule_that_are_registered_later_can_be_used_in_a_config(monkeypatch, tmp_path):
    def steeper(timesteps: int, power: float = 2.0):
        return schedules.linear(timesteps) ** power

    def halved(schedule, objective, steps=None, **options):
        return samplers.SAMPLERS["ddim"](schedule, objective, (steps or len(schedule)) // 2, **options)

    monkeypatch.setitem(schedules.SCHEDULES, "steeper", steeper)
    monkeypatch.setitem(samplers.SAMPLERS, "halved", halved)
    values = changed(diffusion={"beta_schedule": "steeper", "timesteps": 100, "sampler": "halved"})
    values["diffusion"]["schedule_fn_kwargs"] = {"power": 1.5}
    (tmp_path / "mine.json").write_text(json.dumps(values))
    diffusion = build_diffusion(load(tmp_path / "mine.json"))
    torch.testing.assert_close(diffusion.schedule.betas, schedules.linear(100) ** 1.5, rtol=1e-12, atol=0)
    assert len(diffusion.step_table()) == 50


def test_the_sampler_of_a_config_is_the_one_that_samples():
    common = {"timesteps": 25, "sampling_timesteps": 5, "clip_denoised": False}
    explicit, configured = (
        build_diffusion(check(changed(diffusion=common | sampler))) for sampler in ({}, {"sampler": "dpmpp_2m_sde"})
    )
    configured.load_state_dict(explicit.state_dict())
    expected = explicit.sample(2, sampler="dpmpp_2m_sde", steps=5, seed=1)
    assert torch.equal(configured.sample(2, seed=1), expected)
    assert not torch.equal(explicit.sample(2, seed=1), expected)


def test_all_errors_are_told_at_once():
    with pytest.raises(ConfigError) as raised:
        check(changed(training__lr=-1, training__steps=0, seed="x"))
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(model__preset="digits"), "model: unknown preset 'digits'; there are"),
        (changed(model__dim_mults=[1, 2, 2, 2, 2]), "model: image_size=8 cannot be halved 4 times"),
        (changed(model={"channels": 1}), "model: .*image_size"),
        (changed(diffusion__timesteps=15), r"diffusion: beta_schedule 'linear' with 15 timesteps has beta"),
        (changed(diffusion__schedule_fn_kwargs={"tau": 1}), "diffusion: beta_schedule 'linear' has no argument 'tau'"),
        (
            changed(diffusion__sampling_timesteps=2000),
            r"diffusion: sampling_timesteps must be an integer in \[1, 1001\)",
        ),
    ],
)
def test_values_that_do_not_fit_one_another_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build_diffusion(check(values))


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "fashion_mnist_hybrid", "cifar10", "celebahq256"])
def test_shipped_configs_are_valid_and_build(name):
    config = load(name)
    with torch.device("meta"):
        model = build_diffusion(config).model
    assert check(config.model_dump(mode="json")) == config
    published = {"cifar10": 35_746_307, "celebahq256": 113_673_219}
    if name in published:
        assert sum(p.numel() for p in model.parameters()) == published[name]


def test_published_recipes_are_the_papers():
    """Ho et al. (2020), appendix B."""
    cifar, celeba = load("cifar10"), load("celebahq256")
    for config in (cifar, celeba):
        assert (config.diffusion.timesteps, config.diffusion.beta_schedule) == (1000, "linear")
        assert config.diffusion.objective == "pred_noise"
        assert (config.training.warmup, config.training.grad_clip, config.training.ema_decay) == (5000, 1.0, 0.9999)
        assert config.data.flip
    assert (cifar.training.lr, cifar.training.batch_size, cifar.training.steps) == (2e-4, 128, 800_000)
    assert (cifar.model.dropout, cifar.diffusion.variance) == (0.1, "beta")
    assert (celeba.training.lr, celeba.training.batch_size, celeba.training.steps) == (2e-5, 64, 500_000)
    assert (celeba.model.dropout, celeba.diffusion.variance) == (0.0, "posterior")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"nowhere.json: no such file, and none of the shipped configs: celebahq256, "
    ):
        load(tmp_path / "nowhere.json")
    (tmp_path / "half.json").write_text('{"seed": 1,')
    with pytest.raises(ConfigError, match=r"half.json: not JSON: .*line 1"):
        load(tmp_path / "half.json")
    (tmp_path / "latin.json").write_bytes('{"seed": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.json: not JSON: 'utf-8' codec"):
        load(tmp_path / "latin.json")
    (tmp_path / "twice.json").write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(ConfigError, match=r"twice.json: the key 'seed' is given twice"):
        load(tmp_path / "twice.json")
    (tmp_path / "deep.json").write_text('{"seed":' * 100_000)
    with pytest.raises(ConfigError, match=r"deep.json: not JSON: "):
        load(tmp_path / "deep.json")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, literal):
    (tmp_path / "mine.json").write_text(json.dumps(SMALL).replace("0.001", literal))
    with pytest.raises(ConfigError, match=rf"mine.json: {literal} is not JSON.*needed: a finite number"):
        load(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text(json.dumps(SMALL).replace("0.001", "1e999"))
    with pytest.raises(ConfigError, match=r"training.lr: given inf; needed: input should be a finite number"):
        load(tmp_path / "mine.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_configs_of_windows_editors_are_read(tmp_path, encoding):
    """Notepad puts a byte order mark before UTF-8, and PowerShell's `>` writes UTF-16."""
    text = json.dumps(changed(data={"name": "idx", "path": "é"}), ensure_ascii=False)
    (tmp_path / "mine.json").write_text(text, encoding=encoding)
    assert load(tmp_path / "mine.json").data.path == Path("é")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text(json.dumps(SMALL))
    assert load("~/mine.json") == check(SMALL)
    assert (expanded("~"), expanded("a/~")) == (tmp_path, Path("a/~"))
    with pytest.raises(ConfigError, match="~nobody-of-this-name/x: there is no home folder"):
        expanded("~nobody-of-this-name/x")
