"""Activation modules, and the registry that creates them by name."""

from lightning_noisy.nn import registry
from lightning_noisy.nn.gpn import GPNActivation
from lightning_noisy.nn.noisy import NAH, NAN, NANI, NANIL, NANIS, NoisyActivation
from lightning_noisy.nn.normalized import NLeakyReLU, NormalizedActivation, NReLU, NSwish
from lightning_noisy.nn.recurrent import NoisyGRU, NoisyLSTM, NoisyRNN
from lightning_noisy.nn.recurrent_cells import NoisyGRUCell, NoisyLSTMCell, NoisyRNNCell

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
    "NoisyGRU",
    "NoisyGRUCell",
    "NoisyLSTM",
    "NoisyLSTMCell",
    "NoisyRNN",
    "NoisyRNNCell",
    "NormalizedActivation",
    "registry",
]
