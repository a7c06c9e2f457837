"""How far an activation is from keeping the variance of signal and gradient: the ANAct scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_noisy.functional.normalized import normalization_factor
from lightning_noisy.functional.slopes import slope

__all__ = ["Gains", "anact_score", "gains", "gpn_constants", "r_score", "rho", "rho_prime"]

_REACH = 12.0  # range of the quadrature in standard deviations: the density is 1e-32 there
_PANELS = 3 * 2**15  # of 5 nodes each; 0, where most activations have kinks, is between two panels


def rho(input_var: Tensor, output_mean: Tensor, output_var: Tensor) -> Tensor:
    r"""Gain of the signal, from the moments of an activation's input and output.

    :math:`\rho = E[\varphi(h)^2] / \mathrm{Var}[h]`, Eq. 5 of Yuan et al., "ANAct: Adaptive
    Normalization for Activation Functions" (2022).

    Args:
        input_var: variance of the pre-activation, any shape.
        output_mean: mean of the output, same shape.
        output_var: variance of the output, same shape.

    Returns:
        ρ, same shape; NaN or infinite where the input is constant.

    >>> import torch
    >>> h = torch.linspace(-1, 1, 201, dtype=torch.float64)
    >>> y = h.relu()
    >>> round(rho(h.var(correction=0), y.mean(), y.var(correction=0)).item(), 6)  # half of E[h²] is left
    0.5
    """
    return (output_var + output_mean.square()) / input_var


def rho_prime(slope: Tensor) -> Tensor:
    r"""Gain of the gradient: :math:`\rho' = E[\varphi'(h)^2]`, Eq. 6 of ANAct.

    Args:
        slope: :math:`\varphi'(h)` of each element, any shape.

    Returns:
        ρ′, a 0-dimensional tensor.

    >>> import torch
    >>> rho_prime(torch.tensor([0.0, 1.0])).item()
    0.5
    """
    return slope.square().mean()


def r_score(input_var: Tensor, output_var: Tensor, rho_prime: Tensor) -> Tensor:
    r"""Which of the two gains is larger, that of the signal or that of the gradient.

    :math:`\ln (\mathrm{Var}[\varphi(h)] / (\mathrm{Var}[h] \, E[\varphi'(h)^2]))`, Eq. 19 of ANAct, for the
    observed h: 0 where both gains are equal, and negative where the gradient's is larger.

    Args:
        input_var: variance of the pre-activation, any shape.
        output_var: variance of the output, same shape.
        rho_prime: :math:`E[\varphi'(h)^2]`, same shape.

    Returns:
        The score, same shape; NaN or infinite where one of them is 0.

    >>> import torch
    >>> h = torch.linspace(-1, 1, 201, dtype=torch.float64)
    >>> abs(r_score(h.var(), (3 * h).var(), torch.tensor(9.0)).item()) < 1e-12  # linear: both gains are equal
    True
    """
    return (output_var / (input_var * rho_prime)).log()


def anact_score(rho: Tensor, rho_prime: Tensor) -> Tensor:
    r"""Distance from gains of 1, summed over the layers.

    :math:`\sum_i \frac{1}{2}(|\ln \rho_i| + |\ln \rho'_i|)`, Eq. 22 of ANAct: 0 where every activation
    keeps the variance of the signal and of the gradient.

    Args:
        rho: ρ of each layer, float tensor, shape (layers,).
        rho_prime: ρ′ of each layer, same shape.

    Returns:
        The score, a 0-dimensional tensor; infinite if ρ or ρ′ of a layer is 0.

    >>> import torch
    >>> anact_score(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.5])).item()  # ln 2
    0.6931471824645996
    """
    return 0.5 * (rho.log().abs() + rho_prime.log().abs()).sum()


class Gains(NamedTuple):
    """What an activation does to a Gaussian pre-activation; see :func:`gains`."""

    mean: float
    rho: float
    centred_rho: float
    rho_prime: float
    r_score: float
    factor: float


def gains(function: Callable[[Tensor], Tensor], sigma: float = 1.0) -> Gains:
    r"""The scores of an elementwise function for a normal input, :math:`h \sim \mathcal N(0, \sigma^2)`.

    By composite Gauss-Legendre quadrature in float64: accurate to about 9 digits for functions with kinks
    at 0, and to 4 for kinks elsewhere.

    Args:
        function: elementwise callable or module φ; a module is called in evaluation mode.
        sigma: σ, > 0.

    Returns:
        ``mean`` E[φ]; ``rho`` E[φ²] / σ² (Eq. 5 of ANAct); ``centred_rho`` Var[φ] / σ² (Eq. 31); ``rho_prime``
        E[φ′²] (Eq. 6); ``r_score`` ln(centred_rho / rho_prime) (Eq. 19), 0 for equal gains of signal and gradient;
        ``factor`` λ (Eq. 13 with Eq. 31). Floats.

    Raises:
        ValueError: if ``sigma`` is not > 0.

    >>> relu = gains(torch.relu)
    >>> round(relu.rho, 6), round(relu.centred_rho, 4), round(relu.r_score, 5), round(relu.factor, 4)
    (0.5, 0.3408, -0.38318, 1.5707)
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma!r}.")
    with torch.device("cpu"):
        h, weights = _normal_nodes()
        h = h * sigma
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).to("cpu", torch.float64).eval()
    with torch.no_grad():
        values = function(h.clone())
    derivative = slope(function, h)
    mean = float(weights @ values)
    second = float(weights @ values.square())
    variance = float(weights @ (values - mean).square())
    gain_prime = float(weights @ derivative.square())
    centred = variance / sigma**2
    score = math.log(centred / gain_prime) if centred > 0 and gain_prime > 0 else math.nan
    factor = normalization_factor(centred, gain_prime) if centred * gain_prime > 0 else math.inf
    return Gains(mean, second / sigma**2, centred, gain_prime, score, factor)


