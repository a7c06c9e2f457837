"""How many units of a layer are inactive, dead or dormant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_noisy.functional.units import dormant_scores, over_samples, unit_dim_of
from lightning_noisy.metrics._pooled import PooledMetric, checked_units

__all__ = ["DeadUnits", "DormantUnits", "GradientDormantUnits", "Sparsity", "UnitMetric"]


class Sparsity(PooledMetric):
    r"""Share of the samples for which a unit is inactive, :math:`\varphi \le 0`, averaged over the units of a layer.

    Table 1 of Pretorius et al., "ReLU and sigmoidal activation functions" (2019), over all batches and processes.
    Since all units have the same number of samples, it is the share of all elements, and needs no number of units.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    >>> metric = Sparsity()
    >>> metric.update(output=torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    >>> metric.compute().item()
    0.75
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    inactive_count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_counts("inactive_count", 2)  # elements, inactive elements

    def update(self, *, output: Tensor) -> None:
        """Add a batch; an empty one changes nothing.

        Args:
            output: φ(h), float tensor of any shape.
        """
        inactive = (output <= 0).count_nonzero()
        self.inactive_count = self.inactive_count + torch.stack([torch.full_like(inactive, output.numel()), inactive])

    def compute(self) -> Tensor:
        """The share, a 0-dimensional tensor in [0, 1]; NaN if there was no element."""
        count, inactive = self.inactive_count.unbind()
        return inactive / count


class UnitMetric(PooledMetric):
    """A metric that has a number for each unit of a layer.

    Args:
        num_units: number of units, >= 1.
        unit_dim: dimension of the units; by default the last one of up to 3 dimensions, else dimension 1.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``num_units`` is not an integer >= 1.
    """

    def __init__(self, num_units: int, *, unit_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_units, self.unit_dim = checked_units(num_units), unit_dim

    def dim_of(self, x: Tensor, name: str) -> int:
        """The dimension of the units.

        Raises:
            ValueError: if it doesn't have ``num_units`` elements.
        """
        dim = unit_dim_of(x.dim(), self.unit_dim)
        if (x.shape or (1,))[dim] != self.num_units:
            raise ValueError(
                f"{name} must have num_units = {self.num_units} units in dimension {dim}, got shape {tuple(x.shape)}. "
                "unit_dim says which dimension has them."
            )
        return dim


class DeadUnits(UnitMetric):
    r"""Share of the units whose slope is 0 for every sample of every batch and process, so that they get no gradient.

    For a ReLU these are the units that are never active. A unit that has a slope once is alive, so that the window
    (from a reset on) should be many samples: at an activity of 2 % more than half of the units have none in a batch
    of 32.

    Args:
        num_units: number of units, >= 1.
        unit_dim: dimension of the units; by default the last one of up to 3 dimensions, else dimension 1.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``num_units`` is not an integer >= 1.

    >>> metric = DeadUnits(3)
    >>> metric.update(slope=torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    >>> round(metric.compute().item(), 4)
    0.3333
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    with_slope: Tensor
    samples: Tensor

    def __init__(self, num_units: int, *, unit_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_units, unit_dim=unit_dim, **kwargs)
        self.add_counts("with_slope", num_units)
        self.add_counts("samples")

    def update(self, *, slope: Tensor) -> None:
        """Add a batch; an empty one changes nothing.

        Args:
            slope: φ′(h), float tensor with a dimension of ``num_units`` units, see
                :func:`lightning_noisy.functional.slope`.

        Raises:
            ValueError: if the number of units is another.
        """
        if not slope.numel():
            return
        over = over_samples(slope, self.dim_of(slope, "slope"))
        alive = (slope != 0).sum(over) if over else (slope != 0).long().reshape(-1)
        self.with_slope = self.with_slope + alive
        self.samples = self.samples + slope.numel() // self.num_units

    def compute(self) -> Tensor:
        """The share, a 0-dimensional tensor in [0, 1]; NaN if there was no sample."""
        return (self.with_slope == 0).float().mean().where(self.samples > 0, torch.nan)


class DormantUnits(UnitMetric):
    r"""Share of the units that are dormant: their mean absolute activation is at most τ of the mean over the units.

    :math:`E|\varphi_i| \le \tau \frac{1}{n} \sum_k E|\varphi_k|`: Sokar et al., "The Dormant Neuron Phenomenon in Deep
    Reinforcement Learning" (2023), over all batches and processes. A dead ReLU is dormant at any τ; the reverse doesn't
    hold. Whether dormant units harm is disputed, above all outside plain networks of ReLUs: a unit may be small and
    important. :class:`GradientDormantUnits` takes the gradients for the activations.

    Args:
        num_units: number of units, >= 1.
        tau: τ, in [0, 1]; the paper has 0, 0.025 and 0.1.
        unit_dim: dimension of the units; by default the last one of up to 3 dimensions, else dimension 1.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``num_units`` or ``tau`` is out of its range.

    >>> metric = DormantUnits(4, tau=0.1)
    >>> metric.update(output=torch.tensor([[0.0, 0.2, 1.0, 2.0], [0.0, 0.0, -3.0, 4.0]]))
    >>> metric.compute().item()
    0.5
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, num_units: int, *, tau: float = 0.025, unit_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_units, unit_dim=unit_dim, **kwargs)
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {tau!r}.")
        self.tau = tau
        # A collection shares states of the same name if they are equal: those of activations and gradients never are.
        self._magnitudes, self._samples = f"{self._name}_magnitudes", f"{self._name}_samples"
        self.add_sums(self._magnitudes, num_units)
        self.add_counts(self._samples)

    _name = "output"

    def update(self, *, output: Tensor) -> None:
        """Add a batch; an empty one changes nothing.

        Args:
            output: φ(h), float tensor with a dimension of ``num_units`` units.

        Raises:
            ValueError: if the number of units is another.
        """
        self._add(output)

    def _add(self, x: Tensor) -> None:
        if not x.numel():
            return
        x = x.detach()
        over, known = over_samples(x, self.dim_of(x, self._name)), getattr(self, self._magnitudes)
        size = x.abs()
        setattr(self, self._magnitudes, known + (size.sum(over, dtype=known.dtype) if over else size.reshape(-1)))
        setattr(self, self._samples, getattr(self, self._samples) + x.numel() // self.num_units)

    def compute(self) -> Tensor:
        """The share, a 0-dimensional tensor in [0, 1]; NaN if there was no sample, or a NaN."""
        scores = dormant_scores(getattr(self, self._magnitudes))
        share = (scores <= self.tau).to(scores.dtype).where(~scores.isnan(), torch.nan).mean()
        return share.where(getattr(self, self._samples) > 0, torch.nan)


class GradientDormantUnits(DormantUnits):
    r"""Share of the units whose mean absolute gradient is at most τ of the mean over the units.

    :class:`DormantUnits` with :math:`E|\partial L / \partial \varphi_i|` in place of the activation: how much a unit
    still learns, not how much it says. Liu et al., "Measure gradients, not activations!" (2025), propose gradients
    for networks that aren't plain.

    Args:
        num_units: number of units, >= 1.
        tau: τ, in [0, 1].
        unit_dim: dimension of the units; by default the last one of up to 3 dimensions, else dimension 1.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``num_units`` or ``tau`` is out of its range.

    >>> metric = GradientDormantUnits(2)
    >>> output = torch.tensor([[5.0, 5.0]], requires_grad=True)
    >>> output[:, 0].sum().backward()
    >>> metric.update(gradient=output.grad)
    >>> metric.compute().item()
    0.5
    """

    _name = "gradient"

    def update(self, *, gradient: Tensor) -> None:  # type: ignore[override]
        """Add a batch; an empty one changes nothing.

        Args:
            gradient: ∂L/∂φ, float tensor with a dimension of ``num_units`` units.

        Raises:
            ValueError: if the number of units is another.
        """
        self._add(gradient)
