"""The dtype that an optimised model says, and what `restore` makes of models that were changed since."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from ddpm_fast import optimize, restore

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", exc_type=ImportError)


def unet_of(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).eval()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.time = nn.Linear(8, 16)
        self.norm = nn.GroupNorm(4, 16)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, x, t):
        embedding = torch.outer(t.float() / 1000, torch.arange(8.0)).sin()
        h = self.conv_in(x) + self.time(embedding)[:, :, None, None]
        return self.conv_out(nn.functional.silu(self.norm(h)))


class Adapter(nn.Module):
    """Low-rank adapter: wraps a layer, and makes its own weights in the dtype of the layer's."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        convolution = isinstance(base, nn.Conv2d)
        outer = base.weight.shape[:2][::-1]
        self.down = nn.Conv2d(outer[0], 2, 1) if convolution else nn.Linear(outer[0], 2)
        self.up = nn.Conv2d(2, outer[1], 1) if convolution else nn.Linear(2, outer[1])
        self.to(base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x.to(self.base.weight.dtype)))


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([7, 999])


def predict(model):
    with torch.no_grad():
        return model(*inputs())


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("pipeline", ["DDPM", "DDIM"])
def test_a_pipeline_of_diffusers_keeps_its_state_in_float32(diffusers, pipeline):
    unet = unet_of(diffusers)
    scheduler = getattr(diffusers, f"{pipeline}Scheduler")()
    pipe = getattr(diffusers, f"{pipeline}Pipeline")(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(2, generator=generator, num_inference_steps=4, output_type="np").images)

    def by_hand():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 8, 8, generator=generator)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            with torch.no_grad():
                x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    exact = images()
    optimize(unet, torch.bfloat16)
    assert unet.dtype == torch.float32
    assert unet.conv_in.weight.dtype == torch.bfloat16
    found = images()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(), rtol=0, atol=1e-6)
    assert relative(found, exact) < 0.05
    assert pipe(num_inference_steps=1).images[0].size == (8, 8)
    restore(unet)
    assert torch.equal(images(), exact)


def test_a_model_says_the_dtype_that_it_is_called_with():
    model = optimize(Small(), torch.bfloat16)
    assert model.dtype == torch.float32
    assert predict(model).dtype == torch.float32
    assert copy.deepcopy(model).dtype == torch.float32
    assert model.half().dtype == torch.float16  # what the user asks for since
    assert optimize(Small(), torch.float32).dtype == torch.float32
    assert restore(optimize(Small(), torch.bfloat16)).dtype == torch.float32


def test_within_a_call_a_model_says_the_dtype_that_it_computes_in():
    seen = []

    class Asking(Small):
        def forward(self, x, t):
            seen.append((self.dtype, x.dtype))
            return super().forward(x, t)

    predict(optimize(Asking(), torch.bfloat16))
    assert seen == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_weights_converted_since_have_their_former_bits_again(dtype):
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    restore(optimize(model, torch.bfloat16).to(dtype))
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_around_layers_work_and_restore_undoes_all(dtype):
    model = Small().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimize(model, dtype)
    for name in ("conv_in", "time"):
        setattr(model, name, Adapter(getattr(model, name)))
    adapted = predict(model)
    restore(model)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert [type(m) for m in (model, model.conv_in.base, model.time.base, model.norm, model.conv_out)] == [
        Small,
        nn.Conv2d,
        nn.Linear,
        nn.GroupNorm,
        nn.Conv2d,
    ]
    for key, value in model.state_dict().items():
        if key.replace(".base", "") in before:
            assert torch.equal(value, before[key.replace(".base", "")])
    assert relative(adapted, predict(model)) < 8 * torch.finfo(dtype).eps


def test_layerwise_casting_of_an_optimised_model(diffusers):
    unet = unet_of(diffusers)
    exact = predict(unet).sample
    optimize(unet, torch.bfloat16)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    y = predict(unet).sample
    assert y.dtype == torch.float32
    assert relative(y, exact) < 20**0.5 * torch.finfo(torch.float8_e4m3fn).eps
    restore(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: parametrize.register_parametrization(m.conv_in, "weight", nn.Identity()), "class of conv_in"),
        (lambda m: prune.random_unstructured(m.conv_in, "weight", 0.5), "weight of conv_in was removed"),
        (lambda m: m.conv_in.to_empty(device="meta"), "weight of conv_in is on the meta device"),
    ],
    ids=["parametrized", "pruned", "offloaded"],
)
def test_what_cannot_be_restored_is_an_error_before_anything_changes(change, message):
    model = optimize(Small(), torch.bfloat16)
    change(model)
    before = [(type(m), {k: id(v) for k, v in m.named_parameters(recurse=False)}) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        restore(model)
    assert before == [(type(m), {k: id(v) for k, v in m.named_parameters(recurse=False)}) for m in model.modules()]
    assert model.time.weight.dtype == torch.bfloat16
