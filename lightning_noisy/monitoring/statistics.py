"""The statistics that the monitor logs: their names, what they are, and how they follow from sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_noisy.functional.scores import anact_score, r_score, rho
from lightning_noisy.monitoring.sums import Array, Pooled
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.replacement.sites import ActivationSite

__all__ = ["DEFAULT", "STATISTICS", "SiteStatistics", "tag_of", "wanted_parts"]

# Of each call site, in training, over all elements of the window: h is the pre-activation, φ the activation.
STATISTICS = {
    "rho": "E[φ(h)²] / Var[h], the gain of the signal (ANAct, Eq. 5)",
    "rho_prime": "E[φ′(h)²], the gain of the gradient (ANAct, Eq. 6)",
    "r_score": "ln(Var[φ(h)] / (Var[h] E[φ′(h)²])), which of the two gains is larger (ANAct, Eq. 19)",
    "saturation": "share of elements with next to no slope (Gulcehre et al. 2016, Def. 2.2 and 2.3)",
    "sparsity": "share of elements that are inactive, φ(h) ≤ 0 (Pretorius et al. 2019, Table 1)",
    "dead_units": "share of units without a slope at any element",
    "lambda": "factor of a normalized activation, λ + f(α) (ANAct, Eq. 13 and 15)",
    "mu": "shift of a normalized activation, μ (ANAct, Eq. 16)",
    "anact_score": "Σ (|ln ρ| + |ln ρ′|) / 2 over the hidden sites, 0 at best (ANAct, Eq. 22)",
    "anact_score_mean": "the same divided by the number of sites, to compare models",
    "saturation_left": "the part of the saturation at h < 0",
    "saturation_right": "the part of the saturation at h ≥ 0",
    "saturation_hard": "share of elements with a slope of 0",
    "saturation_magnitude": "E|h̄ - u|, how far a noisy activation is in saturation (Gulcehre et al. 2016, Eq. 8)",
    "dormant_units": "share of units with at most τ = 0.025 of the mean |φ| of the units (Sokar et al. 2023)",
    "mean": "E[φ(h)]",
    "std": "standard deviation of φ(h)",
    "input_mean": "E[h]",
    "input_std": "standard deviation of h",
    "grad_rms": "root mean square of the gradient of φ(h), as it is in the backward pass",
    "rejected": "number of batches in a row that a normalized activation has rejected",
    "weight_mean": "|E[W]| of a weight matrix (ANAct, Fig. 4)",
    "weight_mean_sum": "the sum of these",
    "grad_variance": "variance of the elements of a weight matrix's gradient, before clipping and noise (ANAct, Eq. 8)",
    "update_ratio": "‖ΔW‖ / ‖W‖ of a step",
}
DEFAULT = tuple(STATISTICS)[:10]
_OF_STATE = ("lambda", "mu", "rejected")
_OF_SITES = tuple(name for name in STATISTICS if not name.startswith(("anact", "weight", "grad_variance", "update")))
_PARTS = {
    "saturation_left": "left",
    "saturation_right": "left",
    "saturation_hard": "hard",
    "saturation_magnitude": "magnitude",
    "dormant_units": "level",
    "grad_rms": "gradients",
}


def wanted_parts(statistics: Sequence[str]) -> frozenset[str]:
    """The sums that these need and that are not always there."""
    return frozenset(_PARTS[name] for name in statistics if name in _PARTS)


def tag_of(statistic: str, name: str) -> str:
    """The tag of a site's or parameter's statistic; TensorBoard's charts misread parentheses."""
    return f"{statistic}/{name or 'root'}"


