"""Moments of what goes into an activation and what comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_noisy.functional.moments import Moments, moments, pooled, sums
from lightning_noisy.metrics._pooled import PooledMetric, same_shape, wide

__all__ = ["ActivationMoments", "PooledMoments"]


class PooledMoments(PooledMetric):
    """The state of the metrics that follow from the moments of one call site. A collection has it once for all of them.

    Each batch's moments are computed around its mean, and merged as sums weighted by the number of elements.
    """

    moment_sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("moment_sums", 6)

    def update(self, *, input: Tensor, output: Tensor, slope: Tensor) -> None:
        """Add a batch; an empty one changes nothing.

        Args:
            input: pre-activation h, float tensor of any shape.
            output: φ(h), same shape.
            slope: φ′(h), same shape, see :func:`lightning_noisy.functional.slope`.

        Raises:
            ValueError: if the shapes differ.
        """
        if same_shape(input=input, output=output, slope=slope):
            found = moments(wide(input), wide(output), wide(slope))
            self.moment_sums = self.moment_sums + sums(input.numel(), found, dtype=self.moment_sums.dtype)

    def _moments(self) -> Moments:
        """NaN without elements. Variances that are rounding errors are 0."""
        found = pooled(self.moment_sums)
        rounding = 16 * torch.finfo(self.moment_sums.dtype).eps

        def variance(value: Tensor, mean: Tensor) -> Tensor:
            return torch.where(value <= rounding * (value + mean.square()), 0.0, value)

        return found._replace(var_x=variance(found.var_x, found.mean_x), var_y=variance(found.var_y, found.mean_y))


class ActivationMoments(PooledMoments):
    r"""Number of elements, mean and variance of an activation's input and output, and the mean square slope.

    Over all elements of all batches and processes. To log them: ``self.log_dict(metric.compute())``.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    >>> metric = ActivationMoments()
    >>> for h in torch.tensor([[-1.0, 1.0], [2.0, 4.0]]):  # means 0 and 3, variances 1 and 1
    ...     metric.update(input=h, output=h.relu(), slope=(h > 0).float())
    >>> found = metric.compute()
    >>> found["input_var"].item(), found["rho_prime"].item()
    (3.25, 0.75)
    """

    def compute(self) -> dict[str, Tensor]:
        r"""The moments.

        Returns:
            0-dimensional tensors ``count``, ``input_mean`` E[h], ``input_var`` Var[h], ``output_mean`` E[φ],
            ``output_var`` Var[φ], ``output_power`` E[φ²], ``rho_prime`` E[φ′²] (Eq. 6 of ANAct). Variances are the
            population's. All but the count are NaN if there was no element.
        """
        found = self._moments()
        return {
            "count": self.moment_sums[0].clone(),
            "input_mean": found.mean_x,
            "input_var": found.var_x,
            "output_mean": found.mean_y,
            "output_var": found.var_y,
            "output_power": found.var_y + found.mean_y.square(),
            "rho_prime": found.rho_prime,
        }

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw all but the count, which has another scale; see :meth:`PooledMetric.plot`."""
        values = self.compute() if val is None else val
        steps = [values] if isinstance(values, dict) else values
        shown = [{name: value for name, value in step.items() if name != "count"} for step in steps]
        return self._plot(shown[0] if isinstance(values, dict) else shown, ax)
