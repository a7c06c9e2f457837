"""Lightning callbacks; nothing outside this folder imports Lightning."""

from lightning_noisy.callbacks.activation_monitor import ActivationMonitor
from lightning_noisy.callbacks.activation_replacement import ActivationReplacement
from lightning_noisy.callbacks.gradient_noise import GradientNoise
from lightning_noisy.callbacks.loading import load_replaced

__all__ = ["ActivationMonitor", "ActivationReplacement", "GradientNoise", "load_replaced"]
