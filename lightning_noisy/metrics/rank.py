"""How many directions the activations of a layer use."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_noisy.functional.units import effective_rank
from lightning_noisy.metrics.units import UnitMetric

__all__ = ["EffectiveRank"]


class EffectiveRank(UnitMetric):
    r"""Effective rank of the features, the matrix of all samples of all batches and processes times units.

    :math:`\exp(-\sum_k p_k \ln p_k)` with :math:`p_k = \sigma_k / \sum_i \sigma_i`: Roy and Vetterli, "The effective
    rank" (2007). The singular values :math:`\sigma_k` of the features F are the square roots of the eigenvalues of
    the Gram matrix :math:`F^T F`, whose sum over batches is the state. Squaring costs half of the digits: singular
    values below about :math:`\sqrt{n} \cdot 10^{-8}` of the largest count as 0.

    Its cost is that of a float64 product (units x samples x units) per update, of :math:`8 n^2` bytes for n units,
    and of an eigendecomposition, on the CPU, when it is computed.

    Args:
        num_units: number of units n, >= 1.
        centred: subtract each unit's mean, for the rank of the covariance: the singular values are then multiples of
            the standard deviations of the principal components. Without it, a large mean is a direction of its own.
        unit_dim: dimension of the units; by default the last one of up to 3 dimensions, else dimension 1.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``num_units`` is not an integer >= 1.

    >>> metric = EffectiveRank(3)
    >>> metric.update(output=torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    >>> round(metric.compute().item(), 6)
    2.0
    """

    plot_lower_bound = 1.0
    gram: Tensor
    totals: Tensor
    features_count: Tensor

    def __init__(self, num_units: int, *, centred: bool = False, unit_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_units, unit_dim=unit_dim, **kwargs)
        self.centred = centred
        self.add_sums("gram", num_units, num_units)
        self.add_sums("totals", num_units)
        self.add_counts("features_count")

    def update(self, *, output: Tensor) -> None:
        """Add a batch; an empty one changes nothing.

        Args:
            output: φ(h), float tensor with a dimension of ``num_units`` units.

        Raises:
            ValueError: if the number of units is another.
        """
        if not output.numel():
            return
        dim = self.dim_of(output, "output")
        features = output.detach().to(self.gram.dtype).movedim(dim, -1).reshape(-1, self.num_units)
        kind = features.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            self.gram = self.gram + features.T @ features
        self.totals = self.totals + features.sum(0)
        self.features_count = self.features_count + len(features)

    def compute(self) -> Tensor:
        """The effective rank, a 0-dimensional tensor in [1, num_units].

        NaN if there was no sample, all are 0, or one is not finite.
        """
        gram, totals = self.gram.cpu(), self.totals.cpu()
        rounding = self.num_units * torch.finfo(gram.dtype).eps * gram.diagonal().amax()
        if self.centred:
            gram = gram - torch.outer(totals, totals) / self.features_count.cpu()
        if not gram.isfinite().all():
            return torch.full_like(self.totals[0], torch.nan)
        squares = torch.linalg.eigvalsh(gram)
        return effective_rank(squares.where(squares > rounding, 0.0).sqrt()).to(self.gram.device)
