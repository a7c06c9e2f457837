"""NAN and NAH for CUDA, with one p for all elements: the functions of ``noisy.c``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_noisy.kernels.triton.functions import centred_sigmoid, clamped
from lightning_noisy.kernels.triton.gaussian import PAIRS, WEYL, device_of, pair_of_numbers

__all__ = ["backward", "forward", "keep", "next_key"]


@triton.jit
def _key(state, key, distance, ADVANCE: tl.constexpr):
    passes = tl.load(state + 1)
    if ADVANCE:
        passes += 1
        tl.store(state + 1, passes)
    tl.store(key, tl.load(state) + passes * distance)


@triton.jit
def _noise(key, second, level, index, HALF: tl.constexpr, NOISY: tl.constexpr):
    """ε of the elements of this program, from ``index`` on, which is even."""
    if NOISY:
        pair = index // 2 + tl.arange(0, PAIRS)
        radius, cosine, sine = pair_of_numbers(tl.load(key) + pair * WEYL, second.to(tl.int64))
        noise = tl.interleave(radius * cosine, radius * sine)
        return tl.abs(noise) if HALF else noise
    return tl.zeros((2 * PAIRS,), tl.float32) + level


@triton.jit
def _derivatives(x, noise, p, c, slope, offset, lower, upper, alpha):
    """The value, and its derivatives by x and p."""
    away = -1.0 if alpha <= 1.0 else 1.0
    u = slope * x + offset
    h = clamped(u, lower, upper)
    delta = h - u
    s = centred_sigmoid(p * delta)
    direction = tl.where(x >= 0.0, away, -away)
    value = alpha * h + (1.0 - alpha) * u + direction * (c * (s * s)) * noise
    by_noise = direction * c * noise * 2.0 * s * (0.25 - s * s)
    inside = (u >= lower) & (u <= upper)
    by_x = slope * tl.where(inside, 1.0, (1.0 - alpha) - by_noise * p)
    return value, by_x, by_noise * delta


@triton.jit(do_not_specialize=["second"])
def _values(
    x, out, p, c, key, count, second, slope, offset, lower, upper, alpha, level,
    HALF: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (2 * PAIRS)
    index = first + tl.arange(0, 2 * PAIRS)
    used = index < count
    noise = _noise(key, second, level, first, HALF, NOISY)
    wide = tl.load(x + index, used, 0.0).to(tl.float32)
    value, _, _ = _derivatives(wide, noise, tl.load(p), tl.load(c), slope, offset, lower, upper, alpha)
    tl.store(out + index, value.to(out.dtype.element_ty), used)


@triton.jit(do_not_specialize=["second"])
def _gradients(
    x, gradient, out, sums, p, c, key, count, second, slope, offset, lower, upper, alpha, level,
    HALF: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (2 * PAIRS)
    index = first + tl.arange(0, 2 * PAIRS)
    used = index < count
    noise = _noise(key, second, level, first, HALF, NOISY)
    wide = tl.load(x + index, used, 0.0).to(tl.float32)
    _, by_x, by_p = _derivatives(wide, noise, tl.load(p), tl.load(c), slope, offset, lower, upper, alpha)
    g = tl.load(gradient + index, used, 0.0).to(tl.float32)
    tl.store(out + index, (g * by_x).to(out.dtype.element_ty), used)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(used, g * by_p, 0.0)))


def keep(c: Tensor) -> Tensor:
    """As ``keep`` of ``kernels.noisy``."""
    return c.clone()


def next_key(state: Tensor, *, advance: bool, distance: int, second: int) -> tuple[Tensor, int]:
    """As ``next_key`` of ``kernels.noisy``; the first half is a tensor of one element, which nothing waits for."""
    key = torch.empty(1, dtype=torch.int64, device=state.device)
    with device_of(state):
        _key[(1,)](state, key, distance, ADVANCE=advance)
    return key, second


def forward(x: Tensor, p: Tensor, c: Tensor, key: tuple[Any, int] | None, line: Any) -> Tensor:
    """As ``forward`` of ``kernels.noisy``."""
    out, (*options, half) = torch.empty_like(x), line
    first, second = (c, 0) if key is None else (key[0], (key[1] + 2**63) % 2**64 - 2**63)
    with device_of(x):
        _values[(triton.cdiv(x.numel(), 2 * PAIRS.value),)](
            x, out, p, c, first, x.numel(), second, *options, HALF=half, NOISY=key is not None
        )
    return out


def backward(
    x: Tensor, p: Tensor, c: Tensor, key: tuple[Any, int] | None, line: Any, gradient: Tensor, *, of_p: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As ``backward`` of ``kernels.noisy``."""
    out, (*options, half) = torch.empty_like(x), line
    first, second = (c, 0) if key is None else (key[0], (key[1] + 2**63) % 2**64 - 2**63)
    programs = triton.cdiv(x.numel(), 2 * PAIRS.value)
    sums = torch.empty(programs, dtype=torch.float32, device=x.device)
    with device_of(x):
        _gradients[(programs,)](
            x, gradient, out, sums, p, c, first, x.numel(), second, *options, HALF=half, NOISY=key is not None
        )
    return out, sums.sum(dtype=torch.float64).to(p.dtype).view(p.shape) if of_p else None
