"""Copies, wrappers and modes of optimised networks, and errors."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from optimized_networks import (
    NETWORKS,
    GroupNorm32,
    Plain,
    gradients,
    inputs,
    lucidrains_unet,
    make,
    predict,
    relative,
)
from torch import nn

from ddpm_fast import GaussianDiffusion, optimize, restore
from ddpm_fast.nn.lazy_group_norm import PendingGroupNorm

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fused_in_training")]


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: _unpickled(m)], ids=["deepcopy", "pickle"])
def test_copies_are_optimised_and_can_be_restored(name, how):
    if name == "lucidrains" and how is not copy.deepcopy:
        pytest.skip("einops' layers and partials are its own")
    model, (x, t) = optimize(make(name), torch.bfloat16), inputs()
    expected = predict(model, x, t)
    other = how(model)
    assert torch.equal(predict(other, x, t), expected)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(predict(other, x, t), expected)
    restore(other)
    assert predict(other, x, t).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert next(model.parameters()).dtype == torch.bfloat16


def _unpickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_inference_mode_and_autocast():
    model, (x, t) = make("openai"), inputs()
    expected = predict(model, x, t)
    optimize(model, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, t), expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(x, t), expected) < 0.03


@pytest.mark.parametrize("name", ["openai", "plain"])
def test_an_optimised_model_can_be_compiled(name):
    model, (x, t) = make(name), inputs()
    expected = predict(model, x, t)
    compiled = torch.compile(optimize(model, torch.float32), backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, x, t), expected, rtol=1e-3, atol=1e-4)
    gradients(compiled, x, t)
    torch._dynamo.reset()


def test_distributed_data_parallel_wraps_an_optimised_model(tmp_path):
    model, (x, t) = optimize(make("openai"), torch.float32), inputs()
    expected = gradients(model, x, t)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="DistributedDataParallel wraps"):
            optimize(nn.parallel.DistributedDataParallel(Plain()))
        actual = gradients(nn.parallel.DistributedDataParallel(model), x, t)
    finally:
        torch.distributed.destroy_process_group()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key if key == "x" else f"module.{key}"], value, rtol=1e-4, atol=1e-5)


def test_averages_of_an_optimised_model():
    model, (x, t) = optimize(make("openai"), torch.float32), inputs()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        average.update_parameters(model)
        predict(average, x, t)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.2)
    average.update_parameters(model)
    actual = predict(average, x, t)
    assert relative(actual, predict(model, x, t)) > 1e-2
    restore(average.module)
    torch.testing.assert_close(actual, predict(average, x, t), rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing():
    model, (x, t) = optimize(make("diffusers").train(), torch.float32), inputs()
    expected = gradients(model, x, t)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    for key, value in gradients(model, x, t).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)


def test_results_keep_their_type_and_the_callers_dtype():
    model, (x, t) = optimize(make("diffusers"), torch.bfloat16), inputs()
    with torch.no_grad():
        y = model(x.double(), 5)
        assert type(y).__name__ == "UNet2DOutput"
        assert y.sample.dtype == y["sample"].dtype == y[0].dtype == torch.float64
        assert model(x, t, return_dict=False)[0].dtype == torch.float32
        assert model(x.bfloat16(), t).sample.dtype == torch.bfloat16


def test_timesteps_are_not_rounded():
    """bfloat16 holds no odd number above 256."""
    model, (x, _) = optimize(make("diffusers"), torch.bfloat16), inputs()
    a, b, c = (predict(model, x, torch.tensor(t)) for t in ([997.0, 999.0], [997, 999], [996, 1000]))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["ours", "lucidrains", "openai"])
def test_it_samples_within_a_diffusion(name):
    diffusion = GaussianDiffusion(make(name), image_size=16, channels=3, timesteps=50, objective="pred_v")
    images, t = torch.rand(4, 3, 16, 16), torch.tensor([1, 10, 25, 49])
    expected = diffusion.sample(2, steps=5, seed=3)
    loss = diffusion(images, seed=1, times=t)
    assert optimize(diffusion, torch.float32) is diffusion
    torch.testing.assert_close(diffusion.sample(2, steps=5, seed=3), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(diffusion(images, seed=1, times=t), loss, rtol=1e-4, atol=1e-5)
    restore(diffusion)
    optimize(diffusion, torch.bfloat16)
    assert diffusion.betas.dtype == torch.float32
    assert (diffusion.sample(2, steps=5, seed=3) - expected).abs().mean() < 0.05
    diffusion(images, seed=1).backward()


def test_the_process_of_denoising_diffusion_pytorch_keeps_its_tables():
    model = lucidrains_unet()
    package = pytest.importorskip("denoising_diffusion_pytorch", exc_type=ImportError)
    diffusion = package.GaussianDiffusion(model, image_size=16, timesteps=10, sampling_timesteps=2)
    optimize(diffusion, torch.bfloat16)
    assert diffusion.betas.dtype == torch.float32
    assert diffusion.sample(batch_size=2).shape == (2, 3, 16, 16)
    diffusion(torch.rand(2, 3, 16, 16)).backward()


def test_errors():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        optimize(make)
    with pytest.raises(TypeError, match="OptimizedModule wraps"):
        optimize(torch.compile(Plain()))
    with pytest.raises(ValueError, match=r"dtype must be floating, got torch\.int64"):
        optimize(Plain(), torch.int64)
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(ValueError, match="load its weights first"):
        optimize(model)
    model = optimize(Plain())
    with pytest.raises(ValueError, match=r"optimised already: ddpm_fast\.restore it first"):
        optimize(model)
    with pytest.raises(ValueError, match="optimised already"):
        optimize(nn.Sequential(model))
    with pytest.raises(ValueError, match="not optimised"):
        restore(Plain())
    with pytest.raises(RuntimeError, match="channels"):
        model[1](torch.randn(2, 8, 4, 4))


def test_the_dtype_is_chosen_for_float32_models_alone():
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert next(optimize(Plain()).parameters()).dtype == (torch.bfloat16 if fast else torch.float32)
    assert next(optimize(Plain().double()).parameters()).dtype == torch.float64
    mixed = Plain()
    mixed[0].half()
    optimize(mixed)
    assert (mixed[0].weight.dtype, mixed[1].weight.dtype) == (torch.float16, torch.float32)


def test_norms_that_do_more_than_cast_are_left_alone():
    class Doubled(nn.GroupNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class OtherEps(nn.GroupNorm):
        def forward(self, x):
            return F.group_norm(x, self.num_groups, self.weight, self.bias, 0.5)

    class Strange(nn.GroupNorm):
        def forward(self, x, y):
            return super().forward(x)

    model = nn.Sequential(
        Doubled(2, 8), OtherEps(2, 8), Strange(2, 8), nn.GroupNorm(2, 8, affine=False), GroupNorm32(2, 8)
    )
    optimize(model)
    assert [isinstance(m, PendingGroupNorm) for m in model] == [False] * 4 + [True]


def test_an_optimizer_that_has_moments_goes_on_as_before():
    """PyTorch's fused AdamW goes by the order in memory, and would mix the elements of a reordered weight."""

    def trained(change):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for step in range(6):
            if step == 3:
                change(model)
            model(torch.randn(2, 4, 8, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    expected = trained(lambda model: model)
    found = trained(lambda model: optimize(model, torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # a step moves an element by 1e-2
