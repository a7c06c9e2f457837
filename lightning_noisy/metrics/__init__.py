"""torchmetrics classes: state and reduction; the formulas are in ``lightning_noisy.functional``."""

from lightning_noisy.metrics.activation import ActivationStatistics

__all__ = ["ActivationStatistics"]
