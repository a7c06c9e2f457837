"""Bins for a histogram whose quantiles have a bounded relative error at any scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LogBins"]


@dataclass(frozen=True)
class LogBins:
    r"""Bins of logarithmic width for each sign, and one for zero, in ascending order.

    Bin k holds magnitudes in :math:`(s \gamma^{k-1}, s \gamma^k]` with :math:`\gamma = (1 + e) / (1 - e)`, and stands
    for :math:`2 s \gamma^k / (\gamma + 1)`, which is within a share e of each of them. These are the buckets of
    DDSketch (Masson et al., 2019). Histograms over the same bins are merged by adding them up.

    Args:
        relative_error: e, in (0, 1).
        smallest: s, > 0; what is closer to 0, but not 0, counts as s.
        largest: > s; what is farther from 0 counts as that.

    Raises:
        ValueError: if an argument is out of its range.

    >>> bins = LogBins(0.01, 1e-3, 1e3)
    >>> x = torch.tensor([-5.0, 0.0, 0.3, 1e9])
    >>> [round(value, 2) for value in bins.values()[bins.index(x)].tolist()]
    [-4.97, 0.0, 0.3, 994.91]
    """

    relative_error: float
    smallest: float
    largest: float

    def __post_init__(self) -> None:
        if not 0 < self.relative_error < 1:
            raise ValueError(f"relative_error must be in (0, 1), got {self.relative_error!r}.")
        if not 0 < self.smallest < self.largest < math.inf:
            raise ValueError(f"magnitudes must be 0 < smallest < largest, got {(self.smallest, self.largest)!r}.")

    @property
    def _width(self) -> float:
        return math.log((1 + self.relative_error) / (1 - self.relative_error))

    @property
    def per_sign(self) -> int:
        """Number of bins of each sign."""
        return math.ceil(math.log(self.largest / self.smallest) / self._width)

    def __len__(self) -> int:
        return 2 * self.per_sign + 1

    def index(self, x: Tensor) -> Tensor:
        """The bin of each element.

        Args:
            x: float tensor of any shape. NaN counts as 0.

        Returns:
            Integers of the same shape.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32)).nan_to_num(0.0)
        k = ((x.abs().log() - math.log(self.smallest)) / self._width).ceil().clamp(1, self.per_sign)
        return self.per_sign + (x.sign() * k).long()

    def values(self, device: torch.device | None = None) -> Tensor:
        """What each bin stands for, ascending, float32, shape (len(self),)."""
        k = torch.arange(1, self.per_sign + 1, dtype=torch.float64, device="cpu")
        middle = 2 / (1 + math.exp(self._width))
        positive = self.smallest * middle * (k * self._width).exp()
        return torch.cat([-positive.flip(0), torch.zeros(1, dtype=k.dtype, device="cpu"), positive]).float().to(device)
