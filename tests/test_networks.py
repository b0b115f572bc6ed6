"""Networks inside GaussianDiffusion: what they return, take, and are made of."""

import dataclasses

import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion

HOW = {"image_size": 4, "timesteps": 10, "beta_schedule": "cosine"}


@dataclasses.dataclass
class Output:
    sample: torch.Tensor


RETURNS = {
    "an object": Output,
    "a tuple": lambda y: (y, None),
    "a list": lambda y: [y],
    "a mapping": lambda y: {"sample": y},
}


class Returning(nn.Module):
    channels = 2

    def __init__(self, network, wrap):
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, x, t):
        return self.wrap(self.network(x, t))


@pytest.mark.parametrize("kind", RETURNS)
def test_a_prediction_is_found_in_what_a_network_returns(kind, tiny_network):
    plain = GaussianDiffusion(tiny_network, **HOW)
    wrapped = GaussianDiffusion(Returning(tiny_network, RETURNS[kind]), **HOW)
    images, t = torch.rand(3, 2, 4, 4), torch.arange(3)
    assert torch.equal(wrapped(images, times=t, seed=1), plain(images, times=t, seed=1))
    assert torch.equal(wrapped.sample(2, seed=1), plain.sample(2, seed=1))


def test_a_network_that_returns_no_tensor_is_an_error(tiny_network):
    diffusion = GaussianDiffusion(Returning(tiny_network, lambda y: "eps"), **HOW)
    with pytest.raises(ValueError, match=r"must return a tensor, .* it returned str"):
        diffusion.sample(1)


class Labelled(nn.Module):
    channels = 2

    def __init__(self, network):
        super().__init__()
        self.network, self.embedding, self.seen = network, nn.Embedding(5, 2), []

    def forward(self, x, t, y, scale=1.0):
        self.seen.append(y)
        return self.network(x, t) + scale * self.embedding(y)[:, :, None, None]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_labels_reach_the_network_in_training_and_sampling(sampler, tiny_network):
    network = Labelled(tiny_network)
    diffusion = GaussianDiffusion(network, **HOW)
    y, x = torch.tensor([0, 3, 4]), torch.rand(3, 2, 4, 4)
    diffusion(x, model_kwargs={"y": y}).backward()
    assert network.embedding.weight.grad[[0, 3, 4]].abs().sum() > 0
    assert network.embedding.weight.grad[[1, 2]].abs().sum() == 0
    calls = [
        lambda y: diffusion.sample(3, sampler=sampler, seed=1, model_kwargs={"y": y}),
        lambda y: list(diffusion.sample_progressive(3, sampler=sampler, seed=1, model_kwargs={"y": y}))[-1].x,
        lambda y: diffusion.p_sample(x, 5, seed=1, model_kwargs={"y": y})[0],
        lambda y: diffusion.p_mean_variance(x, y, model_kwargs={"y": y})[0],
        lambda y: diffusion.interpolate(x, x, seed=1, model_kwargs={"y": y}),
    ]
    for call in calls:
        network.seen.clear()
        mixed, alone = call(y), call(torch.zeros_like(y))
        assert all(torch.equal(seen, y) or not seen.any() for seen in network.seen)
        assert torch.equal(mixed[0], alone[0]) or call is calls[3]
        assert not torch.allclose(mixed[1:], alone[1:])
    with pytest.raises(TypeError, match="'y'; the network's go into model_kwargs"):
        diffusion(x, y=y)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"channels": 2}, 2),
        ({"channels": [64, 128], "in_channels": 2}, 2),
        ({"config": type("Config", (), {"in_channels": 2})()}, 2),
        ({"channels": [64, 128]}, None),
        ({"channels": True}, None),
    ],
)
def test_the_channels_of_a_network_are_found_or_asked_for(attributes, expected):
    network = nn.Identity()
    vars(network).update(attributes)
    if expected is None:
        with pytest.raises(ValueError, match="no integer attribute `channels`; pass channels="):
            GaussianDiffusion(network, **HOW)
    else:
        assert GaussianDiffusion(network, **HOW).channels == expected


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_a_float64_network_samples_what_it_samples_in_float32(sampler, tiny_network):
    diffusion = GaussianDiffusion(tiny_network.eval(), **HOW)
    expected = diffusion.sample(2, sampler=sampler, seed=1)
    seen = []
    tiny_network.double().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    found = diffusion.sample(2, sampler=sampler, seed=1)
    assert set(seen) == {torch.float64}
    # Ten steps, each of which rounds what the network says; its slope is at most 3.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_module_made_on_the_meta_device_is_filled_by_assignment(make_tiny_network):
    state = GaussianDiffusion(make_tiny_network(), **HOW).state_dict()
    expected = GaussianDiffusion(make_tiny_network(), **HOW)
    expected.load_state_dict(state)
    with torch.device("meta"):
        diffusion = GaussianDiffusion(make_tiny_network(), **HOW)
    diffusion.load_state_dict(state, assign=True)
    assert not [name for name, x in [*diffusion.named_buffers(), *diffusion.named_parameters()] if x.is_meta]
    for name, buffer in expected.named_buffers():
        assert torch.equal(diffusion.get_buffer(name), buffer), name
    assert torch.equal(diffusion.sample(2, seed=1), expected.sample(2, seed=1))


