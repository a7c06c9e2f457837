"""The numbers of ``kernels.gaussian``, by the operations of ``gaussian.h``, none of which is fused with another."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "PAIRS", "WEYL", "add_ranges", "device_of", "draw_", "pair_of_numbers"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Pairs of numbers of a program: 4 for each thread of 4 warps. The interpreter takes its time for each program.
PAIRS = tl.constexpr(1 << 12 if INTERPRETED else 512)
WEYL = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_FACTOR = tl.constexpr(0xD6E8FEB86659FD93 - 2**64)


@triton.jit
def pair_of_numbers(counter, second):
    """The two normal numbers of int64 counters."""
    bits = (counter ^ (counter >> 32) ^ second) * _FACTOR
    bits = (bits ^ (bits >> 32)) * _FACTOR
    bits = bits + (bits >> 32)
    u = ((bits & 0xFFFFFFFF) >> 1).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10  # 2^-31, 2^-32
    t = (bits >> 32).to(tl.float32) * 4.656612873077393e-10
    word = u.to(tl.int32, bitcast=True)
    exponent = (word - 0x3F3504F3) >> 23
    f = (word - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    p = f * -0.178343669 + 0.287004471
    p = p * f + -0.297544450
    p = p * f + 0.331312805
    p = p * f + -0.399307430
    p = p * f + 0.500034928
    p = p * f + -0.666677177
    square = p * (f2 * f) + f2 + f * -2.0 + exponent.to(tl.float32) * -1.38629436
    radius = tl.sqrt_rn(square)
    t2 = t * t
    s = t2 * 0.000149283500 + -0.00466894731
    s = s * t2 + 0.0796861798
    s = s * t2 + -0.645962775
    s = s * t2 + 1.57079625
    s = s * t
    c = t2 * -0.0000234020771 + 0.000916733348
    c = c * t2 + -0.0208619013
    c = c * t2 + 0.253669083
    c = c * t2 + -1.23370051
    c = c * t2 + 1.0
    twice = s + s
    return radius, 1.0 - twice * s, twice * c


@triton.jit(do_not_specialize=["second", "std"])
def _add(
    table,
    ranges,
    second,
    std,
    like,
):
    """Add to the part of a range that belongs to this program.

    The table has pointers, first halves of keys, starts, counts and first programs of the ranges; the range of each
    program.
    """
    program = tl.program_id(0)
    own = tl.load(table + 5 * ranges + program)
    start, count = tl.load(table + 2 * ranges + own), tl.load(table + 3 * ranges + own)
    block = program - tl.load(table + 4 * ranges + own)
    pair = start // 2 + block.to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    radius, cosine, sine = pair_of_numbers(tl.load(table + ranges + own) + pair * WEYL, second.to(tl.int64))
    radius = radius * std
    numbers = tl.interleave(radius * cosine, radius * sine)
    element = (start // 2 + block.to(tl.int64) * PAIRS) * 2 - start + tl.arange(0, 2 * PAIRS)
    data = tl.load(table + own).to(like.dtype) + element
    within = (element >= 0) & (element < count)
    numbers = tl.load(data, within).to(tl.float32) + numbers
    tl.store(data, numbers.to(like.dtype.element_ty), within)


@triton.jit(do_not_specialize=["second"])
def _draw(out, first, count, second):
    begin = tl.program_id(0).to(tl.int64) * PAIRS
    counter = tl.load(first) + (begin + tl.arange(0, PAIRS)) * WEYL
    radius, cosine, sine = pair_of_numbers(counter, second.to(tl.int64))
    element = 2 * begin + tl.arange(0, 2 * PAIRS)
    tl.store(out + element, tl.interleave(radius * cosine, radius * sine), element < count)


def draw_(out: Tensor, first: Tensor, second: int) -> None:
    """Write the numbers at the addresses from 0 on.

    Args:
        out: float32, contiguous.
        first: first half of the key, int64, one element on the same device.
        second: second half, as int64.
    """
    if out.numel():
        with device_of(out):
            programs = triton.cdiv(out.numel(), 2 * PAIRS.value)
            _draw[(programs,)](out, first, out.numel(), second, enable_fp_fusion=False)


def add_ranges(
    pointers: Tensor, firsts: Tensor, starts: Tensor, counts: Tensor, second: int, std: float, like: Tensor
) -> None:
    """Add numbers to floats in memory, all ranges in one launch.

    Args:
        pointers: the address of each range's elements, int64 on the CPU, shape (ranges,); 0 skips a range.
        firsts: first half of the key of each, the same.
        starts: its first address, the same.
        counts: its number of elements, the same.
        second: second half of the key, as int64.
        std: σ.
        like: a tensor of the dtype (float32, float16, bfloat16) and on the device of the elements.
    """
    pairs = torch.where(pointers != 0, (starts % 2 + counts + 1) // 2, 0)
    each = (pairs + PAIRS.value - 1) // PAIRS.value
    ends = each.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total:
        ranges = torch.arange(len(each)).repeat_interleave(each, output_size=total)
        table = torch.cat([pointers, firsts, starts, counts, ends - each, ranges]).to(like.device, non_blocking=True)
        with device_of(like):
            _add[(total,)](table, len(each), second, std, like, enable_fp_fusion=False)


def device_of(x: Tensor) -> Any:
    """The context in which kernels run on a tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.no_grad()
