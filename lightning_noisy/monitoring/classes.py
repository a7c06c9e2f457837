"""What the units of each site do for the samples of each class, of the batches of this process that are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_noisy.functional.units import unit_dim_of
from lightning_noisy.metrics.classes import ClassActivations

__all__ = ["ClassWatch"]

_SITES = 8  # of deep models the first ones: each takes a histogram per class and unit


class ClassWatch:
    """Collects the activations by class.

    Args:
        num_classes: number of classes, >= 1.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._metrics: dict[int, ClassActivations] = {}
        self._target: Tensor | None = None

    def begin(self, batch: Any) -> None:
        """Take the class numbers of a batch: the last of its parts, if that is of integers."""
        last = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        is_target = isinstance(last, Tensor) and not last.is_floating_point() and last.dim() == 1
        self._target = last if is_target else None

    def add(self, site: int, output: Tensor, unit_dim: int) -> None:
        """Add an output of a site; one that has no sample for each target is left out."""
        if self._target is None or len(output) != len(self._target) or output.dim() < 2:
            return
        units = output.shape[unit_dim_of(output.dim(), unit_dim)]
        metric = self._metrics.get(site)
        if metric is None:
            if len(self._metrics) >= _SITES:
                return
            metric = ClassActivations(self._num_classes, units, unit_dim=unit_dim, sync_on_compute=False)
            metric = self._metrics[site] = metric.to(output.device)
        if metric.num_units == units:
            metric.update(output=output, target=self._target)

    def tables(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Of each site what :class:`ClassActivations` computes, since the last call."""
        for site, metric in self._metrics.items():
            if metric.update_called:
                yield site, {name: value.cpu() for name, value in metric.compute().items()}
                with torch.no_grad():
                    metric.reset()
