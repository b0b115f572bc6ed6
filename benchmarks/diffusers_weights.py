"""The network of a preset in diffusers, and the names that its weights have in `UNet`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast import UNet
from ddpm_fast.nn.unet import PRESETS


def unet_2d_config(preset: str) -> dict[str, Any]:
    """The arguments of a UNet2DModel with the structure of the preset; without dropout, which diffusers defaults to."""
    given = PRESETS[preset]
    size, channels, dim = given["image_size"], given.get("channels", 3), given.get("dim", 128)
    attending = [size >> level in given["attention_resolutions"] for level in range(len(given["dim_mults"]))]
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": tuple(dim * mult for mult in given["dim_mults"]),
        "down_block_types": tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attending),
        "up_block_types": tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attending)),
        "layers_per_block": given.get("num_res_blocks", 2),
        "norm_num_groups": given.get("norm_groups", 32),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


def to_ddpm_fast(source: nn.Module, target: UNet) -> None:
    """Copies the weights of a UNet2DModel into a UNet of the same structure."""
    target.load_state_dict(renamed(source.state_dict(), target))


def renamed(weights: Mapping[str, Tensor], target: UNet) -> dict[str, Tensor]:
    """A UNet2DModel's weights, or their gradients, under the names of a UNet of the same structure."""
    weights = dict(weights)
    state = {}

    def move(here, there):
        for kind in ("weight", "bias"):
            state[f"{here}.{kind}"] = weights.pop(f"{there}.{kind}")

    def block(here, there):
        for a, b in (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2")):
            move(f"{here}.{a}", f"{there}.{b}")
        if f"{there}.conv_shortcut.weight" in weights:
            move(f"{here}.shortcut", f"{there}.conv_shortcut")
        times.append([weights.pop(f"{there}.time_emb_proj.{kind}") for kind in ("weight", "bias")])

    def attention(here, there):
        if f"{there}.to_q.weight" not in weights:
            return
        move(f"{here}.norm", f"{there}.group_norm")
        move(f"{here}.out", f"{there}.to_out.0")
        for kind in ("weight", "bias"):
            state[f"{here}.qkv.{kind}"] = torch.cat([weights.pop(f"{there}.to_{name}.{kind}") for name in "qkv"])

    times = []
    move("time_embedding.linear_1", "time_embedding.linear_1")
    move("time_embedding.linear_2", "time_embedding.linear_2")
    move("conv_in", "conv_in")
    for side, resample in (("down", "downsamplers"), ("up", "upsamplers")):
        for i, level in enumerate(getattr(target, side)):
            for j in range(len(level.blocks)):
                block(f"{side}.{i}.blocks.{j}", f"{side}_blocks.{i}.resnets.{j}")
                attention(f"{side}.{i}.attentions.{j}", f"{side}_blocks.{i}.attentions.{j}")
            if level.resample is not None:
                move(f"{side}.{i}.resample.conv", f"{side}_blocks.{i}.{resample}.0.conv")
        if side == "down":
            block("mid_block1", "mid_block.resnets.0")
            attention("mid_attention", "mid_block.attentions.0")
            block("mid_block2", "mid_block.resnets.1")
    move("norm_out", "conv_norm_out")
    move("conv_out", "conv_out")
    state["time_projection.weight"], state["time_projection.bias"] = (
        torch.cat(parts) for parts in zip(*times, strict=True)
    )
    assert not weights  # each was moved once
    return state
