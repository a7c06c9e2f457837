"""The scores of ANAct (Yuan et al., 2022) of one call site."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_noisy.functional.scores import anact_score, r_score, rho
from lightning_noisy.metrics.moments import PooledMoments

__all__ = ["AnactScore", "RScore"]


class RScore(PooledMoments):
    r"""Which gain is larger, that of the signal or that of the gradient, for the inputs that an activation has.

    :math:`\ln (\mathrm{Var}[\varphi(h)] / (\mathrm{Var}[h] \, E[\varphi'(h)^2]))`, Eq. 19 of Yuan et al., "ANAct:
    Adaptive Normalization for Activation Functions" (2022), over all elements of all batches and processes: 0 where
    both are equal, negative where the gradient's is larger. NaN if one of the three is 0.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    >>> metric = RScore()
    >>> h = torch.linspace(-1, 1, 2000)
    >>> metric.update(input=h, output=h.relu(), slope=(h > 0).float())
    >>> round(metric.compute().item(), 3)  # ln(5 / 8)
    -0.47
    """

    def compute(self) -> Tensor:
        """The score, a 0-dimensional tensor."""
        found = self._moments()
        score = r_score(found.var_x, found.var_y, found.rho_prime)
        return score.where(score.isfinite(), torch.nan)


class AnactScore(PooledMoments):
    r"""How far an activation is from keeping the variance of signal and gradient.

    :math:`(|\ln \rho| + |\ln \rho'|) / 2`, the part of one call site in Eq. 22 of Yuan et al., "ANAct: Adaptive
    Normalization for Activation Functions" (2022), with :math:`\rho = E[\varphi(h)^2] / \mathrm{Var}[h]` (Eq. 5) and
    :math:`\rho' = E[\varphi'(h)^2]` (Eq. 6) over all elements of all batches and processes. 0 is best. Infinite if
    the output or the slope is 0 everywhere, NaN if the input is constant.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    >>> metric = AnactScore()
    >>> h = torch.linspace(-1, 1, 200)
    >>> metric.update(input=h, output=h.relu(), slope=(h > 0).float())
    >>> round(metric.compute().item(), 4)  # both gains are 1 / 2
    0.6931
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def compute(self) -> Tensor:
        """The score, a 0-dimensional tensor."""
        found = self._moments()
        gain = rho(found.var_x.where(found.var_x != 0, torch.nan), found.mean_y, found.var_y)
        return anact_score(gain, found.rho_prime)
