"""What the weights and their gradients show of a training step, in float64 where the device has it.

Gradients that vanish are what one looks for here, and the squares of small numbers underflow in float32.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["gradient_variance", "update_ratio", "weight_mean"]


def weight_mean(weight: Tensor) -> Tensor:
    r"""How far a weight matrix has shifted from zero mean: :math:`|E[W]|`, Fig. 4 of ANAct (Yuan et al., 2022).

    ANAct's analysis (Eq. 7) takes the mean of the weights as 0.

    Args:
        weight: W, float tensor of any shape.

    Returns:
        A 0-dimensional tensor.

    >>> import torch
    >>> weight_mean(torch.tensor([[1.0, -3.0]])).item()
    1.0
    """
    return _wide(weight).mean().abs()


def gradient_variance(gradient: Tensor) -> Tensor:
    r"""Variance of the gradient over a weight matrix: :math:`\mathrm{Var}[\partial Cost / \partial W]`.

    Eq. 7 and 8 of ANAct (Yuan et al., 2022), the quantity that its normalization evens out over the layers. The
    variance is the population's.

    Args:
        gradient: ∂Cost/∂W, float tensor of any shape, before clipping.

    Returns:
        A 0-dimensional tensor.

    >>> import torch
    >>> gradient_variance(torch.tensor([[1.0, -3.0]])).item()
    4.0
    """
    return _wide(gradient).var(correction=0)


def update_ratio(old: Tensor, new: Tensor) -> Tensor:
    r"""Size of an update relative to the weights: :math:`\|W_{t+1} - W_t\| / \|W_t\|`, Frobenius norms.

    Args:
        old: W before the optimizer's step, float tensor of any shape.
        new: W after it, same shape.

    Returns:
        A 0-dimensional tensor; NaN or infinite if ``old`` is zero.

    >>> import torch
    >>> update_ratio(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])).item()
    0.1
    """
    before = _wide(old)
    ratio: Tensor = (_wide(new) - before).norm() / before.norm()
    return ratio


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
