"""How far an activation is from keeping the variance of signal and gradient: the ANAct scores."""

from __future__ import annotations

from torch import Tensor

__all__ = ["anact_score", "rho", "rho_prime"]


def rho(input_var: Tensor, output_mean: Tensor, output_var: Tensor) -> Tensor:
    r"""Gain of the signal, from the moments of an activation's input and output.

    :math:`\rho = E[\varphi(h)^2] / \mathrm{Var}[h]`, Eq. 5 of Yuan et al., "ANAct: Adaptive
    Normalization for Activation Functions" (2022).

    Args:
        input_var: variance of the pre-activation, any shape.
        output_mean: mean of the output, same shape.
        output_var: variance of the output, same shape.

    Returns:
        ρ, same shape; NaN or infinite where the input doesn't vary.

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


def anact_score(rho: Tensor, rho_prime: Tensor) -> Tensor:
    r"""Distance from gains of 1, summed over the layers.

    :math:`\sum_i \frac{1}{2}(|\ln \rho_i| + |\ln \rho'_i|)`, Eq. 22 of ANAct: 0 where every activation
    keeps the variance of the signal and of the gradient.

    Args:
        rho: ρ of each layer, float tensor, shape (layers,).
        rho_prime: ρ′ of each layer, same shape.

    Returns:
        The score, a 0-dimensional tensor; infinite when a layer lets nothing through.

    >>> import torch
    >>> anact_score(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.5])).item()  # ln 2
    0.6931471824645996
    """
    return 0.5 * (rho.log().abs() + rho_prime.log().abs()).sum()
