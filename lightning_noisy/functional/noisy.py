r"""The formulas of Gulcehre et al., "Noisy Activation Functions" (2016).

A hard-saturating function h and its linearization u at 0 differ by :math:`\Delta = h(x) - u(x)` where h saturates, and
noise grows with that difference: :math:`\sigma(x) = c (\mathrm{sigmoid}(p \Delta) - 1/2)^2` (Eq. 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = [
    "HARD",
    "HardFunction",
    "expected_input_noise",
    "expected_output_noise",
    "input_noise",
    "noise_scale",
    "output_noise",
]

_HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)
_SMALLEST_SCALE = 1e-20  # replaces 0 in a denominator: gives the exact limit, also in float32


@dataclass(frozen=True)
class HardFunction:
    r"""A hard-saturating function h and its linearization u.

    Args:
        hard: h, elementwise.
        linear: u, elementwise; equal to h where h doesn't saturate.
        slope: if h clips a straight line, :math:`h(x) = \mathrm{clip}(u(x), a, b)`, the slope of that line.
        offset: in that case, its value at 0.
        bounds: in that case, (a, b).
    """

    hard: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    slope: float | None = None
    offset: float = 0.0
    bounds: tuple[float, float] = (-math.inf, math.inf)


def _line(x: Tensor, slope: float, offset: float) -> Tensor:
    return x if (slope, offset) == (1, 0) else slope * x + offset


def _clip(x: Tensor, slope: float, offset: float, lower: float, upper: float) -> Tensor:
    return _line(x, slope, offset).clamp(lower, None if upper == math.inf else upper)


def _clipped(slope: float, offset: float, lower: float, upper: float) -> HardFunction:
    hard = partial(_clip, slope=slope, offset=offset, lower=lower, upper=upper)  # partial, so that it can be pickled
    return HardFunction(hard, partial(_line, slope=slope, offset=offset), slope, offset, (lower, upper))


# The sigmoid's slope at 0 is 1/4, so the hard one saturates at |x| = 2; nn.Hardsigmoid is different.
HARD = {
    "tanh": _clipped(1, 0, -1, 1),
    "sigmoid": _clipped(0.25, 0.5, 0, 1),
    "relu": _clipped(1, 0, 0, math.inf),
}


def noise_scale(delta: Tensor, p: Tensor, c: Tensor | float) -> Tensor:
    r"""Standard deviation of the noise: :math:`\sigma = c (\mathrm{sigmoid}(p \Delta) - 1/2)^2`, Eq. 9.

    Args:
        delta: Δ = h(x) - u(x), float tensor of any shape; 0 where h doesn't saturate.
        p: learned, broadcastable to ``delta``.
        c: scale, >= 0, a number or a 0-dimensional tensor; σ is at most c / 4.

    Returns:
        σ, shape of ``delta``, >= 0.

    >>> noise_scale(torch.tensor([0.0, 1e4]), torch.tensor(1.0), 2.0)
    tensor([0.0000, 0.5000])
    """
    return c * (torch.sigmoid(p * delta) - 0.5).square()


def _direction(x: Tensor, alpha: float) -> Tensor:
    """d(x) = -sgn(x) sgn(1 - α) with sgn(0) = 1: for α > 1, towards the linear function."""
    away = -1.0 if alpha <= 1 else 1.0
    return torch.where(x >= 0, away, -away)


def output_noise(
    x: Tensor, epsilon: Tensor, p: Tensor, c: Tensor | float, *, function: HardFunction, alpha: float
) -> Tensor:
    r"""NAN and NAH: :math:`\phi(x) = \alpha h(x) + (1 - \alpha) u(x) + d(x) \sigma(x) \epsilon`, Eq. 12.

    Args:
        x: pre-activation, float tensor of any shape.
        epsilon: standard normal numbers (NAN), or their absolute values (NAH); shape of ``x``.
        p: learned, broadcastable to ``x``.
        c: see :func:`noise_scale`.
        function: h and u.
        alpha: α; above 1, the output is shifted away from u, and the noise points towards u.

    Returns:
        φ, shape of ``x``.

    >>> x = torch.tensor([0.5, 3.0])
    >>> output_noise(x, torch.zeros(2), torch.ones(1), 1.0, function=HARD["tanh"], alpha=1.0)
    tensor([0.5000, 1.0000])
    """
    hard, linear = function.hard(x), function.linear(x)
    sigma = noise_scale(hard - linear, p, c)
    return alpha * hard + (1 - alpha) * linear + _direction(x, alpha) * sigma * epsilon


def expected_output_noise(
    x: Tensor, p: Tensor, c: Tensor | float, *, function: HardFunction, alpha: float, half_normal: bool
) -> Tensor:
    """E[φ(x)] for evaluation (Eq. 13): E[ε] is 0, or √(2/π) with ``half_normal``; see :func:`output_noise`.

    >>> x = torch.tensor([3.0])
    >>> expected_output_noise(x, torch.ones(1), 0.0, function=HARD["tanh"], alpha=1.0, half_normal=True)
    tensor([1.])
    """
    if not half_normal:
        return alpha * function.hard(x) + (1 - alpha) * function.linear(x)
    return output_noise(x, torch.full_like(x, _HALF_NORMAL_MEAN), p, c, function=function, alpha=alpha)


def input_noise(x: Tensor, xi: Tensor, sigma: Tensor | float, *, function: HardFunction) -> Tensor:
    r"""NANI, NANIL and NANIS: :math:`\phi(x) = h(x + \sigma \xi)`, Eq. 14 and 15.

    Args:
        x: pre-activation, float tensor of any shape.
        xi: standard normal numbers, shape of ``x``.
        sigma: σ, >= 0, broadcastable to ``x``.
        function: h.

    Returns:
        φ, shape of ``x``.
    """
    return function.hard(x + sigma * xi)


def expected_input_noise(x: Tensor, sigma: Tensor | float, *, function: HardFunction) -> Tensor:
    r""":math:`E[h(x + \sigma \xi)]` for evaluation; arguments as in :func:`input_noise`.

    In closed form if h clips a line: the expectation of :math:`\max(y, 0)` for normal y with mean m and standard
    deviation s is :math:`\max(m, 0) + s\, g(|m| / s)` with :math:`g(t) = \varphi(t) - t\, \Phi(-t)`, so each bound
    contributes one such term; for σ = 0 the result is h. For other h, by Gauss-Hermite quadrature with 32 nodes, whose
    error is in about the third digit (the second for σ > 1) if h has a kink.

    >>> expected_input_noise(torch.tensor([0.0]), 1.0, function=HARD["relu"])  # 1 / sqrt(2 pi)
    tensor([0.3989])
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if function.slope is None:
        nodes, weights = _hermite(32, x)
        spread = (x[..., None] + sigma.expand_as(x)[..., None] * nodes).to(x.dtype)
        return (function.hard(spread) * weights).sum(-1)
    scale = (sigma * function.slope).clamp_min(_SMALLEST_SCALE)
    lower, upper = function.bounds
    line = function.linear(x)
    added = _rounded_off(line - lower, scale)
    if upper != math.inf:
        added = added - _rounded_off(line - upper, scale)
    return function.hard(x) + torch.where(sigma > 0, added, 0)


def _rounded_off(distance: Tensor, scale: Tensor) -> Tensor:
    t = (distance.abs() / scale).clamp_max(40)  # g is 0 there
    g: Tensor = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi) - t * torch.special.ndtr(-t)
    return scale * g


def _hermite(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under N(0, 1), by the Golub-Welsch algorithm."""
    off_diagonal = torch.arange(1, count, dtype=torch.float64).sqrt()
    matrix = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes.to(like), vectors[0].square().to(like)
