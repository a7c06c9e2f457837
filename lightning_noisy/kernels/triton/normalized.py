"""Normalized activations for CUDA: the functions of ``normalized.c``.

A forward pass in training is three launches: the moments of parts, the running statistics, and the values. Nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_noisy.kernels.triton.functions import value_and_slope
from lightning_noisy.kernels.triton.gaussian import INTERPRETED, device_of

__all__ = ["backward", "forward", "values"]

_BLOCK = tl.constexpr(1 << 13 if INTERPRETED else 1024)
_MOST_PROGRAMS = 1024


@triton.jit
def _sums(x, used):
    """Σx and Σx² of the elements that are used, around their mean."""
    count = tl.sum(used.to(tl.float32))
    total = tl.sum(tl.where(used, x, 0.0))
    mean = total / count
    away = tl.where(used, x - mean, 0.0)
    wide = total.to(tl.float64)
    exact = wide / count.to(tl.float64)
    error = exact - mean.to(tl.float64)
    return wide, tl.sum(away * away).to(tl.float64) + (exact * exact - error * error) * count.to(tl.float64)


@triton.jit
def _moments(x, sums, count, columns, step, each, a, b, lower, upper, KIND: tl.constexpr):
    """Sums of x, x², φ, φ² and φ′² over a part of the sample: rows of ``columns`` elements, ``step`` apart."""
    program = tl.program_id(0).to(tl.int64)
    first = program * each
    last = tl.minimum(first + each, count)
    x1 = tl.zeros((), tl.float64)
    x2, y1, y2, d2 = x1, x1, x1, x1
    for start in range(first, last, _BLOCK):
        index = start + tl.arange(0, _BLOCK).to(tl.int64)
        used = index < last
        value = tl.load(x + index // columns * step + index % columns, used, 0.0).to(tl.float32)
        y, slope = value_and_slope(value, a, b, lower, upper, KIND)
        total, square = _sums(value, used)
        x1 += total
        x2 += square
        total, square = _sums(y, used)
        y1 += total
        y2 += square
        d2 += tl.sum(tl.where(used, slope * slope, 0.0)).to(tl.float64)
    out = sums + program * 5
    tl.store(out, x1)
    tl.store(out + 1, x2)
    tl.store(out + 2, y1)
    tl.store(out + 3, y2)
    tl.store(out + 4, d2)


@triton.jit
def _column(sums, parts, i: tl.constexpr, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + part * 5 + i, part < parts, 0.0))


@triton.jit
def _statistics(
    sums,
    parts,
    count,
    alpha,
    mean,
    rho,
    rho_prime,
    tracked,
    rejected,
    pending,
    kept,
    momentum,
    lower,
    upper,
    most,
    beta,
    smallest,
    MODE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Follow the sums as MODE says, and write the scale, the shift and tanh α."""
    use_mean, use_rho, use_prime = tl.load(mean), tl.load(rho), tl.load(rho_prime)
    if MODE != 0:
        n = count.to(tl.float64)
        x1, x2 = _column(sums, parts, 0, PARTS), _column(sums, parts, 1, PARTS)
        y1, y2, d2 = _column(sums, parts, 2, PARTS), _column(sums, parts, 3, PARTS), _column(sums, parts, 4, PARTS)
        new_mean = y1 / n
        var_x = x2 / n - (x1 / n) * (x1 / n)
        new_rho, new_prime = (y2 / n - new_mean * new_mean) / var_x, d2 / n
        varies = (var_x > 1e-11 * (x1 / n) * (x1 / n)) & (var_x > 1e-36)  # else it is rounding
        usable = varies & (new_rho > smallest) & (new_prime > smallest)
        usable = usable & (tl.abs(new_mean) + new_rho + new_prime < 3.4028234663852886e38)
        new_mean, new_rho, new_prime = new_mean.to(tl.float32), new_rho.to(tl.float32), new_prime.to(tl.float32)
        before = tl.load(tracked)
        if MODE == 1:
            in_a_row = tl.load(rejected)
            rho_fits = (lower * use_rho < new_rho) & (new_rho < upper * use_rho)
            prime_fits = (lower * use_prime < new_prime) & (new_prime < upper * use_prime)
            fits = rho_fits & prime_fits
            restart = (before == 0) | ((fits == 0) & (in_a_row >= most))
            next_mean = tl.where(restart, new_mean, use_mean + momentum * (new_mean - use_mean))
            next_rho = tl.where(rho_fits, use_rho + momentum * (new_rho - use_rho), use_rho)
            next_prime = tl.where(prime_fits, use_prime + momentum * (new_prime - use_prime), use_prime)
            use_mean = tl.where(usable, next_mean, use_mean)
            use_rho = tl.where(usable, tl.where(restart, new_rho, next_rho), use_rho)
            use_prime = tl.where(usable, tl.where(restart, new_prime, next_prime), use_prime)
            tl.store(mean, use_mean)
            tl.store(rho, use_rho)
            tl.store(rho_prime, use_prime)
            tl.store(rejected, tl.where(usable, tl.where(restart | fits, 0, in_a_row + 1), in_a_row))
            tl.store(tracked, before + usable.to(tl.int64))
        else:
            first = usable & (before == 0)
            use_mean = tl.where(first, new_mean, use_mean)
            use_rho = tl.where(first, new_rho, use_rho)
            use_prime = tl.where(first, new_prime, use_prime)
            if MODE == 2:
                finite = tl.abs(x1 + x2 + y1 + y2 + d2) < float("inf")
                tl.store(pending, tl.load(pending) + n, finite)
                tl.store(pending + 1, tl.load(pending + 1) + x1, finite)
                tl.store(pending + 2, tl.load(pending + 2) + x2, finite)
                tl.store(pending + 3, tl.load(pending + 3) + y1, finite)
                tl.store(pending + 4, tl.load(pending + 4) + y2, finite)
                tl.store(pending + 5, tl.load(pending + 5) + d2, finite)
    power = tl.exp(-2.0 * tl.abs(tl.load(alpha)))
    curve = (1.0 - power) / (1.0 + power)
    curve = tl.where(tl.load(alpha) < 0.0, -curve, curve)
    tl.store(kept, tl.sqrt_rn((use_rho + use_prime) / (2.0 * use_rho * use_prime)) + beta * curve)
    tl.store(kept + 1, use_mean)
    tl.store(kept + 2, curve)


