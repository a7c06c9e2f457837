"""Schedules: the scale of noise as a function of the step.

A schedule is a frozen dataclass that maps a step, counted from 0, to the **standard deviation** of the
noise at that step: ``schedule(step) -> float``. Schedules are values: they can be compared, pickled and printed.

Some have a horizon, ``steps``. With ``steps="auto"`` it is the Trainer's estimated number of optimizer steps; without
a Trainer, :meth:`~BaseSchedule.resolved` sets it. ``FollowLR`` and ``Langevin`` depend on the optimizer's learning
rate, which is read at each step. ``Piecewise`` and ``Warmup`` compose others.

This file is long because each class is mostly documentation.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol, TypeVar, runtime_checkable

__all__ = [
    "BaseSchedule",
    "Constant",
    "Cosine",
    "Exponential",
    "FollowLR",
    "InverseDecay",
    "InverseSqrt",
    "Langevin",
    "Linear",
    "Piecewise",
    "Schedule",
    "Warmup",
]

Self = TypeVar("Self", bound="BaseSchedule")
Horizon = int | Literal["auto"]


@runtime_checkable
class Schedule(Protocol):
    """Anything that maps a step (int, counted from 0) to a standard deviation (float, >= 0)."""

    def __call__(self, step: int, /) -> float:
        """Return the standard deviation of the noise at ``step``."""
        ...


class BaseSchedule:
    """Base class of the schedules: tells whether a horizon or learning rate is missing, and fills it in."""

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        raise NotImplementedError

    @property
    def is_open(self) -> bool:
        """Whether a horizon is ``"auto"``, so that the schedule can't be called yet."""
        return any(part == "auto" or (isinstance(part, BaseSchedule) and part.is_open) for part in self._values())

    @property
    def follows_lr(self) -> bool:
        """Whether the schedule depends on a learning rate, so that it can't be called without :meth:`with_lr`."""
        return any(isinstance(part, BaseSchedule) and part.follows_lr for part in self._values())

    def _values(self) -> list[object]:
        values: list[object] = [getattr(self, f.name) for f in fields(self)] if is_dataclass(self) else []
        return [part for value in values for part in (value if isinstance(value, tuple) else (value,))]

    def resolved(self: Self, total: int) -> Self:
        """The schedule with ``"auto"`` replaced by ``total`` steps.

        >>> Linear(1.0).resolved(10)
        Linear(start=1.0, end=0.0, steps=10)
        """
        if getattr(self, "steps", None) == "auto":
            return replace(self, steps=max(1, total))  # type: ignore[type-var]
        return self

    def with_lr(self, lr: float) -> BaseSchedule:
        """The schedule at a learning rate; unchanged if it doesn't follow the learning rate.

        >>> FollowLR(0.5).with_lr(0.1)
        Constant(std=0.05)
        """
        return self


def _check_non_negative(name: str, value: object, zero_means: str = "") -> None:
    """Raise unless ``value`` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value) or value < 0:
        hint = f" Use {name}=0 {zero_means}." if zero_means else ""
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.{hint}")


def check_schedule(name: str, schedule: object) -> None:
    """Raise a TypeError that contains ``name`` unless ``schedule`` is a callable and not a class."""
    if inspect.isclass(schedule):
        raise TypeError(f"{name} must be a schedule, got the class {schedule.__name__}. Use {schedule.__name__}(...).")
    if not callable(schedule):
        raise TypeError(f"{name} must be callable: schedule(step) -> standard deviation, got {schedule!r}.")


def _check_steps(value: object) -> None:
    """Raise unless ``value`` is a horizon."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f'steps must be an integer or "auto", got {value!r}.')
    if isinstance(value, int) and value < 1:
        raise ValueError(f"steps must be >= 1, got {value!r}.")


def _progress(step: int, steps: Horizon) -> float:
    """The fraction of the horizon that has passed, in [0, 1]."""
    if steps == "auto":
        raise ValueError('steps="auto" is open. Give a number, use GradientNoise, or call resolved(total) first.')
    return min(step / steps, 1.0)


@dataclass(frozen=True)
class Constant(BaseSchedule):
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
class InverseDecay(BaseSchedule):
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


