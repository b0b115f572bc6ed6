"""How the terms of a sample are added, in an order that depends on its size (and layout) alone.

A program adds up to SPAN tiles element by element, and then its threads' sums as a tree. Where a sample takes several
programs, each leaves a part, and a second kernel adds the parts in the same way: no atomics, the same bits every time.
"""

__all__ = ["SPAN", "add_parts", "parts_of"]

import triton
import triton.language as tl
from torch import Tensor

SPAN = 4


def parts_of(out: Tensor, tiles: int) -> Tensor:
    """Where the programs' sums go, (N, parts): the result itself if there is one part."""
    return out if tiles <= SPAN else out.new_empty((len(out), triton.cdiv(tiles, SPAN)))


def add_parts(parts: Tensor, out: Tensor) -> None:
    if parts is not out:
        _add_parts[(len(out),)](parts, out, parts.shape[1], BLOCK=256, num_warps=1)


@triton.jit(do_not_specialize=["count"])
def _add_parts(parts, out, count, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        part = first + tl.arange(0, BLOCK)
        total += tl.load(parts + sample.to(tl.int64) * count + part, mask=part < count, other=0.0)
    tl.store(out + sample, tl.sum(total))
