"""The formulas of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions" (2022)."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["normalization_factor", "normalize_output", "update_running"]


Gain = TypeVar("Gain", Tensor, float)


def normalization_factor(rho: Gain, rho_prime: Gain) -> Gain:
    r"""The factor that brings the gains of signal and gradient to 1, as a compromise between both.

    :math:`\lambda = \sqrt{(\rho + \rho') / (2 \rho \rho')}`, Eq. 13: :math:`\lambda^2` is the reciprocal of
    their harmonic mean.

    Args:
        rho: gain of the signal, Var[δ(x)] / Var[x] (Eq. 31), > 0; a tensor or a float.
        rho_prime: gain of the gradient, E[δ′(x)²] (Eq. 6), > 0, of the same type.

    Returns:
        λ, of the same type.

    >>> normalization_factor(torch.tensor(0.340845), torch.tensor(0.5))  # ReLU on N(0, 1)
    tensor(1.5707)
    """
    factor: Gain = ((rho + rho_prime) / (2 * rho * rho_prime)) ** 0.5
    return factor


def normalize_output(output: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    r""":math:`\hat\delta(x) = (\lambda + f(\alpha)) (\delta(x) - \mu)`, Eq. 15.

    Args:
        output: δ(x), float tensor of any shape.
        scale: λ + f(α), 0-dimensional.
        shift: μ, 0-dimensional.

    Returns:
        Tensor of the shape and dtype of ``output``.
    """
    centred = output - shift.to(output.dtype)
    if output.dtype.itemsize < 4 and scale.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Scaled.apply(centred, scale))
    return centred * scale.to(output.dtype)


class _Scaled(torch.autograd.Function):
    """A product in half precision; the factor's gradient, a sum over all elements, has the factor's precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(centred: Tensor, scale: Tensor) -> Tensor:
        return centred * scale.to(centred.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        centred, scale = ctx.saved_tensors
        of_scale = (gradient.to(scale.dtype) * centred.to(scale.dtype)).sum_to_size(scale.shape)
        return gradient * scale.to(centred.dtype), of_scale


def update_running(
    running: Tensor, batch: Tensor, *, momentum: float, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    r"""Update a running statistic with the batch's value, unless that is out of bounds.

    :math:`m \rho_M + (1 - m) \rho` if :math:`L \rho < \rho_M < U \rho`, else :math:`\rho` (Eq. 17-18).

    Args:
        running: the running statistic, > 0, 0-dimensional.
        batch: the batch's value, 0-dimensional.
        momentum: m, the weight of the batch, in (0, 1].
        bounds: (L, U), as multiples of the running statistic.

    Returns:
        The new running statistic, and whether the batch's value was accepted (bool tensor).

    >>> update_running(torch.tensor(1.0), torch.tensor(9.0), momentum=0.1, bounds=(0.2, 5.0))
    (tensor(1.), tensor(False))
    """
    lower, upper = bounds
    accepted = (lower * running < batch) & (batch < upper * running)
    return torch.where(accepted, running.lerp(batch, momentum), running), accepted
