"""`ddpm_fast.optimize` on other people's networks: the same numbers, fused, and back again."""

import copy
import io
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ddpm_fast import GaussianDiffusion, UNet, optimize, restore
from ddpm_fast.nn import packed_weights as packing

pytestmark = pytest.mark.filterwarnings("ignore")


# Networks


class GroupNorm32(nn.GroupNorm):
    """As in openai/guided-diffusion."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class OpenAIBlock(nn.Module):
    """The structure of guided-diffusion's ResBlock and AttentionBlock."""

    def __init__(self, channels, out_channels, emb, act, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(GroupNorm32(8, channels), act(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(act(), nn.Linear(emb, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(8, out_channels), act(), nn.Dropout(0.1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.skip = nn.Conv2d(channels, out_channels, 1)
        self.norm = GroupNorm32(8, out_channels)
        self.qkv = nn.Conv1d(out_channels, 3 * out_channels, 1)
        self.proj_out = nn.Conv1d(out_channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)
        emb = self.emb_layers(emb).type(h.dtype)[..., None, None]
        if self.scale_shift:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        h = self.skip(x) + h
        tokens = h.reshape(*h.shape[:2], -1)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, dim=1)
        a = torch.einsum("bct,bcs->bts", q, k / q.shape[1] ** 0.5).float().softmax(dim=-1).type(q.dtype)
        return (tokens + self.proj_out(torch.einsum("bts,bcs->bct", a, v))).reshape(h.shape)


class OpenAI(nn.Module):
    """The structure of guided-diffusion's UNetModel."""

    def __init__(self, act=nn.SiLU, scale_shift=True):
        super().__init__()
        self.dtype = torch.float32
        self.time_embed = nn.Sequential(nn.Linear(32, 64), act(), nn.Linear(64, 64))
        self.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        self.down = OpenAIBlock(32, 64, 64, act, scale_shift)
        self.pool = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.middle = OpenAIBlock(64, 64, 64, act, scale_shift)
        self.up = OpenAIBlock(128, 32, 64, act, scale_shift)
        self.out = nn.Sequential(GroupNorm32(8, 32), act(), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x, timesteps):
        frequencies = torch.exp(torch.arange(16) * -0.6)
        angles = timesteps[:, None].float() * frequencies[None]
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        h = skip = self.down(self.conv_in(x.type(self.dtype)), emb)
        h = F.interpolate(self.middle(self.pool(h), emb), scale_factor=2, mode="nearest")
        h = self.up(torch.cat([h, skip], dim=1), emb)
        return self.out(h.type(x.dtype))


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.SiLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
            nn.GroupNorm(2, 16),
            nn.SiLU(),
            nn.ConvTranspose2d(16, 3, 3, padding=1),
        )

    def forward(self, x, t):
        return super().forward(x) + t[:, None, None, None] / 1000


def diffusers_unet(**changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    arguments = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "attention_head_dim": None,
    }
    return diffusers.UNet2DModel(**(arguments | changes))


def lucidrains_unet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("denoising_diffusion_pytorch", exc_type=ImportError)
    return package.Unet(dim=32, dim_mults=(1, 2))


def ours():
    return UNet(image_size=16, dim=32, dim_mults=(1, 2), attention_resolutions=(8,), norm_groups=8)


NETWORKS = {
    "diffusers": diffusers_unet,
    "diffusers-scale-shift": lambda: diffusers_unet(resnet_time_scale_shift="scale_shift"),
    "diffusers-resample": lambda: diffusers_unet(downsample_type="resnet", upsample_type="resnet"),
    "lucidrains": lucidrains_unet,
    "openai": OpenAI,
    "openai-swish": lambda: OpenAI(act=Swish),
    "openai-no-scale": lambda: OpenAI(scale_shift=False),
    "plain": Plain,
    "ours": ours,
}
# Group norms whose SiLU is computed with them, and those that have none.
NORMS = {
    "diffusers": (17, 4),
    "diffusers-scale-shift": (17, 3),
    "diffusers-resample": (19, 4),
    "openai": (7, 3),
    "openai-swish": (7, 3),
    "openai-no-scale": (7, 3),
    "plain": (2, 0),
}


def make(name):
    """A network in which every layer has a say, in evaluation mode."""
    model = NETWORKS[name]().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            value = torch.randn(p.shape, generator=generator)
            spread = 0.2 if p.ndim == 1 else (1 / p[0].numel()) ** 0.5
            centre = 1 if (p.ndim == 1 and key.endswith("weight")) or key.endswith(".g") else 0
            p.copy_(centre + (0.1 if centre else spread) * value)
    return model


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) * 900 // max(n - 1, 1) + 97


def tensor_of(y):
    return y if isinstance(y, torch.Tensor) else y.sample


def predict(model, x, t):
    with torch.no_grad():
        return tensor_of(model(x, t))


def gradients(model, x, t):
    x = x.clone().requires_grad_()
    y = tensor_of(model(x, t))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    return {"x": x.grad.float()} | {k: p.grad.float() for k, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def in_plain_bfloat16(model):
    """What `model.bfloat16()` gives, where embeddings of t that are made in float32 are cast on their way."""
    model = copy.deepcopy(model).bfloat16()

    def cast(module, args):
        return tuple(a.bfloat16() if a.is_floating_point() else a for a in args)

    def cast_norm(module, args):
        return tuple(a.float() for a in args)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            module.register_forward_pre_hook(cast)
        if isinstance(module, GroupNorm32):
            module.float()
    return model


class Calls(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func._schema.name
        if kind == "ddpm_fast::group_norm_silu":
            kind += "(silu)" if args[7] else ""
        self.counts[kind] += 1
        return func(*args, **(kwargs or {}))


# The same numbers


@pytest.mark.parametrize("train", [False, True], ids=["inference", "grad"])
def test_in_float32_the_results_are_the_same(name, train):
    model, (x, t) = make(name), inputs()
    expected = gradients(model, x, t) if train else {"y": predict(model, x, t)}
    model.zero_grad()
    optimize(model, torch.float32)
    actual = gradients(model, x, t) if train else {"y": predict(model, x, t)}
    assert set(actual) == set(expected)
    for key, value in expected.items():
        # 40 layers of sums in another order, each to a few units of 2^-24. Some biases have no gradient but rounding.
        floor = 1e-5 * max(v.abs().max() for v in expected.values())
        torch.testing.assert_close(actual[key], value, rtol=1e-3, atol=float(floor), msg=key)


def test_in_bfloat16_the_error_is_no_larger_than_that_of_bfloat16(name):
    model, (x, t) = make(name), inputs(4)
    exact = predict(model, x, t)  # float32 is, next to bfloat16
    plain = predict(in_plain_bfloat16(model), x.bfloat16(), t)
    y = predict(optimize(model, torch.bfloat16), x, t)
    assert y.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert relative(y, exact) < 1.5 * relative(plain, exact)


def test_in_bfloat16_the_gradients_are_no_further_off_than_those_of_bfloat16(name):
    model, (x, t) = make(name), inputs(4)
    exact = gradients(model, x, t)
    plain = gradients(in_plain_bfloat16(model), x.bfloat16(), t)
    model.zero_grad()
    actual = gradients(optimize(model, torch.bfloat16), x, t)
    errors = [sum((g[k] - exact[k]).square().sum() for k in exact) ** 0.5 for g in (actual, plain)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "grad"])
def test_norm_and_activation_are_one_call(train):
    for name, (fused, alone) in NORMS.items():
        if name.startswith("diffusers"):
            pytest.importorskip("diffusers", exc_type=ImportError)
        model = optimize(make(name), torch.float32)
        with torch.set_grad_enabled(train), Calls() as calls:
            model(*inputs())
        assert calls.counts["ddpm_fast::group_norm_silu(silu)"] == fused, name
        assert calls.counts["ddpm_fast::group_norm_silu"] == alone, name
        assert not calls.counts["aten::native_group_norm"], name
        packed = calls.counts["mkldnn::_convolution_pointwise"]
        assert bool(packed) == (not train and torch.float32 in packing.DTYPES), name


@pytest.mark.parametrize("factor", [lambda s: 1 + s, lambda s: 0.03 * s], ids=["1 + scale", "another factor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_shift_are_fused_where_that_is_exact(dtype, factor):
    norm = optimize(nn.Sequential(nn.GroupNorm(4, 16)), dtype)[0]
    x, s = torch.randn(3, 16, 5, 5, dtype=dtype), torch.randn(3, 16, 1, 1, dtype=dtype)
    for factor_first in (False, True):
        with torch.no_grad(), Calls() as calls:
            f = factor(s)
            y = F.silu(s + f * norm(x) if factor_first else norm(x) * f + s)
        fused = factor(torch.zeros(())) == 1
        assert calls.counts["ddpm_fast::group_norm_silu(silu)"] == fused
        exact = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double()) * f.double() + s.double())
        torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("train", [False, True])
def test_images_are_channels_last_inside(train):
    model, seen = optimize(make("diffusers").train(train), torch.bfloat16), []

    def look(module, args, output):
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    with torch.set_grad_enabled(train):
        model(*inputs(64))  # where Upsample2D drops the format, as shortcuts do in training
    assert seen
    assert all(seen)


# What a group norm returns


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h + 1,
        lambda h: h.sigmoid() + h,
        lambda h: torch.sigmoid(h) * 2,
        lambda h: F.silu(h) + h,
        lambda h: F.silu(input=h),
        lambda h: h * h.mean(),
        lambda h: h * 2,
        lambda h: torch.add(h, h, alpha=3),
        lambda h: h.mul_(2) + F.silu(h),
        lambda h: [F.silu(h, inplace=True), h][1],
        lambda h: (h * h.new_ones(2, 8, 1, 1)).add(1),
        lambda h: torch.cat([h, h]),
        lambda h: h.flatten(2).transpose(1, 2).contiguous(),
        lambda h: copy.deepcopy(h.detach()),
        lambda h: torch.stack(list(h)),
        lambda h: h[:, :3].clone(),
        lambda h: torch.ops.aten.silu(h),
        lambda h: torch.jit.script(nn.SiLU())(h.detach()),
        lambda h: h.new_zeros(h.shape) + torch.from_numpy(h.detach().numpy()),
        lambda h: checkpoint(lambda v: F.silu(v) * 2, h, use_reentrant=False),
        lambda h: torch.where(h > 0, h, 0 * h),
    ],
)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "grad"])
def test_any_code_may_follow_a_norm(use, train):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_(train)
    plain = nn.Sequential(nn.GroupNorm(2, 8))
    norm = optimize(copy.deepcopy(plain), torch.float32)[0]
    results = []
    for module in (norm, plain[0]):
        with torch.set_grad_enabled(train):
            y = use(module(x))
            assert type(y) in (torch.Tensor, type(norm(x)))
            gradient = torch.autograd.grad(y.sin().sum(), (x, *module.parameters())) if y.requires_grad else ()
        results.append((y + 0, *gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_metadata_of_a_norm_is_known_before_it_is_computed():
    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    x = torch.randn(2, 8, 6, 6)
    views = [x, x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x[:1], x.flatten(2)]
    views += [x.contiguous(memory_format=torch.channels_last).flatten(2), x.flatten(2)[:, :, ::2]]
    for view in views:
        with Calls() as calls, torch.no_grad():
            h = norm(view)
            known = (h.shape, h.dtype, h.device, h.ndim, h.size(0), len(h), h.stride(), h.is_contiguous(), h.numel())
        assert not calls.counts["ddpm_fast::group_norm_silu"]
        with torch.no_grad():
            y = h + 0 if view.dim() == 3 else h.view_as(h)
        assert (y.shape, y.dtype, y.device, y.ndim, y.size(0), len(y)) == known[:6]
        assert h.compute().stride() == known[6]


def test_an_input_changed_in_between_is_an_error_and_not_a_wrong_number():
    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        h = norm(x)
        x += 1
        with pytest.raises(RuntimeError, match="written to between the group norm"):
            F.silu(h)


@pytest.mark.parametrize("at_norm", [False, True])
def test_gradients_are_those_of_the_mode_that_each_operation_is_in(at_norm):
    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    for use in (F.silu, torch.sigmoid, lambda h: h * h.new_ones(2, 8, 1, 1) + h.new_ones(2, 8, 1, 1)):
        with torch.set_grad_enabled(at_norm):
            h = norm(torch.randn(2, 8, 6, 6))
        with torch.set_grad_enabled(not at_norm):
            y = use(h) + 0
        assert not y.requires_grad
        assert (h + 0).requires_grad == at_norm


def test_a_gradient_that_would_be_lost_is_an_error():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    x = torch.randn(2, 8, 6, 6)
    y = Twice.apply(norm(x))
    torch.testing.assert_close(y, 2 * (norm(x) + 0))
    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        y.sum().backward()


def test_what_comes_out_of_a_model_is_computed():
    model = optimize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)), torch.float32)
    assert type(model(inputs()[0])) is torch.Tensor
    model = optimize(nn.Sequential(nn.Embedding(9, 8), nn.Flatten(2), nn.GroupNorm(2, 8)), torch.float32)
    assert type(model(torch.arange(8)[None])) is torch.Tensor  # nothing is cast


