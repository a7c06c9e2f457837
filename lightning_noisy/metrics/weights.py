"""What a weight matrix, its gradient and its updates show, averaged over the steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_noisy.functional.weights import gradient_variance, update_ratio, weight_mean
from lightning_noisy.metrics._pooled import PooledMetric, same_shape

__all__ = ["GradientVariance", "StepMean", "UpdateRatio", "WeightMean"]


class StepMean(PooledMetric):
    """The mean of a number over the updates; each is a step of the optimizer and has the same weight.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.
    """

    plot_lower_bound = 0.0
    _state: str  # a name of its own: a collection shares equal states of the same name

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums(self._state, 2)  # steps, sum

    def _add(self, value: Tensor, counts: Tensor | None = None) -> None:
        """Add a number, unless ``counts`` is False."""
        known = getattr(self, self._state)
        step = torch.stack([torch.ones_like(value), value]).to(known.dtype)
        setattr(self, self._state, known + (step if counts is None else step.where(counts, 0)))

    def compute(self) -> Tensor:
        """The mean, a 0-dimensional tensor; NaN if there was no step."""
        known: Tensor = getattr(self, self._state)
        return known[1] / known[0]


class WeightMean(StepMean):
    r"""How far a weight matrix has shifted from zero mean: :math:`|E[W]|`, averaged over the updates.

    Fig. 4 of Yuan et al., "ANAct: Adaptive Normalization for Activation Functions" (2022), draws the sum over the
    matrices.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    >>> metric = WeightMean()
    >>> metric.update(torch.tensor([[1.0, -3.0]]))
    >>> metric.update(torch.tensor([[1.0, 3.0]]))
    >>> metric.compute().item()
    1.5
    """

    _state = "weight_mean_sums"

    def update(self, weight: Tensor) -> None:
        """Add a step; an empty tensor changes nothing.

        Args:
            weight: W, float tensor of any shape.
        """
        if weight.numel():
            self._add(weight_mean(weight))


class GradientVariance(StepMean):
    r"""Variance of the gradient over the elements of a weight matrix, averaged over the updates.

    :math:`\mathrm{Var}[\partial Cost / \partial W]` in each step, Eq. 7 and 8 of Yuan et al., "ANAct: Adaptive
    Normalization for Activation Functions" (2022). The steps are averaged, not pooled: how the mean moves from step
    to step isn't the variance within a matrix.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    >>> metric = GradientVariance()
    >>> metric.update(torch.tensor([[1.0, -1.0]]))
    >>> metric.update(torch.tensor([[9.0, 9.0]]))
    >>> metric.compute().item()
    0.5
    """

    _state = "gradient_variance_sums"

    def update(self, gradient: Tensor) -> None:
        """Add a step; an empty tensor changes nothing.

        Args:
            gradient: ∂Cost/∂W, float tensor of any shape, unscaled and before clipping.
        """
        if gradient.numel():
            self._add(gradient_variance(gradient))


class UpdateRatio(StepMean):
    r"""Size of an update relative to the weights, :math:`\|W_{t+1} - W_t\| / \|W_t\|`, averaged over the updates.

    A step from weights that are all 0 has no ratio, and is left out.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    >>> metric = UpdateRatio()
    >>> metric.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    >>> metric.compute().item()
    0.1
    """

    _state = "update_ratio_sums"

    def update(self, old: Tensor, new: Tensor) -> None:
        """Add a step; empty tensors change nothing.

        Args:
            old: W before the optimizer's step, float tensor of any shape. It must be a copy: the step changes W in
                place.
            new: W after it, same shape.

        Raises:
            ValueError: if the shapes differ.
        """
        if same_shape(old=old, new=new):
            self._add(update_ratio(old, new), (old != 0).any())
