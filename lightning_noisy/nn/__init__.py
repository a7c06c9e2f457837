"""Activation modules, and the registry that creates them by name."""

from lightning_noisy.nn import registry
from lightning_noisy.nn.gpn import GPNActivation
from lightning_noisy.nn.noisy import NAH, NAN, NANI, NANIL, NANIS, NoisyActivation
from lightning_noisy.nn.normalized import NLeakyReLU, NormalizedActivation, NReLU, NSwish

__all__ = [
    "NAH",
    "NAN",
    "NANI",
    "NANIL",
    "NANIS",
    "GPNActivation",
    "NLeakyReLU",
    "NReLU",
    "NSwish",
    "NoisyActivation",
    "NormalizedActivation",
    "registry",
]