@dataclass(frozen=True)
class Linear(BaseSchedule):
    r"""A straight line: :math:`\sigma_t = \sigma_0 + (\sigma_1 - \sigma_0) \min(t / T, 1)`.

    Args:
        start: σ at step 0, >= 0.
        end: σ from the horizon on, >= 0.
        steps: the horizon T, >= 1, or ``"auto"``.

    >>> [Linear(1.0, 0.5, steps=4)(t) for t in (0, 1, 4, 9)]
    [1.0, 0.875, 0.5, 0.5]
    """

    start: float
    end: float = 0.0
    steps: Horizon = "auto"

    def __post_init__(self) -> None:
        _check_non_negative("start", self.start, "to start without noise")
        _check_non_negative("end", self.end, "to end without noise")
        _check_steps(self.steps)

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        return self.start + (self.end - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class Cosine(BaseSchedule):
    r"""Half a cosine: :math:`\sigma_t = \sigma_1 + (\sigma_0 - \sigma_1) (1 + \cos(\pi \min(t / T, 1))) / 2`.

    Args:
        start: σ at step 0, >= 0.
        end: σ from the horizon on, >= 0.
        steps: the horizon T, >= 1, or ``"auto"``.

    >>> [round(Cosine(1.0, steps=4)(t), 6) for t in (0, 1, 2, 4, 9)]
    [1.0, 0.853553, 0.5, 0.0, 0.0]
    """

    start: float
    end: float = 0.0
    steps: Horizon = "auto"

    def __post_init__(self) -> None:
        _check_non_negative("start", self.start, "to start without noise")
        _check_non_negative("end", self.end, "to end without noise")
        _check_steps(self.steps)

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * _progress(step, self.steps))) / 2


@dataclass(frozen=True)
class Exponential(BaseSchedule):
    r"""Geometric decay: :math:`\sigma_t = \sigma_0 r^t`.

    Args:
        start: σ at step 0, >= 0.
        rate: r, the factor per step, in [0, 1].

    >>> Exponential(1.0, rate=0.5)(3)
    0.125
    """

    start: float
    rate: float

    def __post_init__(self) -> None:
        _check_non_negative("start", self.start, "to switch the noise off")
        _check_non_negative("rate", self.rate, "for noise in the first step only")
        if self.rate > 1:
            raise ValueError(f"rate must be <= 1, got {self.rate!r}: the noise would grow without bound.")

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        return self.start * math.pow(self.rate, step)


@dataclass(frozen=True)
class InverseSqrt(BaseSchedule):
    r"""Inverse square root decay: :math:`\sigma_t = \sigma_0 / \sqrt{1 + t / \tau}`.

    Args:
        start: σ at step 0, >= 0.
        timescale: τ, the number of steps after which the variance has halved, > 0.

    >>> InverseSqrt(1.0, timescale=100)(300)
    0.5
    """

    start: float
    timescale: float = 1.0

    def __post_init__(self) -> None:
        _check_non_negative("start", self.start, "to switch the noise off")
        _check_non_negative("timescale", self.timescale)
        if self.timescale == 0:
            raise ValueError("timescale must be > 0, got 0.")

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        return self.start / math.sqrt(1 + step / self.timescale)


class _FollowsLR(BaseSchedule):
    """Base class of schedules that depend only on the learning rate."""

    @property
    def follows_lr(self) -> bool:
        """True."""
        return True

    def __call__(self, step: int, /) -> float:
        """Raise: there is no σ without a learning rate."""
        raise ValueError(f"{self} needs a learning rate. Use it on an optimizer, or call with_lr(lr) first.")


@dataclass(frozen=True)
class FollowLR(_FollowsLR):
    r"""Noise that follows the learning rate and its scheduler: :math:`\sigma_t = c \, \mathrm{lr}_t^{\,p}`.

    Each parameter group gets the noise of its own learning rate.

    Args:
        factor: c, >= 0.
        power: p; 1 for σ proportional to the learning rate, 0.5 for a variance proportional to it.

    >>> FollowLR(2.0).with_lr(0.1)(0)
    0.2
    """

    factor: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_non_negative("factor", self.factor, "to switch the noise off")
        if isinstance(self.power, bool) or not isinstance(self.power, (int, float)) or not math.isfinite(self.power):
            raise ValueError(f"power must be a finite number, got {self.power!r}.")

    def with_lr(self, lr: float) -> Constant:
        """The constant noise at a learning rate; none if it is 0, or below 0 by rounding."""
        return Constant(self.factor * lr**self.power if lr > 0 else 0.0)