class SiteStatistics:
    """The statistics of the sites of a model, from their sums.

    Args:
        sites: the sites, with different names.
        statistics: which statistics, of STATISTICS; those of weights are left to others.
    """

    def __init__(self, sites: Sequence[ActivationSite], statistics: Sequence[str]) -> None:
        self._scored = np.array([site.role in ("hidden", "residual") for site in sites], dtype=bool)
        self._scores = [name for name in ("anact_score", "anact_score_mean") if name in statistics]
        is_normalized = [isinstance(site.module, NormalizedActivation) for site in sites]
        only = dict.fromkeys(_OF_STATE, is_normalized) | {
            "saturation_magnitude": [isinstance(site.module, NoisyActivation) for site in sites]
        }
        self._normalized = [
            (number, site.module) for number, site in enumerate(sites) if isinstance(site.module, NormalizedActivation)
        ]
        self._names = [name for name in statistics if name in _OF_SITES]
        # Of each value that is shown: its tag, its statistic, its site's number.
        self._shown = [
            (tag_of(name, site.name), name, column)
            for name in self._names
            for column, site in enumerate(sites)
            if only.get(name, is_normalized)[column] or name not in only
        ]

    @property
    def scored(self) -> int:
        """How many sites the ANAct score sums over: the hidden ones. An output's sigmoid is far off by nature."""
        return int(self._scored.sum())

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """What to add up over the ranks: their number, and λ, μ and the rejected batches of each normalized site.

        Those have the shape (3, sites), with NaN elsewhere; nothing if no site is normalized.
        """
        if not self._normalized:
            return {}
        columns = torch.full((3, len(self._scored)), torch.nan, dtype=like.dtype, device=like.device)
        for number, module in self._normalized:
            state = (module.scale.detach(), module.shift, module.num_rejected)
            columns[:, number] = torch.stack([each.to(like) for each in state])
        return {"state": columns, "ranks": torch.ones(1)}

    def values(self, pooled: Pooled, was_called: Array) -> dict[str, float]:
        """The statistics by tag.

        Args:
            pooled: the sums, with those of :meth:`state`.
            was_called: which sites were called so far, shape (sites,); their values are NaN if not called this time.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._values(pooled, was_called)

    def _values(self, pooled: Pooled, was_called: Array) -> dict[str, float]:
        columns, is_called = pooled.columns, pooled.columns["count"] > 0
        share = dict(zip(columns, np.stack([*columns.values()]) / columns["count"], strict=True))
        mean_x, mean_y = share["x"], share["y"]
        var_x, var_y = ((share[name * 2] - share[name] ** 2).clip(0) for name in ("x", "y"))
        gain_prime = share["slopes"]
        gain = np.where(var_x > 0, _by(rho, var_x, mean_y, var_y), np.nan)
        found: dict[str, Callable[[], Array]] = {
            "rho": lambda: gain,
            "rho_prime": lambda: gain_prime,
            "r_score": lambda: _by(r_score, var_x, var_y, gain_prime),
            "saturation": lambda: share["saturated"],
            "saturation_left": lambda: share["left"],
            "saturation_right": lambda: share["saturated"] - share["left"],
            "saturation_hard": lambda: share["hard"],
            "saturation_magnitude": lambda: share["magnitude"],
            "sparsity": lambda: share["inactive"],
            "dead_units": lambda: np.where(is_called, pooled.dead, np.nan),
            "dormant_units": lambda: np.where(is_called, pooled.dormant, np.nan),
            "mean": lambda: mean_y,
            "std": lambda: np.sqrt(var_y),
            "input_mean": lambda: mean_x,
            "input_std": lambda: np.sqrt(var_x),
            "grad_rms": lambda: np.sqrt(columns["gradients"] / columns["graded"]),
        }
        if self._normalized:
            of_state = (pooled.extra["state"] / pooled.extra["ranks"]).numpy()
            found |= {name: partial(of_state.__getitem__, row) for row, name in enumerate(_OF_STATE)}
        values: dict[str, float] = {}
        if self._shown:
            rows = {name: found[name]().tolist() for name in self._names if name in found}
            known = was_called.tolist()
            values = {tag: rows[name][column] for tag, name, column in self._shown if known[column]}
        if self._scores and self._scored.any():
            counts = self._scored & is_called
            number = int(counts.sum())
            total = float(_by(anact_score, gain[counts], gain_prime[counts])) if number else math.nan
            scores = {"anact_score": total, "anact_score_mean": total / max(1, number)}
            values.update({name: scores[name] for name in self._scores})
        return values


def _by(formula: Callable[..., Tensor], *arrays: Array) -> Array:
    """A formula of torch, of arrays: NumPy is quicker for the few numbers of the rest."""
    return formula(*map(torch.from_numpy, arrays)).numpy()
