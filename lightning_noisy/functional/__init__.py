"""Stateless formulas on tensors and floats; depend only on torch."""

from lightning_noisy.functional.normalized import normalization_factor, normalize_output, update_running
from lightning_noisy.functional.scores import anact_score, rho, rho_prime
from lightning_noisy.functional.slopes import largest_slope, slope
from lightning_noisy.kernels.gaussian import add_gaussian_, stream_key

__all__ = [
    "add_gaussian_",
    "anact_score",
    "largest_slope",
    "normalization_factor",
    "normalize_output",
    "rho",
    "rho_prime",
    "slope",
    "stream_key",
    "update_running",
]