@dataclass(frozen=True)
class Langevin(_FollowsLR):
    r"""Stochastic gradient Langevin dynamics: the *weights* get noise of variance :math:`2 \, \mathrm{lr}_t \, T`.

    Noise on the gradient reaches the weights multiplied by the learning rate, so :math:`\sigma_t = \sqrt{2 T /
    \mathrm{lr}_t}`. With plain SGD on a loss U this samples from a density proportional to exp(-U / T), up to the
    error of finite steps (Welling and Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", 2011: Eq. 4,
    with lr = ε / 2 and T = 1). ``FollowLR((2 * T) ** 0.5, power=0.5)`` is the noise with this variance on the
    gradients themselves. It is meant for SGD without momentum: at a small learning rate the noise is large, and
    momentum carries it into later steps.

    Args:
        temperature: T, >= 0; 1 / n for a loss that is the mean over the n samples of the training set.

    >>> Langevin(0.5).with_lr(0.01)(0)
    10.0
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_non_negative("temperature", self.temperature, "to switch the noise off")

    def with_lr(self, lr: float) -> Constant:
        """The constant noise at a learning rate; none if it is 0, or below 0 by rounding, where no weight changes."""
        return Constant(math.sqrt(2 * self.temperature / lr) if lr > 0 else 0.0)


@dataclass(frozen=True)
class Piecewise(BaseSchedule):
    """One schedule after another, each counting from its own first step.

    Args:
        boundaries: the first step of each part except the first one, increasing, > 0.
        parts: schedules, or numbers for constant ones; one more than ``boundaries``.

    >>> schedule = Piecewise((100,), (0.1, Linear(0.1, 0.0, steps=10)))
    >>> [schedule(t) for t in (0, 99, 100, 105, 110)]
    [0.1, 0.1, 0.1, 0.05, 0.0]
    """

    boundaries: tuple[int, ...]
    parts: tuple[float | Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) != len(self.boundaries) + 1:
            raise ValueError(
                f"There must be one part more than boundaries, got {len(self.parts)} and {len(self.boundaries)}."
            )
        if any(after <= before for before, after in pairwise((0, *self.boundaries))):
            raise ValueError(f"boundaries must increase and be > 0, got {self.boundaries!r}.")
        for part in self.parts:
            if not callable(part):
                _check_non_negative("a part", part)

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        index = bisect_right(self.boundaries, step)
        part = self.parts[index]
        return part(step - (0, *self.boundaries)[index]) if callable(part) else float(part)

    def resolved(self, total: int) -> Piecewise:
        """The schedule with each part's ``"auto"`` replaced by its length; the last one ends at ``total``."""
        starts, ends = (0, *self.boundaries), (*self.boundaries, total)
        parts = [
            part.resolved(end - start) if isinstance(part, BaseSchedule) else part
            for part, start, end in zip(self.parts, starts, ends, strict=True)
        ]
        return replace(self, parts=tuple(parts))

    def with_lr(self, lr: float) -> Piecewise:
        """The schedule with ``lr`` filled in where parts follow the learning rate."""
        parts = [part.with_lr(lr) if isinstance(part, BaseSchedule) else part for part in self.parts]
        return replace(self, parts=tuple(parts))


@dataclass(frozen=True)
class Warmup(BaseSchedule):
    r"""Another schedule with a linear warm-up from 0: :math:`\min(t / T, 1)` times its value.

    Args:
        schedule: any schedule; it counts from the first step of the warm-up.
        steps: T, the length of the warm-up, >= 1.

    >>> [Warmup(Constant(1.0), steps=4)(t) for t in (0, 1, 4)]
    [0.0, 0.25, 1.0]
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        check_schedule("schedule", self.schedule)
        _check_steps(self.steps)
        if not isinstance(self.steps, int):
            raise TypeError(f"The length of a warm-up must be an integer, got {self.steps!r}.")

    def __call__(self, step: int, /) -> float:
        """Return σ at ``step``."""
        return self.schedule(step) * _progress(step, self.steps)

    def resolved(self, total: int) -> Warmup:
        """The schedule with the inner one's ``"auto"`` replaced by ``total`` steps."""
        return (
            replace(self, schedule=self.schedule.resolved(total)) if isinstance(self.schedule, BaseSchedule) else self
        )

    def with_lr(self, lr: float) -> Warmup:
        """The schedule with ``lr`` filled in for the inner one."""
        return replace(self, schedule=self.schedule.with_lr(lr)) if isinstance(self.schedule, BaseSchedule) else self
