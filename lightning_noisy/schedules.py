"""Schedules: how the scale of a noise changes with the step.

A schedule is a frozen dataclass that maps a step, counted from 0, to the **standard deviation** of the
noise at that step: ``schedule(step) -> float``. Schedules are values: they compare, pickle and print.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["Constant", "InverseDecay", "Schedule"]


@runtime_checkable
class Schedule(Protocol):
    """Anything that maps a step (int, counted from 0) to a standard deviation (float, >= 0)."""

    def __call__(self, step: int, /) -> float:
        """Return the standard deviation of the noise at ``step``."""
        ...


def _check_non_negative(name: str, value: object, zero_means: str) -> None:
    """Raise unless ``value`` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}. Use {name}=0 {zero_means}.")


@dataclass(frozen=True)
class Constant:
    """The same standard deviation at every step.

    Args:
        std: standard deviation, >= 0.

    Raises:
        TypeError: if ``std`` is not a number.
        ValueError: if ``std`` is negative or not finite.

    >>> Constant(0.1)(1000)
    0.1
    """

    std: float

    def __post_init__(self) -> None:
        _check_non_negative("std", self.std, "to switch the noise off")

    def __call__(self, step: int, /) -> float:
        """Return ``std``."""
        return float(self.std)


@dataclass(frozen=True)
class InverseDecay:
    r"""Annealed noise: the variance decays as a power of the step.

    :math:`\sigma_t = \sqrt{\eta / (1 + t)^\gamma}`, Eq. 1 of Neelakantan et al., "Adding Gradient Noise
    Improves Learning for Very Deep Networks" (2015). The paper uses ``gamma=0.55`` throughout and picks
    ``eta`` from {0.01, 1.0}.

    Args:
        eta: variance at step 0, >= 0. With 0 the noise is off.
        gamma: exponent of the decay, >= 0. With 0 the variance stays at ``eta``.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is negative or not finite.

    >>> schedule = InverseDecay(eta=0.3)
    >>> [round(schedule(t), 8) for t in (0, 1, 99)]
    [0.54772256, 0.45266548, 0.15436919]
    """

    eta: float = 0.01
    gamma: float = 0.55

    def __post_init__(self) -> None:
        _check_non_negative("eta", self.eta, "to switch the noise off")
        _check_non_negative("gamma", self.gamma, "for noise that doesn't decay")

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        return math.sqrt(self.eta) * math.pow(1.0 + step, -0.5 * self.gamma)