def test_hooks_see_tensors():
    model, (x, t), seen = optimize(make("openai"), torch.float32), inputs(), []
    expected = predict(model, x, t)
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: seen.append(output))
        module.register_forward_pre_hook(lambda m, args: seen.extend(args))
    y = predict(model, x, t)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert seen
    assert all(type(v) is torch.Tensor for v in seen)


def test_backward_hooks_of_norms_and_blocks_see_gradients():
    model, (x, t), seen = optimize(make("openai"), torch.float32), inputs(), []
    expected = gradients(model, x, t)
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.Conv2d | OpenAIBlock):
            module.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_output[0]))
    for key, value in gradients(model, x, t).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
    assert len(seen) == 7 + 3 + 3 * 3 + 3 + 3


# Back again


def test_restore_gives_back_what_was(name):
    model, (x, t) = make(name), inputs()
    before = {k: (v.clone(), v.stride(), v.dtype) for k, v in model.state_dict().items()}
    kinds, expected, ids = [type(m) for m in model.modules()], predict(model, x, t), [id(p) for p in model.parameters()]
    optimize(model, torch.bfloat16)
    assert list(model.state_dict()) == list(before)
    assert [id(p) for p in model.parameters()] == ids
    predict(model, x, t)
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert [id(p) for p in model.parameters()] == ids
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key][0])
        assert (value.stride(), value.dtype) == before[key][1:]
    assert torch.equal(predict(model, x, t), expected)
    assert not [key for key in vars(model) if "ddpm_fast" in key]


