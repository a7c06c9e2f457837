"""Elementwise functions and their slopes, as in ``functions.h``."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["centred_sigmoid", "value_and_slope"]


@triton.jit
def clamped(x, lower, upper):
    """X within bounds; NaN stays NaN."""
    x = tl.where(x < lower, lower, x)
    return tl.where(x > upper, upper, x)


@triton.jit
def expm1_of(x):
    """exp(x) - 1 for x <= 0, as exact near 0: for small ones by the series."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.0083333338 + x * 0.0013888889)))))
    return tl.where(x > -0.35, series, tl.exp(clamped(x, -87.0, 88.0)) - 1.0)


@triton.jit
def two_sigmoids(x):
    """The sigmoids of x and -x."""
    power = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + power)
    smaller = power * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def tanh_of(x):
    """The hyperbolic tangent."""
    m = expm1_of(-2.0 * tl.abs(x))
    size = -m / (2.0 + m)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def centred_sigmoid(x):
    """sigmoid(x) - 1/2, as exact near 0."""
    return 0.5 * tanh_of(0.5 * x)


@triton.jit
def value_and_slope(x, a, b, lower, upper, KIND: tl.constexpr):
    """The value and the slope of the function of a kind, numbered as in ``kernels.normalized``."""
    if KIND == 0:
        u = a * x + b
        y = clamped(u, lower, upper)
        slope = tl.where((u <= lower) | ((u >= upper) & (upper < float("inf"))), 0.0, a)
    elif KIND == 1:
        slope = tl.where(x > 0.0, 1.0, a)
        y = x * slope
    elif KIND == 2:
        s, other = two_sigmoids(x)
        y = x * s
        slope = s * (1.0 + clamped(x, -100.0, 100.0) * other)
    elif KIND == 3:
        phi = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752))
        c = clamped(x, -14.0, 14.0)
        y = x * phi
        slope = phi + c * (tl.exp(-0.5 * c * c) * 0.3989422804014327)
    elif KIND == 4:
        c = clamped(x, -20.0, 20.0)
        s, other = two_sigmoids(1.5957691216057308 * c * (1.0 + 0.044715 * c * c))
        y = x * s
        slope = s + c * (s * other) * (1.5957691216057308 * (1.0 + 0.134145 * c * c))
    elif KIND == 5:
        y = tanh_of(x)
        slope = 1.0 - y * y
    elif KIND == 6:
        m = expm1_of(tl.where(x > 0.0, 0.0, x))
        y = tl.where(x > 0.0, b * x, a * m)
        slope = tl.where(x > 0.0, b, a * (m + 1.0))
    else:
        y, other = two_sigmoids(x)
        slope = y * other
    return y, slope