def gpn_constants(function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    r"""The constants of Gaussian-Poincaré normalization: g = a f + b has :math:`E[g^2] = E[g'^2] = 1` at N(0, 1).

    :math:`a = E[f'^2]^{-1/2}`; b is the larger root of :math:`b^2 + 2 a E[f] b + a^2 E[f^2] = 1`.

    Args:
        function: elementwise callable or module f.

    Returns:
        (a, b).

    Raises:
        ValueError: if f′ = 0, so that there is no a, or f jumps, so that Var f > E[f'^2] and there is no b.

    >>> [round(number, 4) for number in gpn_constants(torch.tanh)]
    [1.4674, 0.3885]
    """
    at = gains(function)
    if not at.rho_prime > 0:
        raise ValueError(f"{function!r} has no gradient at N(0, 1), so no factor makes its mean square 1.")
    a = at.rho_prime**-0.5
    rest = 1 - a**2 * at.centred_rho  # >= 0 for continuous f (Poincaré inequality)
    if rest < -1e-6:
        raise ValueError(f"{function!r} is discontinuous: no shift makes the mean square 1.")
    return a, -a * at.mean + math.sqrt(max(0.0, rest))


def _normal_nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under N(0, 1)."""
    far, close = (245 + 14 * 70**0.5) ** 0.5 / 21, (245 - 14 * 70**0.5) ** 0.5 / 21
    near = torch.tensor([-far, -close, 0.0, close, far], dtype=torch.float64)
    outer, inner = (322 - 13 * 70**0.5) / 900, (322 + 13 * 70**0.5) / 900
    share = torch.tensor([outer, inner, 128 / 225, inner, outer], dtype=torch.float64)
    half = _REACH / _PANELS
    centres = (torch.arange(_PANELS, dtype=torch.float64) * 2 + 1) * half - _REACH
    nodes = (centres[:, None] + half * near).flatten()
    density = torch.exp(-nodes.square() / 2) / math.sqrt(2 * math.pi)
    return nodes, density * (half * share).repeat(_PANELS)
