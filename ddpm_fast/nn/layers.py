"""The blocks of the U-Net. All tensors are channels-last, (N, C, H, W) over (N, H, W, C)."""

__all__ = ["Attention", "Downsample", "GroupNorm", "ResidualBlock", "TimeEmbedding", "Upsample", "all_kept"]

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.layout import eager_on_cpu
from .packed_weights import Conv2d, Linear

_all_kept: ContextVar[bool] = ContextVar("all is kept", default=False)


@contextmanager
def all_kept() -> Iterator[None]:
    """Within this context, norms are not made again: for gradient checkpointing, which would find their x in use."""
    token = _all_kept.set(True)
    try:
        yield
    finally:
        _all_kept.reset(token)


class GroupNorm(nn.GroupNorm):
    """Group norm and, unless `silu=False`, SiLU after it."""

    def __init__(self, groups: int, channels: int, eps: float, *, silu: bool = True) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)

    def remade(self, x: Tensor, y: Tensor) -> AbstractContextManager[None]:
        """Within this context, what is saved for the backward pass holds x where it would hold y, which is `self(x)`.

        y is made from x again when it is needed. That is a small part of the work of what comes after a norm, and saves
        every second image of a network.
        """
        if not y.requires_grad or torch.compiler.is_compiling() or _all_kept.get():
            return nullcontext()
        place, dtype = y.data_ptr(), y.dtype

        def pack(saved: Tensor) -> Tensor | tuple:
            if saved.data_ptr() == place and saved.dtype == dtype and saved.numel() == x.numel():
                return saved.shape, saved.stride()
            return saved

        def unpack(kept: Tensor | tuple) -> Tensor:
            # With create_graph, gradients are on here, and the graph goes on through x. Autocast is off.
            return kept if isinstance(kept, Tensor) else self(x).to(dtype).as_strided(*kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class TimeEmbedding(nn.Module):
    """Sinusoids of t and two linear layers. Vaswani et al. (2017), sec. 3.5, the sines first; Ho et al. (2020), B."""

    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__()
        self.half = dim // 2
        self.linear_1 = Linear(dim, time_dim)
        self.linear_2 = Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        # In float32, made here: a buffer would follow the model into half precision.
        step = -math.log(10000) / max(self.half - 1, 1)
        frequencies = (torch.arange(self.half, device=t.device) * step).exp()
        angles = t.float()[:, None] * frequencies  # (N, dim / 2)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))  # (N, time_dim)


class Dropout(nn.Dropout):
    """nn.Dropout of (N, C, H, W); on a CPU in a seventh of its time, with p rounded to 16 bits.

    PyTorch draws a number of 32 bits for each element there, one by one; here, 64 bits decide on four.
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

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """
        Args:
            time: (N, out_channels), added to what conv1 gives; or (out_channels,), which stands in for its bias: of
                all samples alike, without a pass over the images.
        """
        y = self.norm1(x)
        with self.norm1.remade(x, y):
            h = self.conv1(y, bias=time if time.dim() == 1 else None)
        if time.dim() > 1:
            h = h + time[:, :, None, None]
        y, shortcut = self.norm2(h), self.shortcut(x)
        with self.norm2.remade(h, y):
            return self.conv2(self.dropout(y), plus=shortcut, overwrite=shortcut is not x)


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual. One product makes q, k and v."""

    def __init__(self, channels: int, *, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps, silu=False)
        self.qkv = Linear(channels, 3 * channels)
        self.out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x)
        with self.norm.remade(x, y):
            qkv = self.qkv(y.permute(0, 2, 3, 1).reshape(n, h * w, c))  # a view of channels-last memory
        q, k, v = (part.view(n, h * w, self.heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, H * W, C / heads)
        y = self.out(y.transpose(1, 2).reshape(n, h * w, c))
        return x + y.view(n, h, w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves H and W by a strided convolution, padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles H and W: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
