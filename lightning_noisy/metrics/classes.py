"""What each unit of a layer does for the samples of each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_noisy.functional.log_bins import LogBins
from lightning_noisy.metrics.units import UnitMetric

__all__ = ["ClassActivations"]


class ClassActivations(UnitMetric):
    r"""Median and standard deviation of each unit's activation for the samples of each class.

    Fig. 5 to 7 of Pretorius et al., "ReLU and sigmoidal activation functions" (2019), over all batches and processes.

    The median is read from a histogram with bins of logarithmic width
    (:class:`~lightning_noisy.functional.log_bins.LogBins`), one for zero and as many for each sign as ``magnitudes``
    need: it is off by at most ``relative_error`` of the one or two elements in the middle. Elements closer to 0 than
    the smallest magnitude, but not 0, count as that, and larger ones than the largest as the largest. The standard
    deviation is the population's, from exact sums.

    The histogram takes 8 bytes x classes x units x ``num_bins``: 57 MB for 10 classes, 512 units and the default of
    1383 bins. Reset the metric to start a new window. ``metric(...)``, unlike ``metric.update(...)``, copies it at
    every step.

    Args:
        num_classes: number of classes, >= 1.
        num_units: number of units, >= 1.
        relative_error: of the median, in (0, 1).
        magnitudes: smallest and largest magnitude with that error, > 0.
        unit_dim: dimension of the units; by default the last one of up to 3 dimensions, else dimension 1.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if an argument is out of its range.

    >>> metric = ClassActivations(2, 1)
    >>> metric.update(output=torch.tensor([[1.0], [2.0], [9.0], [-4.0]]), target=torch.tensor([0, 0, 0, 1]))
    >>> [round(value, 1) for value in metric.compute()["median"].flatten().tolist()]
    [2.0, -4.0]
    """

    histogram: Tensor
    class_sums: Tensor
    class_counts: Tensor

    def __init__(
        self,
        num_classes: int,
        num_units: int,
        *,
        relative_error: float = 0.01,
        magnitudes: tuple[float, float] = (1e-3, 1e3),
        unit_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_units, unit_dim=unit_dim, **kwargs)
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}.")
        self.num_classes = num_classes
        self._bins = LogBins(relative_error, *magnitudes)
        self.add_counts("histogram", num_classes, num_units, self.num_bins)
        self.add_sums("class_sums", 2, num_classes, num_units)  # Σφ, Σφ²
        self.add_counts("class_counts", num_classes)

    @property
    def num_bins(self) -> int:
        """Number of bins of each histogram."""
        return len(self._bins)

    def update(self, *, output: Tensor, target: Tensor) -> None:
        """Add a batch; an empty one changes nothing.

        Args:
            output: φ(h), float tensor with a dimension of ``num_units`` units.
            target: class numbers, integers: one for each sample, shape (batch,), or one for each position too, which is
                the shape of ``output`` without the units. Samples of other numbers than those of the classes, such as
                -100, are left out.

        Raises:
            ValueError: if the shapes don't fit, or the targets aren't integers.
        """
        if not output.numel():
            return
        x = output.detach().movedim(self.dim_of(output, "output"), -1)
        if target.is_floating_point() or target.shape != x.shape[: target.dim()] or target.dim() >= x.dim():
            raise ValueError(
                f"target must be integers of shape {tuple(x.shape[:1])} or {tuple(x.shape[:-1])} for output of shape "
                f"{tuple(output.shape)}, got {target.dtype} of shape {tuple(target.shape)}."
            )
        target = target.reshape(*target.shape, *[1] * (x.dim() - 1 - target.dim())).expand(x.shape[:-1]).reshape(-1)
        x = x.reshape(-1, self.num_units)  # (samples, units)
        known = (target >= 0) & (target < self.num_classes)
        target = target.long().where(known, 0)
        self._add_histogram(self._bins.index(x), target, known)
        values = x.to(self.class_sums.dtype).where(known[:, None], 0)
        # (2, samples, units)
        self.class_sums = self.class_sums.index_add(1, target, torch.stack([values, values.square()]))
        self.class_counts = self.class_counts.index_add(0, target, known.long())

    def _add_histogram(self, bins: Tensor, target: Tensor, known: Tensor) -> None:
        # In place, since it may be large. A tensor that was made in inference mode can't be changed outside.
        if self.histogram.is_inference() and not torch.is_inference_mode_enabled():
            self.histogram = self.histogram.clone()
        unit = torch.arange(self.num_units, device=bins.device)
        places = (target[:, None] * self.num_units + unit) * self.num_bins + bins
        self.histogram.view(-1).scatter_add_(0, places.reshape(-1), known[:, None].long().expand_as(places).reshape(-1))

    def compute(self) -> dict[str, Tensor]:
        """The statistics of each class and unit.

        Returns:
            ``median`` and ``std``, shape (classes, units), and ``count`` of samples (times positions), shape
            (classes,). NaN where a class has no sample, or a unit was NaN.
        """
        count = self.class_counts[:, None]
        mean, square = self.class_sums / count
        number = self.histogram.sum(-1, keepdim=True)  # (classes, units, 1), the count of the class
        middle = torch.cat([(number - 1).div(2, rounding_mode="floor"), number // 2], -1).clamp_min(0)
        place = torch.searchsorted(self.histogram.cumsum(-1), middle, right=True).clamp_max(self.num_bins - 1)
        median = self._bins.values(place.device)[place].mean(-1)
        return {
            "median": median.where(~mean.isnan(), torch.nan),
            "std": (square - mean.square()).clamp_min(0).sqrt(),
            "count": self.class_counts.clone(),
        }

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the medians as a picture: a row for each class, a column for each unit.

        Args:
            val: what ``compute`` or ``forward`` returned; by default the value now.
            ax: matplotlib's axes; by default in a new figure.

        Returns:
            The figure (None if ``ax`` is given) and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ModuleNotFoundError("Plots need matplotlib: pip install matplotlib.") from error
        figure, axes = pyplot.subplots() if ax is None else (None, ax)
        median = (self.compute() if val is None else val)["median"]
        image = axes.imshow(median.numpy(force=True), aspect="auto", interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, label="median activation")
        axes.set_xlabel("unit")
        axes.set_ylabel("class")
        return figure, axes
