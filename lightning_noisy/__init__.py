"""Annealed gradient noise, normalized activations and a monitor of what they do, for any Lightning model."""

import logging

from lightning_noisy import functional as functional
from lightning_noisy import metrics as metrics
from lightning_noisy import nn as nn
from lightning_noisy import schedules as schedules
from lightning_noisy.callbacks import ActivationMonitor, ActivationReplacement, GradientNoise, load_replaced
from lightning_noisy.gradient_noise.handle import add_gradient_noise
from lightning_noisy.monitoring.report import signal_report
from lightning_noisy.replacement.fold import fold_normalization
from lightning_noisy.replacement.replace import replace_activations, restore_activations
from lightning_noisy.replacement.sites import activation_sites

__version__ = "0.1.0"

# As Lightning does: what a swap has done is shown, unless the application configures logging.
_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)
if not logging.getLogger().hasHandlers():
    _log.addHandler(logging.StreamHandler())
    _log.propagate = False

# The submodules are public, too; not here, since `import *` is not to hide `torch.nn`.
__all__ = [
    "ActivationMonitor",
    "ActivationReplacement",
    "GradientNoise",
    "activation_sites",
    "add_gradient_noise",
    "fold_normalization",
    "load_replaced",
    "replace_activations",
    "restore_activations",
    "signal_report",
]