def test_weights_that_need_no_change_keep_their_memory():
    model = make("plain")
    before = {k: p.data_ptr() for k, p in model.named_parameters()}
    optimize(model, torch.float32)
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == before
    restore(model)
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == before


def test_changed_weights_are_converted_back_and_others_restored():
    model = make("plain")
    first, second = model[0].weight.clone(), model[3].weight.clone()
    optimize(model, torch.bfloat16)
    with torch.no_grad():
        model[0].weight.mul_(2)
    changed = model[0].weight.float()
    restore(model)
    assert torch.equal(model[0].weight, changed)
    assert not torch.equal(changed, 2 * first)
    assert model[0].weight.is_contiguous()
    assert torch.equal(model[3].weight, second)


def test_gradients_follow_their_weights():
    model = make("plain")
    gradients(model, *inputs())
    before = model[0].weight.grad.clone()
    optimize(model, torch.bfloat16)
    assert torch.equal(model[0].weight.grad, before.bfloat16())
    restore(model)
    assert model[0].weight.grad.dtype == torch.float32


# Weights that change


def test_training_changes_the_weights_and_inference_sees_it(name):
    model, (x, t) = optimize(make(name), torch.float32), inputs()
    before = predict(model, x, t)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tensor_of(model(x, t)).square().mean().backward()
    optimizer.step()
    model.eval()
    after = predict(model, x, t)
    assert relative(after, before) > 1e-2
    torch.testing.assert_close(after, predict(restore(model), x, t), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["copy_", "lerp_", "assign", "load_state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_written_to_behind_its_back_are_seen(how, dtype):
    model, (x, t) = optimize(make("openai"), dtype), inputs()
    predict(model, x, t)
    if how == "load_state_dict":
        model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    for p in model.parameters() if how != "load_state_dict" else ():
        if how == "assign":
            p.data = p.data * 1.5
        elif how == "copy_":
            p.data.copy_(p.data * 1.5)
        else:
            p.data.lerp_(p.data * 6, 0.1)
    actual = predict(model, x, t)
    fresh = copy.deepcopy(model)
    assert torch.equal(actual, predict(fresh, x, t))


def test_an_unchanged_model_is_packed_once(monkeypatch):
    model, (x, t) = optimize(make("openai"), torch.float32), inputs()
    predict(model, x, t)

    def refuse(*args):
        raise AssertionError("packed again")

    monkeypatch.setattr(packing, "_some_of", refuse)
    for _ in range(3):
        predict(model, x, t)
    restore(model)


# Copies, wrappers, other modes


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
def test_torch_compile_goes_around_it(name):
    model, (x, t) = make(name), inputs()
    expected = predict(model, x, t)
    compiled = torch.compile(optimize(model, torch.float32), backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, x, t), expected, rtol=1e-3, atol=1e-4)
    gradients(compiled, x, t)
    torch._dynamo.reset()


def test_distributed_data_parallel_goes_around_it(tmp_path):
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


# Errors, and what is left alone


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
    replaced = Plain()
    replaced.forward = replaced.forward
    with pytest.raises(ValueError, match="was replaced on this very object"):
        optimize(replaced)
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
    kinds = [type(m) for m in model]
    optimize(model)
    assert [type(m) is kind for m, kind in zip(model, kinds, strict=True)] == [True] * 4 + [False]


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
