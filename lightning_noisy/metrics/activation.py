"""Statistics of activations, pooled over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_noisy.functional.moments import Moments, moments, pooled, sums
from lightning_noisy.functional.scores import anact_score, rho

__all__ = ["ActivationStatistics"]


class ActivationStatistics(Metric):
    r"""ρ, ρ′, saturation and sparsity of several activations.

    Moments are pooled over updates and processes, weighted by the number of elements. The
    state is one tensor of sums, so synchronization takes one reduction for any number of sites.

    ===================== ===============================================================================
    ``rho/<site>``        :math:`E[\varphi(h)^2] / \mathrm{Var}[h]` (Eq. 5 of Yuan et al., "ANAct", 2022)
    ``rho_prime/<site>``  :math:`E[\varphi'(h)^2]` (Eq. 6)
    ``anact_score``       :math:`\sum (|\ln\rho| + |\ln\rho'|) / 2` over the sites (Eq. 22)
    ``saturation/<site>`` share of elements with :math:`|\varphi'(h)|` below the threshold
                          (Gulcehre et al., "Noisy Activation Functions", 2016, Def. 2.2)
    ``sparsity/<site>``   share of elements that are inactive
                          (Pretorius et al., "ReLU and sigmoidal activation functions", 2019, Table 1)
    ===================== ===============================================================================

    Args:
        sites: names of the sites.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a name occurs twice.

    >>> statistics = ActivationStatistics(["relu"])
    >>> h = torch.linspace(-1, 1, 200)
    >>> statistics.update("relu", input=h, output=h.relu(), slope=(h > 0).float())
    >>> {name: round(value.item(), 3) for name, value in statistics.compute().items()}
    {'rho/relu': 0.5, 'rho_prime/relu': 0.5, 'saturation/relu': 0.5, 'sparsity/relu': 0.5, 'anact_score': 0.693}
    """

    full_state_update = False
    is_differentiable = False
    sums: Tensor

    def __init__(self, sites: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rows = {name: row for row, name in enumerate(sites)}
        if len(self._rows) != len(sites):
            raise ValueError(f"Names of sites must differ, got {list(sites)!r}.")
        # Columns: elements, Σh, Σh², Σφ, Σφ², Σφ′², saturated, inactive. In float64 sums of squares are safe:
        # a variance of 1 at a mean of 10⁴ keeps eight digits, and each batch's is computed around its mean.
        self.add_state("sums", default=torch.zeros(len(sites), 8, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return list(self._rows)

    def update(
        self,
        site: str,
        *,
        input: Tensor,
        output: Tensor,
        slope: Tensor,
        inactive: Tensor | None = None,
        saturation_threshold: float | Tensor = 0.05,
    ) -> None:
        """Add one call of an activation; an empty batch changes nothing.

        Args:
            site: name of the site.
            input: pre-activation h, float tensor of any shape.
            output: φ(h), same shape.
            slope: φ′(h), same shape.
            inactive: which elements count as inactive, bool tensor of the same shape; by default those
                whose output is <= 0.
            saturation_threshold: elements whose absolute slope is below this count as saturated.
        """
        if input.numel() == 0:
            return
        inactive = output <= 0 if inactive is None else inactive
        saturated = slope.abs() < saturation_threshold
        h, y, derivative = (
            each.detach().to(torch.promote_types(each.dtype, torch.float32)) for each in (input, output, slope)
        )
        found, count = moments(h, y, derivative), input.numel()
        shares = saturated.count_nonzero() / count, inactive.count_nonzero() / count
        means = torch.stack([*found, *shares]).to(self.sums)  # one transfer
        added = sums(count, Moments(*means[:5].unbind()), dtype=means.dtype)
        self.sums[self._rows[site]] += torch.cat([added, count * means[5:]])

    def compute(self) -> dict[str, Tensor]:
        """The statistics, ``<statistic>/<site>`` and ``anact_score``: 0-dimensional tensors.

        A site that was never called has NaN and is left out of the score, which is NaN if no site was called.
        """
        count, shares = self.sums[:, 0], (self.sums[:, 6:] / self.sums[:, :1]).unbind(1)
        found = pooled(self.sums[:, :6].T)
        gain = rho(found.var_x, found.mean_y, found.var_y)
        called = count > 0
        score = anact_score(gain[called], found.rho_prime[called]).where(called.any(), torch.nan)
        table = zip(("rho", "rho_prime", "saturation", "sparsity"), (gain, found.rho_prime, *shares), strict=True)
        values = {f"{name}/{site}": value[row] for name, value in table for site, row in self._rows.items()}
        return {**values, "anact_score": score}
