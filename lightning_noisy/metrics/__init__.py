"""torchmetrics classes: state and reduction only; the formulas are in ``lightning_noisy.functional``."""

from lightning_noisy.metrics.classes import ClassActivations
from lightning_noisy.metrics.moments import ActivationMoments
from lightning_noisy.metrics.rank import EffectiveRank
from lightning_noisy.metrics.saturation import SaturationRate
from lightning_noisy.metrics.scores import AnactScore, RScore
from lightning_noisy.metrics.units import DeadUnits, DormantUnits, GradientDormantUnits, Sparsity
from lightning_noisy.metrics.weights import GradientVariance, UpdateRatio, WeightMean

__all__ = [
    "ActivationMoments",
    "AnactScore",
    "ClassActivations",
    "DeadUnits",
    "DormantUnits",
    "EffectiveRank",
    "GradientDormantUnits",
    "GradientVariance",
    "RScore",
    "SaturationRate",
    "Sparsity",
    "UpdateRatio",
    "WeightMean",
]
