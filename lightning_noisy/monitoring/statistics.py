"""The statistics that the monitor logs: their names, what they are, and how they follow from sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_noisy.functional.scores import r_score, rho
from lightning_noisy.monitoring.sums import Pooled
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
        self._is_scored = [site.role in ("hidden", "residual") for site in sites]
        self._scores = [name for name in ("anact_score", "anact_score_mean") if name in statistics]
        is_normalized = [isinstance(site.module, NormalizedActivation) for site in sites]
        only = dict.fromkeys(_OF_STATE, is_normalized) | {
            "saturation_magnitude": [isinstance(site.module, NoisyActivation) for site in sites]
        }
        self._normalized = [
            (number, site.module) for number, site in enumerate(sites) if isinstance(site.module, NormalizedActivation)
        ]
        self._names = [name for name in statistics if name in _OF_SITES]
        # Of each value that is shown: its tag, its statistic's number, its site's number.
        self._shown = [
            (tag_of(name, site.name), row, column)
            for row, name in enumerate(self._names)
            for column, site in enumerate(sites)
            if only.get(name, is_normalized)[column] or name not in only
        ]

    @property
    def scored(self) -> int:
        """How many sites the ANAct score sums over: the hidden ones. An output's sigmoid is far off by nature."""
        return sum(self._is_scored)

    def state(self, like: Tensor) -> Tensor:
        """λ, μ and the rejected batches of each site, NaN where it isn't normalized; shape (3, sites)."""
        columns = torch.full((3, len(self._is_scored)), torch.nan, dtype=like.dtype, device=like.device)
        for number, module in self._normalized:
            state = (module.scale.detach(), module.shift, module.num_rejected)
            columns[:, number] = torch.stack([each.to(like) for each in state])
        return columns

    def values(self, pooled: Pooled, was_called: Tensor) -> dict[str, float]:
        """The statistics by tag.

        Args:
            pooled: the sums, with ``"state"`` the sum of :meth:`state` over ``"ranks"`` ranks.
            was_called: which sites were called so far, shape (sites,); their values are NaN if not called this time.
        """
        c = pooled.columns
        count = c["count"].where(c["count"] > 0, torch.nan)
        mean_x, mean_y = c["x"] / count, c["y"] / count
        var_x, var_y = ((c[name] / count - mean**2).clamp_min(0) for name, mean in (("xx", mean_x), ("yy", mean_y)))
        gain = rho(var_x, mean_y, var_y).where(var_x > 0, torch.nan)
        gain_prime = c["slopes"] / count
        of_state = pooled.extra["state"] / pooled.extra["ranks"]
        found = {
            "rho": gain,
            "rho_prime": gain_prime,
            "r_score": r_score(var_x, var_y, gain_prime),
            "saturation": c["saturated"] / count,
            "saturation_left": c["left"] / count,
            "saturation_right": (c["saturated"] - c["left"]) / count,
            "saturation_hard": c["hard"] / count,
            "saturation_magnitude": c["magnitude"] / count,
            "sparsity": c["inactive"] / count,
            "dead_units": pooled.dead.where(c["count"] > 0, torch.nan),
            "dormant_units": pooled.dormant.where(c["count"] > 0, torch.nan),
            "mean": mean_y,
            "std": var_y.sqrt(),
            "input_mean": mean_x,
            "input_std": var_x.sqrt(),
            "grad_rms": (c["gradients"] / c["graded"]).sqrt(),
            **dict(zip(_OF_STATE, of_state, strict=True)),
        }
        values: dict[str, float] = {}
        if self._shown:
            rows = torch.stack([found[name] for name in self._names]).tolist()
            known = was_called.tolist()
            values = {tag: rows[row][column] for tag, row, column in self._shown if known[column]}
        counts = torch.tensor(self._is_scored, dtype=torch.bool) & (c["count"] > 0)
        if any(self._is_scored):
            distances = ((gain.log().abs() + gain_prime.log().abs()) / 2)[counts]
            total = float(distances.sum()) if len(distances) else torch.nan
            scores = {"anact_score": total, "anact_score_mean": total / max(1, len(distances))}
            values.update({name: scores[name] for name in self._scores})
        return values
