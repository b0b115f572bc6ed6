"""The blocks of the U-Net. All images are channels-last: (N, C, H, W) with the strides of (N, H, W, C)."""

__all__ = [
    "Attention",
    "Downsample",
    "Dropout",
    "GroupNorm",
    "ResidualBlock",
    "TimeEmbedding",
    "Upsample",
    "recomputed",
    "unhooked",
    "weight_dtype",
]

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import ops
from ..ops.layout import eager_on_cpu
from ..ops.transforms import transformed
from .packed_weights import Conv2d, Linear


def unhooked(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else: no subclass, no wrapper and no hook."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and not nn.modules.module._has_any_global_hook()
    )


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


class GroupNorm(nn.GroupNorm):
    """Group norm and, unless `silu=False`, SiLU after it."""

    def __init__(self, groups: int, channels: int, eps: float, *, silu: bool = True) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)


class _Versioned(NamedTuple):
    """A saved tensor and its version, since autograd checks no versions where there are saved-tensor hooks."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor) -> "_Versioned":
        return cls(x, x._version)

    def get(self) -> Tensor:
        x = self.tensor
        if x._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{x.type()} {list(x.shape)}] is at version {x._version}; expected version {self.version} instead"
            )
        return x


class _View(NamedTuple):
    """What is kept of a saved view of y, of all or some of its elements."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def recomputed(norm: nn.Module, x: Tensor, y: Tensor) -> AbstractContextManager[None]:
    """A context for the layers that take y = norm(x): autograd saves x; y is recomputed in the backward pass.

    The norm saves x anyway, so that y costs no memory, for about 1 % of a training step. y is computed from the
    tensors that the norm was given (x and its parameters at that time), whose versions are checked, and never by
    calling the module again. y is saved as usual where it could be something else: a norm of another class or with
    hooks, y written to in place. It is too where saved-tensor hooks cannot be used (torch.compile, torch.func,
    forward-mode derivatives) or are used already (gradient checkpointing, `save_on_cpu`).
    """
    if (
        not y.requires_grad
        or torch.compiler.is_compiling()
        or not unhooked(norm, GroupNorm)
        or type(y) is not Tensor
        or transformed()
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return nullcontext()
    inputs = [_Versioned.of(v) for v in (x, norm.weight, norm.bias)]
    groups, eps, silu = norm.num_groups, norm.eps, norm.silu
    # Autograd keeps these functions: they hold no memory of y, but its storage object, whose address stays its own.
    storage, version = StorageWeakRef(y.untyped_storage()), y._version
    dtype = y.dtype

    def pack(saved: Tensor) -> _Versioned | _View:
        if saved._version == version and saved.dtype == dtype and saved.untyped_storage()._cdata == storage.cdata:
            return _View(saved.shape, saved.stride(), saved.storage_offset())
        return _Versioned.of(saved)

    def unpack(kept: _Versioned | _View) -> Tensor:
        if isinstance(kept, _Versioned):
            return kept.get()
        # With create_graph, gradients are on here, and the graph goes on through x and the parameters.
        again = ops.group_norm_silu(*(v.get() for v in inputs), groups, eps, silu=silu)
        return again.as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


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
            time: (N, out_channels) or (1, out_channels), added to the result of conv1; or (out_channels,), which
                replaces conv1's bias when all samples share t: without a pass over the images. The latter only if
                `takes_bias`.
        """
        y = self.norm1(x)
        with recomputed(self.norm1, x, y):
            h = self.conv1(y) if time.dim() > 1 else self.conv1(y, bias=time)
        if time.dim() > 1:
            h = h + time[:, :, None, None]
        y, shortcut = self.norm2(h), self.shortcut(x)
        with recomputed(self.norm2, h, y):
            y = self.dropout(y)
            if unhooked(self.conv2, Conv2d):
                new = unhooked(self.shortcut, Conv2d)  # and nobody else has it
                return self.conv2(y, plus=shortcut, overwrite=new)
            return self.conv2(y) + shortcut


class Attention(nn.Module):
    """Self-attention over all pixels, added to x. One linear layer computes q, k and v."""

    def __init__(self, channels: int, *, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps, silu=False)
        self.qkv = Linear(channels, 3 * channels)
        self.out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x)
        with recomputed(self.norm, x, y):
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
    """Doubles H and W: nearest-neighbour upsampling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
