"""What the kernels of group norm share: their input, the sums over groups, the affine map and its gradient.

A tile is ROWS x COLUMNS. Where its columns are channels, COLUMNS is a power of 2 and TOGETHER groups of WIDTH channels
lie side by side in it; what is left over belongs to no group.
"""

import triton
import triton.language as tl

# The input: h = cat([x + input_bias + residual, skip]), channels-last


@triton.jit
def addresses(first, second, pixel, row, channel, channels_of_first, channels_of_second, VECTOR: tl.constexpr):
    """Of some pixels and channels in the first of two tensors, or for channels past its last one in the second.

    One load or store then serves both. VECTOR neighbours are in one tensor and begin at a multiple of their size, or
    VECTOR is 1 where nothing is known; the compiler itself takes little from a choice between two addresses.
    """
    at = first + pixel * channels_of_first + (row * channels_of_first + channel)
    if second is not None:
        other = second + pixel * channels_of_second + (row * channels_of_second + (channel - channels_of_first))
        at = tl.where(channel < channels_of_first, at, other)
        if VECTOR > 1:
            BYTES: tl.constexpr = VECTOR * first.dtype.element_ty.primitive_bitwidth // 8
            at = tl.multiple_of(tl.max_contiguous(at, (1, VECTOR)), (1, BYTES))
    return at


@triton.jit
def load_input_bias(input_bias, stride, sample, channel, inside):
    """In float32; -0.0 for channels of skip, which changes no bit in a sum.

    It is called where there is an input_bias: the Triton of torch 2.11 cannot return None.
    """
    return tl.load(input_bias + sample * stride + channel, mask=inside, other=-0.0).to(tl.float32)


@triton.jit
def load_sum(x, of_bias, residual, skip, pixel, row, channel, mask, channels, channels_of_skip, VECTOR: tl.constexpr):
    """Some pixels and channels of h, which is rounded once, in the order of the reference; anything outside the mask.

    Args:
        of_bias: what `load_input_bias` has given for the channels, or None.
        pixel: the first one, in int64.
        channels: of x.
    """
    h = tl.load(addresses(x, skip, pixel, row, channel, channels, channels_of_skip, VECTOR), mask=mask, other=0.0)
    if residual is not None:
        at = addresses(residual, None, pixel, row, channel, channels, 0, VECTOR)
        more = tl.load(at, mask=mask & (channel < channels), other=-0.0)
    if of_bias is not None or residual is not None:
        total = h.to(tl.float32)
        if of_bias is not None:
            total += of_bias
        if residual is not None:
            total += more.to(tl.float32)
        h = total.to(h.dtype)
    return h


# Sums over groups


@triton.jit
def sum_of_groups(x, TOGETHER: tl.constexpr, WIDTH: tl.constexpr):
    """(COLUMNS,) to (TOGETHER,); a group has WIDTH columns, or all of them."""
    if TOGETHER == 1 or x.shape[0] == TOGETHER * WIDTH:
        x = tl.sum(x.reshape(TOGETHER, x.shape[0] // TOGETHER), 1)
    else:
        x = tl.sum(tl.where(members(TOGETHER, x.shape[0], WIDTH), x[None, :], 0.0), 1)
    return x


@triton.jit
def spread_to_columns(x, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr):
    """(TOGETHER,) to (COLUMNS,)."""
    if TOGETHER == 1 or TOGETHER * WIDTH == COLUMNS:
        x = x[:, None].broadcast_to(TOGETHER, COLUMNS // TOGETHER).reshape(COLUMNS)
    else:
        x = tl.sum(tl.where(members(TOGETHER, COLUMNS, WIDTH), x[:, None], 0.0), 0)
    return x


@triton.jit
def members(TOGETHER: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, COLUMNS)[None, :] // WIDTH == tl.arange(0, TOGETHER)[:, None]


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_rows(x, y):
    """Two (ROWS, COLUMNS) to two (COLUMNS,), which cross the threads together."""
    return tl.reduce((x, y), 0, _add_pairs)


@triton.jit
def rsqrt(x):
    return 1 / tl.sqrt_rn(x)


@triton.jit
def not_negative(x):
    """0 for what rounding has made negative; NaN stays."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


# The affine map and SiLU


@triton.jit
def load_affine(sample, channel, inside, channels, weight, bias, scale, shift):
    """The z = x_hat factor + addend of y = silu(z); and 1 + scale, which is 1 where there is no scale."""
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    addend = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    one_and_scale = 1.0
    if scale is not None:
        at = sample * channels + channel
        one_and_scale = 1 + tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        factor *= one_and_scale
        addend = addend * one_and_scale + tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
    return factor, addend, one_and_scale


@triton.jit
def activate(z, SILU: tl.constexpr):
    if SILU:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def gradient_of_z(grad, x_hat, factor, addend, SILU: tl.constexpr):
    if SILU:
        z = x_hat * factor + addend
        sigmoid = 1 / (1 + tl.exp(-z))
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    return grad
