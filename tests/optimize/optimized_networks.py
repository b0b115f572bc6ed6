"""Networks for the tests of `optimize`, and what they are judged by."""

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import UNet


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
