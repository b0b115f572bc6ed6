"""Calls of optimised networks by CUDA graphs on a GPU: the bits of plain calls, and no memory that grows."""

import warnings

import pytest
import torch
from optimized_networks import NETWORKS, diffusers_unet, make, predict

from ddpm_fast import GaussianDiffusion, kept_graphs, optimize, restore
from ddpm_fast.nn.optimized_modules import SHARED

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:diffusers.*"),
]


def kept(model):
    return vars(model)[SHARED].graphs._kept


def inputs(seed=1, n=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator).cuda(), torch.tensor([seed] * n).cuda()


@pytest.fixture
def without(monkeypatch):
    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setenv("DDPM_FAST_GRAPHS", "0")
            return function(*args)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("openai")])
def test_replayed_calls_have_the_bits_of_plain_ones(without, name, dtype):
    model = optimize(make(name).cuda(), dtype)
    for seed in range(1, 5):
        expected = without(predict, model, *inputs(seed))
        assert torch.equal(predict(model, *inputs(seed)), expected)
    assert len(kept(model)) == 1
    restore(model)


def test_results_are_kept_and_weights_followed(without):
    model = optimize(make("diffusers").cuda(), torch.bfloat16)
    results = [predict(model, *inputs(seed)) for seed in (1, 2, 3, 4)]
    copies = [y.clone() for y in results]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    assert torch.equal(predict(model, *inputs(1)), without(predict, model, *inputs(1)))
    assert all(map(torch.equal, results, copies))


def test_thirty_calls_take_the_memory_of_three():
    model = optimize(make("diffusers").cuda(), torch.bfloat16)
    for _ in range(3):
        for n in (2, 4):
            predict(model, *inputs(1, n))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for k in range(30):
        predict(model, *inputs(k, 2 + 2 * (k % 2)))
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert len(kept(model)) == 2


def test_a_pipeline_whose_timesteps_are_on_the_cpu_replays_one_graph(without):
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    pipe = diffusers.DDIMPipeline(unet=diffusers_unet().eval(), scheduler=diffusers.DDIMScheduler()).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    model = optimize(pipe.unet)

    def images():
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(2, generator=generator, num_inference_steps=5, output_type="np").images)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the optimised network")
        assert torch.equal(images(), without(images))
    assert len(kept(model)) == 1


def test_autocast_keeps_no_casts_in_a_graph(without):
    model, (x, t) = optimize(make("diffusers").cuda(), torch.float32), inputs()

    def call():
        with torch.autocast("cuda", torch.bfloat16):
            return predict(model, x, t)

    expected = without(call)
    for _ in range(4):
        assert torch.equal(call(), expected)
        torch.full((1 << 24,), float("nan"), device="cuda")  # over memory that was freed
    assert len(kept(model)) == 1


def test_a_network_that_waits_for_the_device_is_called_as_it_is():
    class Waits(type(make("plain"))):
        def forward(self, x, t):
            return super().forward(x, t) * float(x.new_ones(()).item())

    model = optimize(Waits().eval().cuda(), torch.float32)
    expected = predict(model, *inputs())
    with pytest.warns(UserWarning, match="it waits for the device"):
        assert torch.equal(predict(model, *inputs()), expected)
    assert torch.equal(predict(model, *inputs()), expected)
    assert torch.cuda.get_sync_debug_mode() == 0


def test_streams_have_graphs_of_their_own(without):
    model, (x, t) = optimize(make("plain").cuda(), torch.bfloat16), inputs()
    expected, streams = without(predict, model, x, t), [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(predict(model, x, t))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_there_is_no_graph_in_the_graph_of_a_sampling_run(without):
    diffusion = GaussianDiffusion(make("ours"), image_size=16, timesteps=20).cuda()
    optimize(diffusion, torch.bfloat16)
    for seed in (1, 2):
        found = diffusion.sample(2, seed=seed)
        assert torch.equal(found, without(lambda seed=seed: diffusion.sample(2, seed=seed)))
    assert not kept(diffusion.model)
    kept_graphs._graphs.clear()
