import json

import pytest
import torch

from ddpm_fast.training.config import ConfigError, build_diffusion, check, load

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
        (changed(data__name="mnist"), "data.name: given 'mnist'; allowed: celeba, cifar10, digits, folder, idx"),
        (changed(data={}), "data.name: given None; allowed: celeba"),
        (
            changed(diffusion__objective="eps"),
            "diffusion.objective: given 'eps'; needed: input should be 'pred_noise', ",
        ),
        (changed(seed=-1), "seed: given -1; needed: input should be greater than or equal to 0"),
        (changed(model__dropout=1.0), "model.dropout: given 1.0; needed: input should be less than 1"),
        ([], "the file: given []"),
    ],
)
def test_errors_name_the_key_what_was_given_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError) as raised:
        check(values, "run.json")
    assert str(raised.value).startswith("run.json: " + message)


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
        (changed(diffusion__sampling_timesteps=2000), r"diffusion: steps must be a whole number in \[1, 1001\)"),
    ],
)
def test_values_that_do_not_fit_one_another_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build_diffusion(check(values))


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "celebahq256"])
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
    with pytest.raises(ConfigError, match="the key 'seed' is given twice"):
        load(tmp_path / "twice.json")
