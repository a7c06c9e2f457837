"""Annealed gradient noise, normalized activations and a monitor of what they do, for any Lightning model."""

from lightning_noisy import functional, metrics, nn, schedules
from lightning_noisy.callbacks import ActivationMonitor, ActivationReplacement, GradientNoise
from lightning_noisy.engine.gradient_noise import add_gradient_noise
from lightning_noisy.engine.replace import replace_activations
from lightning_noisy.engine.sites import activation_sites

__version__ = "0.1.0"

__all__ = [
    "ActivationMonitor",
    "ActivationReplacement",
    "GradientNoise",
    "activation_sites",
    "add_gradient_noise",
    "functional",
    "metrics",
    "nn",
    "replace_activations",
    "schedules",
]
