"""Training steps by CUDA graphs on a GPU: the same bits as launch by launch, and no memory that grows."""

import pytest
import torch
from training_runs import assert_same_weights, losses, small, without_curve  # noqa: F401  (fixture)

from ddpm_fast import GaussianDiffusion, UNet, cuda_graph
from ddpm_fast.training import trainer
from ddpm_fast.training.graphed_step import GraphedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def same_sums_in_each_run(poisoned_memory):
    """cuDNN's gradients and those of attention add in another order in each run unless they are told not to."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def replays(monkeypatch):
    """A list that grows by one with each replay of a training step."""
    taken, capture = [], cuda_graph.capture

    def counted(step, device, **how):
        replay = capture(step, device, **how)
        return replay if "warm_up" not in how else lambda: (taken.append(1), replay())

    monkeypatch.setattr(cuda_graph, "capture", counted)
    return taken


@pytest.mark.parametrize(
    "changes",
    [
        {"training__precision": "fp32"},
        {"training__precision": "bf16"},
        {"training__precision": "fp32", "training__grad_clip": None},
        {"training__precision": "fp32", "training__warmup": 5, "training__cosine_decay": True},
        {"training__precision": "fp32", "training__timestep_sampling": "loss_second_moment", "diffusion__timesteps": 4},
        {"training__precision": "fp32", "diffusion__variance": "learnable"},
        {"training__precision": "bf16", "diffusion__variance": "learned_range"},
    ],
    ids=str,
)
def test_a_captured_run_has_the_bits_of_a_run_launch_by_launch(tmp_path, monkeypatch, replays, changes):
    config = small(**{"training__steps": 12} | changes)
    captured = trainer.train(config, tmp_path / "captured")
    assert len(replays) == 11  # all but the first
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    plain = trainer.train(config, tmp_path / "plain")
    assert len(replays) == 11
    assert_same_weights(tmp_path / "plain", tmp_path / "captured")
    assert losses(captured) == losses(plain)
    assert captured.metrics["loss_by_timestep"] == plain.metrics["loss_by_timestep"]


@pytest.mark.parametrize("grad_clip", [1.0, None])
def test_a_replayed_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch, replays, grad_clip):
    forward = GaussianDiffusion.forward

    def broken(self, images, **arguments):
        bad = arguments["sample_offset"] // len(images) % 4 == 3
        return forward(self, images, **arguments) * torch.where(bad, torch.nan, 1.0)

    monkeypatch.setattr(GaussianDiffusion, "forward", broken)
    config = small(training__precision="fp32", training__save_every=1, training__grad_clip=grad_clip)
    captured = trainer.train(config, tmp_path / "captured")
    assert len(replays) == 11
    assert captured.metrics["skipped_steps"] == 3
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    plain = trainer.train(config, tmp_path / "plain")
    assert plain.metrics["skipped_steps"] == 3
    assert_same_weights(tmp_path / "plain", tmp_path / "captured")
    assert losses(captured) == losses(plain)


def test_a_captured_run_can_be_resumed(tmp_path, replays):
    whole = trainer.train(small(training__precision="bf16"), tmp_path / "whole")
    trainer.train(small(training__precision="bf16", training__steps=8), tmp_path / "run")
    resumed = trainer.train(small(training__precision="bf16"), tmp_path / "run", resume=True)
    assert len(replays) == 11 + 7 + 3
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    assert losses(resumed) == losses(whole)


def test_float16_trains_launch_by_launch_and_says_why(tmp_path, replays):
    with pytest.warns(UserWarning, match="its gradients are scaled"):
        trainer.train(small(training__precision="fp16"), tmp_path / "run")
    assert not replays


class Loop:
    def __init__(self):
        torch.manual_seed(0)
        network = UNet(image_size=16, dim=64, dim_mults=(1, 2), attention_resolutions=(8,), dropout=0.1)
        self.diffusion = GaussianDiffusion(network, image_size=16).cuda()
        lr = torch.full((), 1e-3, device="cuda")
        self.optimizer = torch.optim.AdamW(self.diffusion.parameters(), lr=lr, fused=True, capturable=True)
        self.first = torch.zeros((), dtype=torch.int64, device="cuda")
        self.step = GraphedStep(self.loss, self.optimizer, clip=1.0)

    def loss(self, images):
        return self.diffusion(images, seed=1, sample_offset=self.first)

    def take(self, k, n=8):
        torch.manual_seed(k)
        self.first.fill_(k * n)
        return self.step(torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8))


def test_dropout_and_timesteps_follow_the_seed_and_a_smaller_batch_is_taken(monkeypatch, replays):
    def losses_of():
        loop = Loop()
        found = [loop.take(k, 5 if k in (4, 7) else 8) for k in range(10)]
        return torch.stack(found), torch.rand(3, device="cuda")

    found = losses_of()
    assert len(replays) == 7
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    for x, y in zip(found, losses_of(), strict=True):
        assert torch.equal(x, y)


def test_a_replayed_step_never_waits_for_the_device(replays):
    loop, images = Loop(), torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8).pin_memory()
    for _ in range(3):
        loop.step(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == 3


def test_a_loss_that_waits_for_the_device_is_trained_on_launch_by_launch(monkeypatch, replays):
    def losses_of():
        loop = Loop()
        loss = loop.loss
        loop.step = GraphedStep(lambda images: loss(images) * float(images.new_ones(()).item()), loop.optimizer)
        return torch.stack([loop.take(k) for k in range(5)])

    with pytest.warns(UserWarning, match="it waits for the device"):
        found = losses_of()
    assert not replays
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    assert torch.equal(found, losses_of())
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_noise_seed_that_the_host_draws_is_not_repeated(monkeypatch, replays):
    def losses_of():
        loop = Loop()
        loop.step = GraphedStep(loop.diffusion, loop.optimizer)
        return torch.stack([loop.take(k) for k in range(5)])

    with pytest.warns(UserWarning, match="cannot be captured"):
        found = losses_of()
    assert not replays
    monkeypatch.setenv("DDPM_FAST_GRAPHS", "0")
    assert torch.equal(found, losses_of())


def test_thirty_steps_take_the_memory_of_three(replays):
    loop = Loop()
    for k in range(3):
        loop.take(k)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for k in range(30):
        loop.take(k)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
