"""Gaussian noise in registers: philox4x32-10, and Box-Muller by polynomials.

Words and uniforms are those of `ddpm_fast.noise`, bit for bit; logarithm, cosine and sine differ from exact ones by
about one unit in the last place. Triton's own would not do: near u = 1 its logarithm has no relative precision, and
its sine and cosine carry a slow path for large arguments, with an array in memory. The coefficients are those of
csrc/common/box_muller.h.
"""

import triton
import triton.language as tl

__all__ = ["philox", "tile_noise"]


@triton.jit
def philox(seed, counter):
    """The four words of philox4x32-10 with the counter's upper 64 bits 0, uint32.

    tl.philox takes both halves of each product from a multiplication of its own; the 64-bit product here is one
    instruction, which spares 4 instructions an element.
    """
    seed, counter = seed.to(tl.uint64, bitcast=True), counter.to(tl.uint64, bitcast=True)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def natural_log(u):
    """ln u for normal u > 0, with the relative precision that u near 1 needs (minimax, 6e-9)."""
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # of sqrt(1/2): u = m 2^e with m in [sqrt(1/2), sqrt(2))
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.07634500414133072, 0.1276157945394516)
    p = tl.fma(p, f, -0.13160182535648346)
    p = tl.fma(p, f, 0.14201757311820984)
    p = tl.fma(p, f, -0.16623356938362122)
    p = tl.fma(p, f, 0.20001226663589478)
    p = tl.fma(p, f, -0.2500081956386566)
    p = tl.fma(p, f, 0.3333333134651184)
    return tl.fma(e, 0.693147180559945, tl.fma(f * f, tl.fma(p, f, -0.5), f))


@triton.jit
def uniform(word):
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, exact, and 2^-33


@triton.jit
def box_muller(word0, word1):
    """sqrt(-2 ln u) times (cos, sin) of 2 pi v: of half a turn (minimax, 5e-8), whose sign the root takes."""
    radius, v = tl.sqrt(-2.0 * natural_log(uniform(word0))), uniform(word1)
    rounded = tl.fma(v, 2.0, 12582912.0)  # 1.5 2^23: the half turns stand in the lowest bit
    r = tl.fma(rounded - 12582912.0, -0.5, v)  # exact
    sign = rounded.to(tl.int32, bitcast=True) << 31
    radius = (radius.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    r2 = r * r
    s = tl.fma(r2, 39.53886795043945, -76.55010986328125)
    s = tl.fma(s, r2, 81.60102081298828)
    s = tl.fma(s, r2, -41.34165573120117)
    s = tl.fma(s, r2, 6.283185005187988) * r
    c = tl.fma(r2, 56.34064865112305, -85.2540054321289)
    c = tl.fma(c, r2, 64.93521881103516)
    c = tl.fma(c, r2, -19.739181518554688)
    c = tl.fma(c, r2, 1.0)
    return radius * c, radius * s


@triton.jit
def normals(seed, counter):
    """The four normals of each block of a stream."""
    w0, w1, w2, w3 = philox(seed, counter)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def flatten(e0, e1, e2, e3, BLOCK: tl.constexpr):
    """Fours of neighbours in one run. They stay in their thread, and lie there as vector loads leave their data."""
    return tl.join(tl.join(e0, e2), tl.join(e1, e3)).reshape(BLOCK)


@triton.jit
def linear_noise(key, first, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The elements first ... first + BLOCK - 1 of a stream, `first` being a multiple of 8."""
    seed, offset = key
    counter = offset + first // 4 + VECTOR // 4 * tl.arange(0, BLOCK // VECTOR)
    z0, z1, z2, z3 = normals(seed, counter)
    if VECTOR == 8:
        z4, z5, z6, z7 = normals(seed, counter + 1)
        z0, z1, z2, z3 = tl.join(z0, z4), tl.join(z1, z5), tl.join(z2, z6), tl.join(z3, z7)
    return (flatten(z0, z1, z2, z3, BLOCK),)


@triton.jit
def group_noise(key, first, channel, channels, LANES: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """BLOCK pixels from pixel `first` on, a multiple of 8, of LANES channels.

    Four pixels take LANES whole blocks, and one thread makes them: element q LANES + c is channel c of pixel q.
    """
    seed, offset = key
    pixel = first + VECTOR * tl.arange(0, BLOCK // VECTOR)
    if LANES == 4:  # a block is a pixel's
        counter, stride = offset + pixel * (channels // 4) + channel // 4, channels // 4
    else:
        counter, stride = offset + pixel // 4 * LANES, 1
    elements = ()
    for block in tl.static_range(VECTOR // 4 * LANES):
        elements += normals(seed, counter + block * stride)
    noise = ()
    for c in tl.static_range(LANES):
        e0, e1 = elements[c], elements[LANES + c]
        e2, e3 = elements[2 * LANES + c], elements[3 * LANES + c]
        if VECTOR == 8:
            e0, e1 = tl.join(e0, elements[4 * LANES + c]), tl.join(e1, elements[5 * LANES + c])
            e2, e3 = tl.join(e2, elements[6 * LANES + c]), tl.join(e3, elements[7 * LANES + c])
        noise += (flatten(e0, e1, e2, e3, BLOCK),)
    return noise


@triton.jit
def scattered_noise(key, first, channel, channels, BLOCK: tl.constexpr):
    """BLOCK pixels from pixel `first` on, of one channel. Each takes one normal of a block: the slow way."""
    seed, offset = key
    element = (first + tl.arange(0, BLOCK)) * channels + channel
    w0, w1, w2, w3 = philox(seed, offset + (element >> 2))
    first_pair = (element & 2) == 0
    x, y = box_muller(tl.where(first_pair, w0, w2), tl.where(first_pair, w1, w3))
    return (tl.where((element & 1) == 0, x, y),)


@triton.jit
def tile_noise(
    key,
    tile,
    channels,
    LAYOUT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The noise of a tile (see tiles.py): a tensor (BLOCK,) for each of its lanes."""
    channel, first = tile
    if LAYOUT == "linear":
        noise = linear_noise(key, first, BLOCK, VECTOR)
    elif LAYOUT == "group":
        noise = group_noise(key, first, channel, channels, LANES, BLOCK, VECTOR)
    else:
        noise = scattered_noise(key, first, channel, channels, BLOCK)
    return noise