def test_tables_keep_float64_when_a_state_dict_is_assigned(tiny_network):
    diffusion = GaussianDiffusion(tiny_network, **HOW).double()
    diffusion.load_state_dict(diffusion.state_dict(), assign=True)
    assert {x.dtype for x in diffusion.buffers()} == {torch.float64}
    diffusion(torch.rand(2, 2, 4, 4, dtype=torch.float64)).backward()


def test_results_are_ordinary_tensors(tiny_network):
    """They can be written to, learned from, and a network may use gradients while sampling."""

    class Guided(nn.Module):
        channels = 2

        def forward(self, x, t):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(y.square().sum(), y)
            return 0.1 * gradient

    for network in (tiny_network, Guided()):
        diffusion, x = GaussianDiffusion(network, **HOW), torch.rand(2, 2, 4, 4)
        results = [
            diffusion.sample(2),
            *diffusion.p_sample(x, 5),
            diffusion.interpolate(x, x),
            *(state.x for state in diffusion.sample_progressive(2, every=5)),
        ]
        for result in results:
            assert not result.is_inference()
            assert not result.requires_grad
            result[..., :2] = 0.0
            (result * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            [torch.rand(2, 2, 4, 4), torch.zeros(2)],
            r"must be a tensor, got list; of a batch .* pass the images, batch\[0\]",
        ),
        (torch.rand(2, 2, 4, 4).numpy(), "must be a tensor, got ndarray; convert it by torch.from_numpy"),
        (None, "must be a tensor, got NoneType"),
    ],
)
def test_a_batch_that_is_no_tensor_is_an_error_with_the_remedy(batch, message, tiny_network):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(tiny_network, **HOW)(batch)


@pytest.mark.parametrize("clip", [True, (-2.0, 3.0)])
def test_data_that_samples_cannot_reach_is_refused(clip, tiny_network):
    diffusion = GaussianDiffusion(tiny_network, **HOW, auto_normalize=False, clip_denoised=clip)
    with pytest.raises(
        ValueError, match=r"data must lie within .*clip_denoised clips.*from 5 to 5.*clip_denoised=False"
    ):
        diffusion(torch.full((2, 2, 4, 4), 5.0))
    wide = GaussianDiffusion(tiny_network, **HOW, auto_normalize=False, clip_denoised=False)
    wide(torch.full((2, 2, 4, 4), 5.0))


@pytest.mark.parametrize("images", [torch.rand(2, 2, 4, 4), torch.randint(256, (2, 2, 4, 4), dtype=torch.uint8)])
def test_images_that_narrow_bounds_would_clip_are_refused(images, tiny_network):
    diffusion = GaussianDiffusion(tiny_network, **HOW, clip_denoised=(-0.5, 0.5))
    images.flatten()[0] = 0  # -1 to the network
    with pytest.raises(
        ValueError, match=r"within \(-0.5, 0.5\), to which clip_denoised clips samples; it reaches from -1"
    ):
        diffusion(images)
    diffusion(torch.full((2, 2, 4, 4), 0.5))


def test_the_second_argument_of_sample_is_return_all_timesteps(tiny_network):
    assert GaussianDiffusion(tiny_network, **HOW).sample(3, True).shape == (3, 11, 2, 4, 4)
