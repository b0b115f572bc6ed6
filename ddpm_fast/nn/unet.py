"""The U-Net of the DDPM paper, channels-last throughout. Ho et al. (2020), appendix B."""

__all__ = ["PRESETS", "UNet"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from ..checks import finite, integer, integers
from .deferred_sum import DeferredSum, convolved, normalised_alone
from .group_norm import GroupNorm, unhooked
from .layers import Attention, Downsample, ResidualBlock, TimeEmbedding, Upsample, weight_dtype
from .packed_weights import Conv2d, Linear

PRESETS: dict[str, dict[str, Any]] = {
    # The networks of the paper: CIFAR-10; CelebA-HQ and LSUN at 256 x 256.
    "ddpm-cifar10-32": {"image_size": 32, "dim_mults": (1, 2, 2, 2), "attention_resolutions": (16,), "dropout": 0.1},
    "ddpm-256": {"image_size": 256, "dim_mults": (1, 1, 2, 2, 4, 4), "attention_resolutions": (16,)},
    # Small ones, for a CPU: the 8 x 8 digits of scikit-learn, and images like MNIST's.
    "digits-8": {
        "image_size": 8, "channels": 1, "dim": 32, "dim_mults": (1, 2), "num_res_blocks": 1,
        "attention_resolutions": (4,), "norm_groups": 8,
    },
    "mnist-28": {
        "image_size": 28, "channels": 1, "dim": 32, "dim_mults": (1, 2, 2), "num_res_blocks": 1,
        "attention_resolutions": (7,), "norm_groups": 8,
    },
}  # fmt: skip


class UNet(nn.Module):
    """Predicts from x_t and t. `UNet.preset` makes well-known ones.

    Args:
        image_size: H = W; divisible by 2 for each level after the first.
        channels: of the images.
        learned_variance: predict the variance too, in as many channels more.
        dim: channels of the first level, even.
        dim_mults: channels of each level, as multiples of dim. Each level after the first has half the resolution.
        num_res_blocks: residual blocks a level, on the way down; one more on the way up.
        attention_resolutions: H of the levels whose blocks are followed by attention.
        num_heads: of attention; divides the channels of those levels.
        dropout: before the last convolution of a residual block.
        norm_groups: groups of the group norms; divides dim.
        norm_eps: added to the variance in group norm.
        gradient_checkpointing: keep what enters a block for the backward pass, and compute the block again then: a
            third more work, for a fraction of the memory.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        learned_variance: bool = False,
        dim: int = 128,
        dim_mults: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        dropout: float = 0.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "channels": channels, "dim": dim, "num_res_blocks": num_res_blocks}
        sizes |= {"num_heads": num_heads, "norm_groups": norm_groups}
        sizes = {name: integer(name, value, 1) for name, value in sizes.items()}
        image_size, channels, dim, num_res_blocks, num_heads, norm_groups = sizes.values()
        dim_mults = integers("dim_mults", dim_mults, 1)
        attention_resolutions = integers("attention_resolutions", attention_resolutions, 1)
        if not dim_mults:
            raise ValueError("dim_mults must have one multiple of dim for each level, at least one; got none")
        norm_eps, dropout = finite("norm_eps", norm_eps, 0), finite("dropout", dropout, 0)
        if not norm_eps:
            raise ValueError("norm_eps must be above 0, got 0")
        if dropout >= 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.image_size = image_size
        self.channels = channels
        self.gradient_checkpointing = gradient_checkpointing
        self.factor = 2 ** (len(dim_mults) - 1)
        dims = [dim * mult for mult in dim_mults]
        resolutions = [image_size >> level for level in range(len(dims))]
        _check_sizes(image_size, self.factor, dim, dims, resolutions, attention_resolutions, num_heads, norm_groups)

        def block(c: int, c_out: int) -> ResidualBlock:
            return ResidualBlock(c, c_out, groups=norm_groups, eps=norm_eps, dropout=dropout)

        def attention(c: int, resolution: int | None = None) -> nn.Module:
            if resolution is None or resolution in attention_resolutions:
                return Attention(c, heads=num_heads, groups=norm_groups, eps=norm_eps)
            return nn.Identity()

        self.time_embedding = TimeEmbedding(dim, 4 * dim)
        self.conv_in = Conv2d(channels, dim, 3, padding=1)

        c, skips = dim, [dim]  # channels of h, and of every state kept for the way up
        self.down = nn.ModuleList()
        for level, (c_out, resolution) in enumerate(zip(dims, resolutions, strict=True)):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                blocks.append(block(c, c_out))
                attentions.append(attention(c_out, resolution))
                c = c_out
                skips.append(c)
            last = level == len(dims) - 1
            self.down.append(_Level(blocks, attentions, None if last else Downsample(c)))
            if not last:
                skips.append(c)

        self.mid_block1, self.mid_attention, self.mid_block2 = block(c, c), attention(c), block(c, c)

        self.up = nn.ModuleList()
        for level, (c_out, resolution) in reversed(list(enumerate(zip(dims, resolutions, strict=True)))):
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(block(c + skips.pop(), c_out))
                attentions.append(attention(c_out, resolution))
                c = c_out
            self.up.append(_Level(blocks, attentions, Upsample(c) if level else None))

        self.norm_out = GroupNorm(norm_groups, c, norm_eps)
        self.conv_out = Conv2d(c, 2 * channels if learned_variance else channels, 3, padding=1)

        # One product projects t for all blocks: hundreds of small ones would each cost a launch.
        self.blocks_out = [block.out_channels for block in self._blocks()]
        self.time_projection = Linear(4 * dim, sum(self.blocks_out))
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """As the paper's code: Xavier-uniform, no bias, and zero where a residual branch or the network ends."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in self.time_projection.weight.split(self.blocks_out):  # each its own layer in the paper
            nn.init.xavier_uniform_(weight)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                for weight in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(weight)
                nn.init.zeros_(module.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "UNet":
        """A network by name, with changes to its arguments.

        Args:
            name: `ddpm-cifar10-32` (35,746,307 parameters), `ddpm-256` (113,673,219), `digits-8` or `mnist-28`.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))

    def time_rows(self, t: Tensor) -> Tensor:
        """What the timesteps t, (K,), add to the images in all blocks: (K, D), rows for `forward`.

        The biases of the convolutions that a row replaces are part of it.
        """
        rows = self.time_projection(silu(self.time_embedding(t)))
        biases = [b.conv1.bias if b.takes_bias() else rows.new_zeros(b.out_channels) for b in self._blocks()]
        return rows + torch.cat(biases)

    def forward(self, x: Tensor, t: Tensor | float, time_row: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (N, channels, H, W), floating, H and W divisible by 2^(levels - 1).
            t: (N,), timesteps, integer or fractional; or one for all samples: a number, a tensor () or (N,) that was
                expanded (`t.expand(N)`), which costs less than N of them.
            time_row: (D,), the row of `time_rows` of a timestep that all samples share, instead of t.

        Returns:
            (N, channels, H, W), or (N, 2 channels, H, W) with a learned variance; channels-last, in the dtype of the
            weights (or of autocast).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        t = self._check_input(x, t)
        time = iter(self._times(t, time_row))  # in the order of `blocks`, that of the forward pass
        # A state h is a sum until the norm of the next block adds it up and hands it back, to be a skip or not.
        through = _checkpointed if self.gradient_checkpointing and torch.is_grad_enabled() else _through
        x = x.to(weight_dtype(self.conv_in, x.dtype)).contiguous(memory_format=torch.channels_last)
        h = convolved(self.conv_in, x)
        skips = []
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h, skip = through(block, attention, h, next(time))
                skips.append(skip)
            if level.resample is not None:
                skips.append(h.tensor())
                h = _resampled(level.resample, skips[-1])

        h, skip = through(self.mid_block1, self.mid_attention, h, next(time))
        skips.append(skip)
        h, _ = _through(self.mid_block2, nn.Identity(), h, next(time))

        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h, _ = through(block, attention, h, next(time), skips.pop())
            if level.resample is not None:
                h = _resampled(level.resample, h.tensor())
        return self.conv_out(normalised_alone(self.norm_out, h)[0])

    def _blocks(self) -> list[ResidualBlock]:
        """The residual blocks, in the order of the forward pass."""
        down, up = ([block for level in levels for block in level.blocks] for levels in (self.down, self.up))
        return [*down, self.mid_block1, self.mid_block2, *up]

    def _times(self, t: Tensor, row: Tensor | None) -> Sequence[Tensor]:
        """What `ResidualBlock.forward` takes as `time`, for each of the blocks."""
        if row is None and t.stride(0) == 0:  # sampling takes all images through the same timestep
            row = self.time_rows(t[:1])[0]
        return (self.time_rows(t) if row is None else row).split(self.blocks_out, dim=-1)

    def _check_input(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Returns t as a tensor (N,) on the device of x."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor (N, {self.channels}, H, W); got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must have the shape (N, {self.channels}, H, W); got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating, with images scaled to [-1, 1]; got {x.dtype}")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"{len(self.down)} levels halve H and W {len(self.down) - 1} times, so both must be divisible by "
                f"{self.factor}; got {x.shape[2]} x {x.shape[3]}"
            )
        if not isinstance(t, Tensor):
            if isinstance(t, bool) or not isinstance(t, int | float):
                raise ValueError(f"t must be timesteps, a tensor ({len(x)},) or one number; got {t!r}")
            t = torch.full((), t, dtype=torch.float32, device=x.device)
        if t.ndim == 0:
            return t.to(x.device).expand(x.shape[0])
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have the shape ({len(x)},), one timestep a sample; got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"t must be on the device of x, {x.device}; got {t.device}")
        return t


def _through(
    block: ResidualBlock, attention: nn.Module, h: DeferredSum, time: Tensor, skip: Tensor | None = None
) -> tuple[DeferredSum, Tensor]:
    """(what follows from h, h as a tensor). Modules that were replaced or have hooks are called with tensors."""
    if unhooked(block, ResidualBlock):
        h, before = block.deferred(h, time, skip)
    else:
        before = h.tensor()
        h = DeferredSum(block(before if skip is None else torch.cat([before, skip], dim=1), time))
    if unhooked(attention, Attention):
        h = attention.deferred(h)
    elif not unhooked(attention, nn.Identity):
        h = DeferredSum(attention(h.tensor()))
    return h, before


def _checkpointed(block, attention, h, time, skip=None):
    """As `_through`. What is kept for the backward pass is h as a tensor."""
    h = DeferredSum(h.tensor())
    through, _ = checkpoint(_through, block, attention, h, time, skip, use_reentrant=False)
    return through, h.x


def _resampled(resample: nn.Module, h: Tensor) -> DeferredSum:
    if unhooked(resample, type(resample)) and isinstance(resample, Downsample | Upsample):
        return resample.deferred(h)
    return DeferredSum(resample(h))


class _Level(nn.Module):
    """The blocks at one resolution, and what leads to the next."""

    def __init__(self, blocks: nn.ModuleList, attentions: nn.ModuleList, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.attentions = attentions
        self.resample = resample


def _check_sizes(
    image_size: int,
    factor: int,
    dim: int,
    dims: list[int],
    resolutions: list[int],
    attention_resolutions: Sequence[int],
    num_heads: int,
    norm_groups: int,
) -> None:
    if image_size % factor:
        raise ValueError(
            f"image_size={image_size} cannot be halved {len(dims) - 1} times, once for each of dim_mults after the "
            f"first; take a multiple of {factor}, or fewer dim_mults"
        )
    if dim % 2 or dim % norm_groups:
        raise ValueError(f"dim={dim} must be even and a multiple of norm_groups={norm_groups}")
    for resolution in attention_resolutions:
        if resolution not in resolutions:
            raise ValueError(f"attention_resolutions has {resolution}, but the levels have H = {resolutions}")
    with_attention = [d for d, r in zip(dims, resolutions, strict=True) if r in attention_resolutions] + dims[-1:]
    for channels in with_attention:
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the {channels} channels that have attention")
