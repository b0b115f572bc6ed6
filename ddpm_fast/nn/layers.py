"""The blocks of the U-Net. All images are channels-last: (N, C, H, W) with the strides of (N, H, W, C)."""

__all__ = ["Attention", "Downsample", "Dropout", "ResidualBlock", "TimeEmbedding", "Upsample", "weight_dtype"]

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layout import eager_on_cpu
from .deferred_sum import DeferredSum, convolved, normalised, normalised_alone, pointwise
from .group_norm import GroupNorm, recomputed, unhooked
from .packed_weights import Conv2d, Linear


def weight_dtype(layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a layer, or the one that is wrapped in it, takes its input in.

    Args:
        default: for layers that do not tell: without floating weights (quantised), or with weights that are only
            stored in their dtype (float8) and converted when the layer is called.
    """
    weight = getattr(layer, "weight", None)
    for p in (weight,) if isinstance(weight, Tensor) else layer.parameters():
        if p.is_floating_point() and p.dtype.itemsize > 1:
            return p.dtype
        break
    return default


class TimeEmbedding(nn.Module):
    """Sinusoids of t and two linear layers. Vaswani et al. (2017), sec. 3.5, the sines first; Ho et al. (2020), B."""

    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__()
        self.half = dim // 2
        self.linear_1 = Linear(dim, time_dim)
        self.linear_2 = Linear(time_dim, time_dim)

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """
        Args:
            t: (N,).
            dtype: of the embedding where `linear_1` has no weights that tell it.
        """
        # In float32, made here: a buffer would follow the model into half precision.
        step = -math.log(10000) / max(self.half - 1, 1)
        frequencies = (torch.arange(self.half, device=t.device) * step).exp()
        angles = t.float()[:, None] * frequencies  # (N, dim / 2)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1).to(weight_dtype(self.linear_1, dtype))
        return self.linear_2(F.silu(self.linear_1(embedding)))  # (N, time_dim)


class Dropout(nn.Dropout):
    """nn.Dropout of (N, C, H, W); on a CPU in a seventh of its time, with p rounded to 16 bits.

    PyTorch draws 32 bits for each element there, one after the other; here, 64 random bits serve four elements.
    """

    def forward(self, x: Tensor) -> Tensor:
        levels = 1 << 16
        dropped = round(self.p * levels)
        if not (self.training and 0 < dropped < levels and eager_on_cpu(x)):
            return super().forward(x)
        n, c, h, w = x.shape
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
        factors = torch.empty(n, h, w, c, dtype=x.dtype, device="cpu")
        torch.ge(draws.view(torch.int16)[: x.numel()], dropped - levels // 2, out=factors.view(-1))
        return x * factors.mul_(levels / (levels - dropped)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(dropout(SiLU(norm(conv(SiLU(norm(x))) + time)))), `time` being the block's own projection of t."""

    def __init__(self, channels: int, out_channels: int, *, groups: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def takes_bias(self) -> bool:
        """Whether conv1 can be given another bias: not when it is wrapped (by LoRA, say), replaced or hooked."""
        if torch.compiler.is_compiling() and torch.__version__ < (2, 13):
            return False  # a bias that is a slice, which TorchInductor of torch 2.11 has no code for
        return unhooked(self.conv1, Conv2d) and self.conv1.bias is not None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """
        Args:
            time: (N, out_channels), or (out_channels,) where all samples share t; added to the result of conv1. It
                replaces conv1's bias if `takes_bias`, so that it costs no pass over the images.
        """
        return self.deferred(DeferredSum(x), time)[0].tensor()

    def deferred(self, x: DeferredSum, time: Tensor, skip: Tensor | None = None) -> tuple[DeferredSum, Tensor]:
        """What `forward` returns, not added yet; and its input as a tensor: cat([x, skip])."""
        y, x, statistics = normalised(self.norm1, x, skip)
        with recomputed(self.norm1, x, y, statistics):
            h = convolved(self.conv1, y, bias=time) if self.takes_bias() else DeferredSum(self.conv1(y), time)
        y, h, statistics = normalised_alone(self.norm2, h)
        shortcut = pointwise(self.shortcut, x)
        new = unhooked(self.shortcut, Conv2d)  # and nobody else has it
        with recomputed(self.norm2, h.x, y, statistics, h.bias):
            return convolved(self.conv2, self.dropout(y), plus=shortcut, overwrite=new), x


class Attention(nn.Module):
    """Self-attention over all pixels, added to x. One linear layer computes q, k and v."""

    def __init__(self, channels: int, *, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps, silu=False)
        self.qkv = Linear(channels, 3 * channels)
        self.out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.deferred(DeferredSum(x)).tensor()

    def deferred(self, x: DeferredSum) -> DeferredSum:
        """What `forward` returns, not added yet."""
        y, x, statistics = normalised(self.norm, x)
        n, c, h, w = x.shape
        with recomputed(self.norm, x, y, statistics):
            qkv = self.qkv(y.permute(0, 2, 3, 1).reshape(n, h * w, c))  # a view of channels-last memory
        q, k, v = (part.view(n, h * w, self.heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, H * W, C / heads)
        y = self.out(y.transpose(1, 2).reshape(n, h * w, c))
        return DeferredSum(y.view(n, h, w, c).permute(0, 3, 1, 2), residual=x)


class Downsample(nn.Module):
    """Halves H and W by a strided convolution, padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.deferred(x).tensor()

    def deferred(self, x: Tensor) -> DeferredSum:
        return convolved(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles H and W: nearest-neighbour upsampling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.deferred(x).tensor()

    def deferred(self, x: Tensor) -> DeferredSum:
        return convolved(self.conv, F.interpolate(x, scale_factor=2, mode="nearest"))