@triton.jit
def _values(x, out, kept, count, a, b, lower, upper, KIND: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    used = index < count
    y, _ = value_and_slope(tl.load(x + index, used, 0.0).to(tl.float32), a, b, lower, upper, KIND)
    y = tl.load(kept) * (y - tl.load(kept + 1))
    tl.store(out + index, y.to(out.dtype.element_ty), used)


@triton.jit
def _gradients(x, gradient, out, kept, sums, count, each, a, b, lower, upper, KIND: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    first = program * each
    last = tl.minimum(first + each, count)
    scale, shift = tl.load(kept), tl.load(kept + 1)
    total = tl.zeros((), tl.float64)
    for start in range(first, last, _BLOCK):
        index = start + tl.arange(0, _BLOCK).to(tl.int64)
        used = index < last
        y, slope = value_and_slope(tl.load(x + index, used, 0.0).to(tl.float32), a, b, lower, upper, KIND)
        g = tl.load(gradient + index, used, 0.0).to(tl.float32)
        tl.store(out + index, (g * (scale * slope)).to(out.dtype.element_ty), used)
        total += tl.sum(g * (y - shift)).to(tl.float64)
    tl.store(sums + program, total)


@triton.jit
def _of_alpha(sums, parts, kept, out, beta, PARTS: tl.constexpr):
    part, curve = tl.arange(0, PARTS), tl.load(kept + 2)
    total = tl.sum(tl.load(sums + part, part < parts, 0.0)).to(tl.float32)
    tl.store(out, total * (beta * (1.0 - curve * curve)))


def _parts(count: int) -> tuple[int, int]:
    """The number of programs, and how many elements each takes."""
    blocks = triton.cdiv(count, _BLOCK.value)
    each = triton.cdiv(blocks, _MOST_PROGRAMS) * _BLOCK.value
    return triton.cdiv(count, each), each


def forward(
    function: Any,
    x: Tensor,
    alpha: Tensor,
    statistics: Sequence[Tensor],
    pending: Tensor | None,
    rule: Any,
    mode: int,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """As ``forward`` of ``kernels.normalized``; what is kept is a tensor of shape (3,)."""
    y, kept, count = torch.empty_like(x), torch.empty(3, dtype=torch.float32, device=x.device), x.numel()
    kind, *options = function
    with device_of(x):
        sums, parts, used = kept, 0, count
        if mode:
            columns = step = count
            if stride > 1 and x.dim():
                columns = count // len(x)
                step, used = stride * columns, -(-len(x) // stride) * columns
            parts, each = _parts(used)
            sums = torch.empty(parts, 5, dtype=torch.float64, device=x.device)
            _moments[(parts,)](x, sums, used, columns, step, each, *options, KIND=kind)
        _statistics[(1,)](
            sums, parts, used, alpha, *statistics, kept if pending is None else pending, kept, *rule,
            MODE=mode, PARTS=_MOST_PROGRAMS,
        )  # fmt: skip
        _values[(triton.cdiv(count, _BLOCK.value),)](x, y, kept, count, *options, KIND=kind)
    return y, kept


def values(function: Any, x: Tensor, alpha: Tensor, statistics: Sequence[Tensor], beta: float) -> Tensor:
    """As ``values`` of ``kernels.normalized``."""
    return forward(function, x, alpha, statistics, None, (0.0, 0.0, 0.0, 0.0, beta, 0.0), 0)[0]


def backward(
    function: Any, x: Tensor, gradient: Tensor, kept: Tensor, beta: float, alpha: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As ``backward`` of ``kernels.normalized``."""
    kind, *options = function
    of_x, (parts, each) = torch.empty_like(x), _parts(x.numel())
    of_alpha = None if alpha is None else torch.empty_like(alpha)
    with device_of(x):
        sums = torch.empty(parts, dtype=torch.float64, device=x.device)
        _gradients[(parts,)](x, gradient, of_x, kept, sums, x.numel(), each, *options, KIND=kind)
        if of_alpha is not None:
            _of_alpha[(1,)](sums, parts, kept, of_alpha, beta, PARTS=_MOST_PROGRAMS)
    return of_x, of_alpha
