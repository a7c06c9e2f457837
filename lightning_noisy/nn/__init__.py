"""Activation modules, and the registry that makes them by name."""

from lightning_noisy.nn import registry
from lightning_noisy.nn.normalized import NLeakyReLU, NormalizedActivation, NReLU, NSwish

__all__ = ["NLeakyReLU", "NReLU", "NSwish", "NormalizedActivation", "registry"]
