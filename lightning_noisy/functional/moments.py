"""The moments of a function's input and output that its normalization needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "moments", "pooled", "sums"]


class Moments(NamedTuple):
    """Population moments of inputs x and values δ(x).

    Attributes:
        mean_x: E[x].
        var_x: Var[x].
        mean_y: E[δ].
        var_y: Var[δ].
        rho_prime: E[δ′²].
    """

    mean_x: Tensor
    var_x: Tensor
    mean_y: Tensor
    var_y: Tensor
    rho_prime: Tensor


def moments(x: Tensor, y: Tensor, derivative: Tensor, dims: Sequence[int] | None = None) -> Moments:
    """Moments over all elements, or over some dimensions.

    Args:
        x: float tensor of any shape, not empty.
        y: δ(x), same shape.
        derivative: δ′(x), same shape.
        dims: dimensions to reduce; they are kept with size 1. None: all, and the moments are 0-dimensional.

    Returns:
        Moments of the dtype of ``x``.

    >>> x = torch.tensor([1.0, 3.0])
    >>> moments(x, 2 * x, torch.full((2,), 2.0)).var_y
    tensor(4.)
    """
    over = list(range(x.dim()) if dims is None else dims)
    var_y, mean_y = torch.var_mean(y, over, correction=0, keepdim=dims is not None)
    var_x, mean_x = torch.var_mean(x, over, correction=0, keepdim=dims is not None)
    return Moments(mean_x, var_x, mean_y, var_y, derivative.square().mean(over, keepdim=dims is not None))


def sums(count: int, found: Moments, *, dtype: torch.dtype) -> Tensor:
    """Moments in additive form: the number of elements and the sums of x, x², δ, δ² and δ′².

    Args:
        count: number of elements of the moments.
        found: 0-dimensional moments.
        dtype: dtype of the sums. In float64, cancellation is negligible even if the mean far exceeds the deviation.

    Returns:
        Tensor, shape (6,).
    """
    mean_x, var_x, mean_y, var_y, rho_prime = (value.to(dtype) for value in found)
    means = (torch.ones_like(mean_x), mean_x, var_x + mean_x**2, mean_y, var_y + mean_y**2, rho_prime)
    return count * torch.stack(means)


def pooled(added: Tensor) -> Moments:
    """The moments over all elements of several added :func:`sums`; NaN if there are none.

    Args:
        added: shape (6,), or (6, n) for n sites.

    >>> x, y = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0, 8.0])
    >>> parts = [sums(len(part), moments(part, part, torch.ones_like(part)), dtype=torch.float64) for part in (x, y)]
    >>> pooled(parts[0] + parts[1]).var_x.float() == torch.cat([x, y]).var(correction=0)
    tensor(True)
    """
    _, mean_x, square_x, mean_y, square_y, rho_prime = (added / added[0]).unbind()
    return Moments(mean_x, square_x - mean_x**2, mean_y, square_y - mean_y**2, rho_prime)
