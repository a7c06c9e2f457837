"""What the units of a layer do: which dimension they are in, which of them are dormant, how many act independently.

Units are the channels of a convolution and the features of a linear layer or a Transformer. Everything else (batch,
positions) is samples.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["dormant_scores", "effective_rank", "over_samples", "unit_dim_of"]


def unit_dim_of(input_dim: int, unit_dim: int | None = None) -> int:
    """The dimension of the units, counted from the front.

    Args:
        input_dim: number of dimensions of the activation; a 0-dimensional one counts as 1-dimensional.
        unit_dim: the dimension of the units, negative if counted from the back. None: the last one of up to 3
            dimensions, (batch, features) or (batch, tokens, features), else dimension 1, (batch, channels, ...).

    Returns:
        A number >= 0.

    Raises:
        ValueError: if there is no such dimension.

    >>> unit_dim_of(3), unit_dim_of(4), unit_dim_of(4, -1)
    (2, 1, 3)
    """
    dims = max(input_dim, 1)
    if unit_dim is None:
        unit_dim = -1 if dims <= 3 else 1
    if not -dims <= unit_dim < dims:
        raise ValueError(f"unit_dim must be in [{-dims}, {dims - 1}] for {dims} dimensions, got {unit_dim!r}.")
    return unit_dim % dims


def over_samples(x: Tensor, unit_dim: int) -> list[int]:
    """The dimensions to reduce for a number per unit: all but that of the units.

    Args:
        x: activation of any shape.
        unit_dim: the dimension of the units, negative if counted from the back.

    >>> import torch
    >>> over_samples(torch.zeros(8, 3, 5, 5), 1)
    [0, 2, 3]
    """
    return [dim for dim in range(x.dim()) if dim != unit_dim % x.dim()]


def dormant_scores(magnitude: Tensor) -> Tensor:
    r"""How strong each unit of a layer is, relative to the others.

    :math:`s_i = E|\varphi_i| / (\frac{1}{n} \sum_k E|\varphi_k|)` of Sokar et al., "The Dormant Neuron
    Phenomenon in Deep Reinforcement Learning" (2023): a unit is τ-dormant if :math:`s_i \le \tau`. Their τ are 0,
    0.025 and 0.1.

    Args:
        magnitude: mean absolute activation of each unit, or any multiple of it, float tensor, shape (units,).

    Returns:
        Scores, same shape; their mean is 1. All are 0 if every unit is silent.

    >>> import torch
    >>> dormant_scores(torch.tensor([0.0, 1.0, 3.0, 4.0]))
    tensor([0.0000, 0.5000, 1.5000, 2.0000])
    """
    level = magnitude.mean()
    return magnitude / level.where(level != 0, 1.0)


def effective_rank(singular_values: Tensor) -> Tensor:
    r"""How many directions a matrix uses, weighted by how much.

    :math:`\exp(-\sum_k p_k \ln p_k)` with :math:`p_k = \sigma_k / \sum_i \sigma_i` and :math:`0 \ln 0 = 0`: Roy and
    Vetterli, "The effective rank" (2007). It is 1 for a matrix of rank 1 and n for n equal singular values.

    Args:
        singular_values: σ, >= 0, float tensor, shape (n,).

    Returns:
        A 0-dimensional tensor in [1, n]; NaN if all singular values are 0.

    >>> import torch
    >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
    tensor(2.)
    """
    p = singular_values / singular_values.sum()
    return (-p.xlogy(p).sum()).exp()
