"""Runs whose variance is learned: by the network, or as one number a timestep."""

import pytest
import torch
from training_runs import assert_same_weights, small, weights, without_curve  # noqa: F401  (fixture)

from ddpm_fast.training import optimization, trainer
from ddpm_fast.training.config import build_diffusion
from ddpm_fast.training.run import load_run

KINDS = ["learned", "learned_range", "learnable"]
NAME = "diffusion.log_variance"


@pytest.mark.parametrize("variance", KINDS)
def test_a_run_with_a_learned_variance_trains_resumes_previews_and_samples(tmp_path, variance):
    changes = {"diffusion__variance": variance, "training__precision": "fp32", "training__steps": 8}
    whole = trainer.train(small(**changes), tmp_path / "whole")
    trainer.train(small(**changes | {"training__steps": 3}), tmp_path / "run")
    resumed = trainer.train(small(**changes), tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    assert resumed.metrics["history"] == whole.metrics["history"]
    assert (tmp_path / "run" / "previews" / "step-00000005.png").exists()
    samples = whole.diffusion.sample(3, seed=1)
    assert samples.isfinite().all()
    assert torch.equal(load_run(tmp_path / "run").diffusion.sample(3, seed=1), samples)
    for name in ("model", "ema"):
        assert (NAME in weights(tmp_path / "run", name)) == (variance == "learnable")


def test_a_learnable_variance_is_trained_averaged_and_loaded(tmp_path):
    config = small(diffusion__variance="learnable", training__lr=0.01, training__steps=8)
    result = trainer.train(config, tmp_path / "run")
    initial = build_diffusion(config).log_variance
    last, average = (weights(tmp_path / "run", name)[NAME] for name in ("model", "ema"))
    assert (last != initial).any()
    assert torch.equal(average, result.diffusion.log_variance)
    assert not torch.equal(average, last)
    loaded = load_run(tmp_path / "run").diffusion
    assert torch.equal(loaded.log_variance, average)
    assert torch.equal(loaded.ancestral_variance(), average.double().exp())


@pytest.mark.parametrize("variance", ["posterior", "learnable"])
def test_the_optimizer_has_every_parameter_once_and_decays_the_networks_alone(variance):
    config = small(diffusion__variance=variance, training__weight_decay=0.1)
    diffusion = build_diffusion(config)
    groups = optimization.make_optimizer(diffusion, config.training).param_groups
    assert [p for group in groups for p in group["params"]] == [
        *diffusion.model.parameters(),
        *([] if diffusion.log_variance is None else [diffusion.log_variance]),
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0][: len(groups)]
