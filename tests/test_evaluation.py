"""Sampling calls the network in evaluation mode and leaves the flags of its modules alone."""

import functools
import threading

import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion, optimize
from ddpm_fast.nn.evaluation import in_evaluation


class Network(nn.Module):
    channels = 2

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Conv2d(8, 2, 1)
        self.path = [self.first, self.norm]  # references that are not children
        self.table = {"dropout": self.dropout}
        self.method = self.last.forward
        self.partial = functools.partial(self._through, self.dropout)
        self.shared = self.first

    @staticmethod
    def _through(module, x):
        return module(x)

    def forward(self, x, t):
        for module in self.path:
            x = module(x)
        return self.method(self.partial(self.table["dropout"](x).tanh()))


def make():
    torch.manual_seed(0)
    return GaussianDiffusion(Network(), image_size=4, timesteps=8, beta_schedule="cosine")


def test_a_model_in_evaluation_mode_is_used_itself():
    model = Network().eval()
    assert in_evaluation(model) is model


def test_a_copy_shares_its_tensors_and_has_its_own_modules():
    model = Network()
    model.last.eval()
    copy = in_evaluation(model)
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    assert not any(module.training for module in copy.modules())
    assert [id(p) for p in copy.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in copy.buffers()] == [id(b) for b in model.buffers()]
    assert copy.path[1] is copy.norm is not model.norm
    assert copy.shared is copy.first
    x, t = torch.randn(2, 2, 4, 4), torch.arange(2)
    expected = Network.forward(model.eval(), x, t)
    assert torch.equal(copy(x, t), expected)
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.last.weight = nn.Parameter(model.last.weight * 3)  # replaced, not written to
    assert torch.equal(copy(x, t), model(x, t))


def test_hooks_are_those_of_the_model():
    model, seen = Network(), []
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(output) or output * 0)
    copy = in_evaluation(model)
    x, t = torch.randn(2, 2, 4, 4), torch.arange(2)
    found = copy(x, t)
    assert len(seen) == 1
    assert torch.equal(found, model.eval()(x, t))


@pytest.mark.parametrize("optimized", [False, True])
def test_samples_of_a_model_in_train_mode_are_those_of_evaluation(optimized):
    diffusion = make()
    if optimized:
        optimize(diffusion, torch.float32)
    diffusion.train()
    found = diffusion.sample(3, seed=1)
    assert diffusion.training
    assert all(module.training for module in diffusion.model.modules())
    assert torch.equal(found, diffusion.eval().sample(3, seed=1))
    assert diffusion.model.norm.num_batches_tracked == 0


def test_a_compiled_model_in_train_mode_samples_in_evaluation_mode():
    diffusion = make()
    expected = diffusion.eval().sample(3, seed=1)
    diffusion.train()
    diffusion.model = torch.compile(diffusion.model, backend="eager")
    assert torch.equal(diffusion.sample(3, seed=1), expected)
    torch._dynamo.reset()


def test_threads_sample_while_others_train():
    diffusion, losses, images = make().train(), [], {}
    expected = [in_evaluation(diffusion).sample(2, seed=seed) for seed in range(6)]
    stop = threading.Event()

    def train():
        x, t = torch.rand(2, 2, 4, 4), torch.tensor([1, 6])
        while not stop.is_set():
            losses.append(diffusion.model.dropout(torch.ones(64)).eq(0).any().item())
            diffusion.p_losses(x, t)

    def sample(seeds):
        for seed in seeds:
            images[seed] = diffusion.sample(2, seed=seed)

    before = diffusion.model.norm.track_running_stats
    diffusion.model.norm.momentum = 0.0  # training would change the statistics that samples use
    threads = [threading.Thread(target=sample, args=([seed, seed + 3],)) for seed in range(3)]
    trainer = threading.Thread(target=train)
    for thread in [trainer, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    trainer.join()
    assert before
    assert losses
    assert all(losses)  # dropout was on in every step: 64 elements that all survive have a chance of 2^-64
    for seed in range(6):
        assert torch.equal(images[seed], expected[seed])
