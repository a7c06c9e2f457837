"""Stateless formulas on tensors and floats; depend only on torch."""

from lightning_noisy.functional.normalized import normalization_factor, normalize_output, update_running
from lightning_noisy.functional.scores import anact_score, r_score, rho, rho_prime
from lightning_noisy.functional.slopes import largest_slope, slope
from lightning_noisy.functional.units import dormant_scores, effective_rank
from lightning_noisy.functional.weights import gradient_variance, update_ratio, weight_mean
from lightning_noisy.kernels.gaussian import add_gaussian_, stream_key

__all__ = [
    "add_gaussian_",
    "anact_score",
    "dormant_scores",
    "effective_rank",
    "gradient_variance",
    "largest_slope",
    "normalization_factor",
    "normalize_output",
    "r_score",
    "rho",
    "rho_prime",
    "slope",
    "stream_key",
    "update_ratio",
    "update_running",
    "weight_mean",
]
