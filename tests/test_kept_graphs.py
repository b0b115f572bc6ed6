"""Sampling by graphs, which are recorded here: a replay calls the same ops on the same tensors, as CUDA graphs do."""

import gc
import weakref

import pytest
import recorded_graphs
import torch
from torch import nn

import ddpm_fast
from ddpm_fast import GaussianDiffusion, cuda_graph, graph_keys, kept_graphs


@pytest.fixture
def captures(monkeypatch):
    """Graphs are used on the CPU; a list that grows by one with each capture."""
    made = recorded_graphs.use(monkeypatch)
    kept_graphs._graphs.clear()
    yield made
    kept_graphs._graphs.clear()


@pytest.fixture
def without(monkeypatch):
    """A function that calls another without graphs."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graph, "enabled", lambda x: False)
            return function()

    return call


class Net(nn.Module):
    channels = 2

    def __init__(self, self_condition=False):
        super().__init__()
        self.self_condition = self_condition
        self.gain = 1.0
        self.conv = nn.Conv2d(4 if self_condition else 2, 2, 3, padding=1)
        self.labels = nn.Embedding(3, 2)

    def forward(self, x, t, x_self_cond=None, label=None):
        if self.self_condition:
            # None is not the same as zeros here.
            x = torch.cat([x, torch.full_like(x, 0.3) if x_self_cond is None else x_self_cond], 1)
        y = self.conv(x).tanh() * self.gain + t[:, None, None, None].to(x.dtype) / 100
        return y if label is None else y + self.labels(label)[:, :, None, None]


def make(dtype=torch.float32, self_condition=False, **arguments):
    model = Net(self_condition).to(dtype)
    return GaussianDiffusion(
        model, image_size=4, timesteps=12, beta_schedule="cosine", **({"objective": "pred_v"} | arguments)
    )


def runs(diffusion, **arguments):
    return lambda: diffusion.sample(3, seed=5, return_all_timesteps=True, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sampler": "ddim", "steps": 7, "eta": 0.0},
        {"sampler": "ddim", "steps": 7, "eta": 0.5},
        {"sampler": "dpmpp_2m", "steps": 5},
        {"sampler": "dpmpp_2m_sde", "steps": [11, 9, 4, 2]},
        {"sampler": "unipc", "steps": 5},
        {"sampler": "heun", "steps": 6},
        {"sampler": "dpmpp_2m", "steps": 5, "dynamic_threshold": 0.5},
        {"sampler": "ddpm", "steps": 6, "dynamic_threshold": 0.5},
        {"init": torch.linspace(0, 1, 96).view(3, 2, 4, 4), "strength": 0.5},
    ],
    ids=str,
)
def test_a_replayed_run_is_the_run_step_by_step(captures, without, how, self_condition, rng, dtype):
    diffusion = make(dtype, self_condition, rng=rng)
    assert torch.equal(runs(diffusion, **how)(), without(runs(diffusion, **how)))
    assert len(captures) == 1


def test_one_graph_serves_any_seed_number_of_steps_and_labels(captures, without):
    diffusion = make()
    for seed, steps, label in [(1, 12, [0, 1, 2]), (2, 5, [2, 2, 2]), (2, [11, 8, 3, 1], [0, 0, 1])]:

        def run(seed=seed, steps=steps, label=label):
            kwargs = {"label": torch.tensor(label)}
            return diffusion.sample(3, sampler="ddim", eta=1.0, seed=seed, steps=steps, model_kwargs=kwargs)

        assert torch.equal(run(), without(run))
    assert len(captures) == 1


def test_weights_that_are_written_to_are_followed_and_new_ones_captured_anew(captures, without):
    diffusion = make()
    run = runs(diffusion)
    run()
    with torch.no_grad():  # as an average or an optimizer does
        diffusion.model.conv.weight.mul_(1.5)
    assert torch.equal(run(), without(run))
    assert len(captures) == 1
    diffusion.model.conv.weight = nn.Parameter(diffusion.model.conv.weight * 0.5)
    assert torch.equal(run(), without(run))
    assert len(captures) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "gain", 0.5),
        lambda model: model.conv.register_forward_hook(lambda module, args, output: output * 0.5),
        lambda model: setattr(model.conv, "forward", lambda x: torch.zeros_like(x)),
        lambda model: setattr(model, "conv", nn.Sequential(model.conv, nn.Tanh())),
    ],
    ids=["setting", "hook", "forward", "module"],
)
def test_a_network_that_was_changed_is_captured_anew(captures, without, change):
    diffusion = make()
    run = runs(diffusion)
    before = run()
    change(diffusion.model)
    assert torch.equal(run(), without(run))
    assert not torch.equal(run(), before)
    assert len(captures) == 2


def test_another_shape_backend_or_clipping_is_captured_anew(captures, without):
    diffusion = make(clip_denoised=(-0.1, 0.1))
    run = runs(diffusion)
    clipped = run()
    diffusion.clip_denoised = False
    assert torch.equal(run(), without(run))
    assert not torch.equal(run(), clipped)
    assert len(captures) == 2
    diffusion.sample(2)
    assert len(captures) == 3
    with ddpm_fast.backend("reference"):
        diffusion.sample(2)
    assert len(captures) == 4


def test_a_run_may_begin_in_the_middle(captures, without):
    diffusion, x = make(), torch.rand(3, 2, 4, 4) - 0.5

    def run():
        return diffusion.interpolate(x, -x, t=7, seed=1)

    assert torch.equal(run(), without(run))
    assert len(captures) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_images_are_encoded_and_inpainted_by_graphs(captures, without, rng, dtype):
    diffusion, x = make(dtype, rng=rng), torch.linspace(0, 1, 96).view(3, 2, 4, 4)
    for edit in (
        lambda: diffusion.encode(x, steps=6),
        lambda: diffusion.inpaint(x, x[:, :1] > 0.4, steps=6, jump=2, resample=3, seed=1),
    ):
        captures.clear()
        assert torch.equal(edit(), without(edit))
        assert len(captures) == 1


def test_a_graph_of_samples_serves_runs_from_images(captures):
    diffusion, x = make(), torch.linspace(0, 1, 96).view(3, 2, 4, 4)
    diffusion.sample(3, seed=1)
    diffusion.sample(init=x, strength=0.5, seed=1)
    assert len(captures) == 1


def test_a_network_in_training_mode_shares_the_graph_and_keeps_its_mode(captures, without):
    diffusion = make()
    diffusion.eval()
    run = runs(diffusion)
    expected = run()
    diffusion.train()
    assert torch.equal(run(), expected)
    assert diffusion.model.training
    assert len(captures) == 1


def test_runs_side_by_side_do_not_share_a_graph(captures, without):
    diffusion = make()
    seeds = (1, 2)
    expected = [without(lambda s=s: diffusion.sample(3, seed=s, return_all_timesteps=True)) for s in seeds]
    both = [diffusion.sample_progressive(3, every=1, seed=s) for s in seeds]
    for k, states in enumerate(zip(*both, strict=True)):
        for state, whole in zip(states, expected, strict=True):
            assert torch.equal(state.x, whole[:, k])
    assert len(captures) == 2
    del both, states, state
    gc.collect()
    for _ in diffusion.sample_progressive(3, seed=1):
        pass
    assert len(captures) == 2  # one of them is free again


def test_what_was_sampled_does_not_change_with_the_next_run(captures):
    for auto_normalize in (True, False):
        diffusion = make(auto_normalize=auto_normalize)
        x = torch.rand(3, 2, 4, 4) - 0.5
        results = [diffusion.sample(3, seed=1), diffusion.interpolate(x, -x, seed=1)]
        copies = [result.clone() for result in results]
        diffusion.sample(3, seed=2)
        diffusion.interpolate(-x, x, seed=3)
        assert all(map(torch.equal, results, copies))


def test_two_graphs_at_most_are_kept_and_none_beyond_the_network(captures):
    diffusion = make()
    for n in (1, 2, 3, 4):
        diffusion.sample(n)
    (kept,) = kept_graphs._graphs.values()
    assert len(kept) == graph_keys.MOST
    diffusion.sample(3)
    assert len(captures) == 4
    model = weakref.ref(diffusion.model)
    del diffusion, kept
    gc.collect()
    assert model() is None
    assert not kept_graphs._graphs


def test_a_network_that_cannot_be_captured_samples_step_by_step_and_says_why(captures, without, monkeypatch):
    def fail(step, device):
        step()
        raise cuda_graph.CannotCapture("it waits for the device")

    monkeypatch.setattr(cuda_graph, "capture", fail)
    diffusion = make()
    run = runs(diffusion)
    with pytest.warns(UserWarning, match="sampling runs step by step, .*: it waits for the device"):
        found = run()
    assert torch.equal(found, without(run))


def test_an_error_of_the_network_reaches_the_caller(captures, monkeypatch):
    def fail(step, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graph, "capture", fail)
    with pytest.raises(torch.OutOfMemoryError):
        make().sample(3)
