"""How much of an activation is in its flat parts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_noisy.metrics._pooled import PooledMetric, same_shape, sum_dtype, wide

__all__ = ["SaturationRate"]


class SaturationRate(PooledMetric):
    r"""Share of the elements at which an activation is saturated, over all batches and processes.

    Soft: :math:`|\varphi'(h)| < \mathrm{threshold} \cdot \max |\varphi'|`; hard: :math:`\varphi'(h) = 0`. After
    Definitions 2.2 and 2.3 of Gulcehre et al., "Noisy Activation Functions" (2016), which are about the function's
    limits, while this counts the inputs that it gets. Left is h < 0, right is h >= 0; both are shares of all
    elements, so that they add up to the total.

    Args:
        threshold: share of the largest slope, > 0.
        largest_slope: the function's largest absolute slope, > 0, see :func:`lightning_noisy.functional.largest_slope`:
            1 for ReLU and tanh, 0.25 for the sigmoid.
        side: ``"left"``, ``"right"``, or None for both.
        hard: count slopes of exactly 0, whatever the threshold.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if an argument is out of its range.

    >>> metric = SaturationRate(side="right")
    >>> h = torch.tensor([-5.0, 0.0, 1.0, 5.0])
    >>> metric.update(input=h, slope=1 - h.tanh() ** 2)
    >>> metric.compute().item()
    0.25
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    saturation_sums: Tensor

    def __init__(
        self,
        *,
        threshold: float = 0.05,
        largest_slope: float = 1.0,
        side: Literal["left", "right"] | None = None,
        hard: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("threshold", threshold), ("largest_slope", largest_slope)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value!r}.")
        if side not in (None, "left", "right"):
            raise ValueError(f'side must be "left", "right" or None, got {side!r}.')
        self.side, self.hard = side, hard
        self._bound = float(threshold * largest_slope)
        # Numbers of elements: all; saturated; left of them; hard-saturated; left of them. A collection shares the
        # states of metrics that are equal after the first batch. The last number, which nothing reads, differs where
        # bounds do.
        start = torch.tensor([0, 0, 0, 0, 0, self._bound], dtype=sum_dtype(torch.get_default_device()))
        self.add_state("saturation_sums", default=start, dist_reduce_fx="sum")

    def update(self, *, input: Tensor, slope: Tensor) -> None:
        """Add a batch; an empty one changes nothing.

        Args:
            input: pre-activation h, float tensor of any shape.
            slope: φ′(h), same shape, see :func:`lightning_noisy.functional.slope`.

        Raises:
            ValueError: if the shapes differ.
        """
        if not same_shape(input=input, slope=slope):
            return
        size, left = wide(slope).abs(), input < 0
        soft, hard = size < self._bound, size == 0
        found = [each.count_nonzero() for each in (soft, soft & left, hard, hard & left)]
        count = torch.full_like(found[0], size.numel())
        self.saturation_sums = self.saturation_sums + torch.stack([count, *found, torch.zeros_like(count)])

    def compute(self) -> Tensor:
        """The share, a 0-dimensional tensor in [0, 1]; NaN if there was no element."""
        count, soft, soft_left, hard, hard_left, _ = self.saturation_sums.unbind()
        total, left = (hard, hard_left) if self.hard else (soft, soft_left)
        return {None: total, "left": left, "right": total - left}[self.side] / count
