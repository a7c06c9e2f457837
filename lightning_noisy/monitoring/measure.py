"""What one call of an activation adds to the sums of its site.

In two steps, before and after the call, since an in-place activation overwrites its input. On the CPU some samples at a
time: they stay in the cache, where memory access would take most of the time, and nothing as large as the activation is
allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy.functional.slopes import largest_slope, side_effect_free, slope
from lightning_noisy.functional.units import over_samples
from lightning_noisy.nn.gpn import GPNActivation
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.replacement.dataflow import private_copy, random_states_kept
from lightning_noisy.replacement.recognition import LIBRARIES
from lightning_noisy.replacement.source import is_foreign

__all__ = ["Elementwise", "Measured", "Sums"]

Elementwise = Callable[[Tensor], Tensor]
Scalar = float | Tensor  # numbers on the CPU, 0-dimensional tensors elsewhere, which nothing waits for
_BLOCK = 1 << 18  # elements
# Float32 sums of squares lose too many digits of the variance if the mean is this many times the deviation.
_FAR = 3.0
_SMALLEST = 1e-30  # mean squares below lose digits by underflow


class Sums(dict[str, Scalar]):
    """Sums by the names of the columns; and those of the units, shape (2, units): has a slope, Σ|φ|."""

    def __init__(self, count: int) -> None:
        super().__init__(count=count)
        self.alive: Tensor | None = None
        self.level: Tensor | None = None

    def __missing__(self, name: str) -> Scalar:
        return 0.0

    def add_moments(self, name: str, x: Tensor) -> None:
        """Add Σx and Σx²."""
        first, second = _first_two(x)
        self[name] += first
        self[name * 2] += second

    def add_units(self, alive: Tensor | None, level: Tensor | None) -> None:
        """Add what some samples show of the units."""
        if alive is not None:
            self.alive = alive if self.alive is None else self.alive | alive
        if level is not None:
            self.level = level if self.level is None else self.level + level

    @property
    def units(self) -> Tensor:
        """Those of the units, float, shape (2, units)."""
        assert self.alive is not None
        alive = self.alive.to(torch.float32)
        return torch.stack([alive, torch.zeros_like(alive) if self.level is None else self.level.to(alive)])


class Measured:
    """An activation whose calls are measured.

    It is taken as a plain function φ, times a factor and with a shift where it is normalized. Which elements are
    saturated and inactive is judged by φ alone. A noisy activation isn't called again, which would advance its noise:
    φ is its hard function, and its slope that of its expectation.

    Args:
        function: the activation, a module or a function.
        threshold: share of the largest |φ′| below which an element is saturated.
        wanted: those of ``"left"``, ``"hard"``, ``"magnitude"`` (of COLUMNS) and ``"level"`` that are needed.
    """

    def __init__(self, function: Elementwise, *, threshold: float, wanted: Collection[str] = ()) -> None:
        self._scaled = function if isinstance(function, (NormalizedActivation, GPNActivation)) else None
        self._noisy = function if isinstance(function, NoisyActivation) else None
        self._function: Elementwise = function
        if self._scaled is not None:
            self._function = self._scaled.function
        elif self._noisy is not None:
            self._function = self._noisy.hard_function.hard
        self._is_relu = type(function) is nn.ReLU or function in (F.relu, torch.relu, Tensor.relu)
        self._threshold, self._wanted = threshold, wanted
        self._smallest: Scalar | None = None  # slope of an element that isn't saturated

    def before(self, h: Tensor, unit_dim: int) -> Sums:
        """The sums of the pre-activation and of the slopes.

        Args:
            h: pre-activation, float tensor of any shape, not empty.
            unit_dim: the dimension of the units, such as 1.
        """
        sums = Sums(h.numel())
        with _harmless(self._function) as function:
            if not self._is_relu and (self._smallest is None or _has_parameters(function)):
                self._smallest = self._threshold * _scalar(largest_slope(function, device=h.device))
            for part in _parts(h, unit_dim):
                x = _wide(part)
                sums.add_moments("x", x)
                if not self._is_relu:  # whose other sums show in the output
                    self._add_slopes(sums, function, part, x, over_samples(part, unit_dim))
        return sums

    def _add_slopes(self, sums: Sums, function: Elementwise, part: Tensor, x: Tensor, over: list[int]) -> None:
        """Add what the slopes at a part of the elements show; ``x`` is the part in float32 or better."""
        slopes = slope(function, part)
        if self._noisy is None:
            sums["slopes"] += _first_two(_wide(slopes))[1]
        else:
            sums["slopes"] += _first_two(slope(self._noisy._expected, x))[1]
            if "magnitude" in self._wanted:
                hard = self._noisy.hard_function
                sums["magnitude"] += _scalar((hard.hard(x) - hard.linear(x)).abs().sum())
        if self._scaled is not None:
            with side_effect_free(function, part) as evaluate:
                sums["inactive"] += _scalar((evaluate(part.clone()) <= 0).count_nonzero())
        size = slopes.abs()
        flat = size < cast(Scalar, self._smallest)
        sums["saturated"] += _scalar(flat.count_nonzero())
        if "left" in self._wanted:
            sums["left"] += _scalar((flat & (x < 0)).count_nonzero())
        if "hard" in self._wanted:
            sums["hard"] += size.numel() - _scalar(size.count_nonzero())
        sums.add_units(_is_alive(size, over), None)

    def after(self, y: Tensor, sums: Sums, unit_dim: int) -> Sums:
        """Add the sums of the output φ(h), of the shape of h, to those of :meth:`before`."""
        if self._scaled is not None:
            scale = self._scaled.scale
            sums["slopes"] *= (_scalar(scale.detach()) if isinstance(scale, Tensor) else scale) ** 2
        for part in _parts(y, unit_dim):
            wide, over = _wide(part), over_samples(part, unit_dim)
            sums.add_moments("y", wide)
            if self._is_relu:
                active = _scalar(part.count_nonzero())
                sums["slopes"] += active
                sums["inactive"] += part.numel() - active
                sums.add_units(_is_alive(part, over), None)
            elif self._scaled is None:
                sums["inactive"] += _scalar((part <= 0).count_nonzero())
            if "level" in self._wanted:
                sums.add_units(None, wide.abs().sum(over) if over else wide.abs())
        if self._is_relu:
            sums.update(dict.fromkeys(("saturated", "left", "hard"), sums["inactive"]))
        return sums


@contextmanager
def _harmless(function: Elementwise) -> Iterator[Elementwise]:
    """What can be called again: of a user's module, which may count its calls or draw numbers, a copy."""
    cls = type(function)
    if isinstance(function, nn.Module) and not is_foreign(cls) and cls.__module__ not in LIBRARIES:
        with random_states_kept(function):
            yield private_copy(function)
    else:
        yield function


def _is_alive(x: Tensor, over: list[int]) -> Tensor:
    """Which units have something > 0; or NaN, which is no sign of death."""
    return ~((x.amax(over) if over else x) <= 0)


def _has_parameters(function: Elementwise) -> bool:
    return isinstance(function, nn.Module) and any(True for _ in function.parameters())


def _parts(x: Tensor, unit_dim: int) -> Iterator[Tensor]:
    """Some samples at a time on the CPU; elsewhere all."""
    rows = _BLOCK * len(x) // x.numel() if x.device.type == "cpu" and x.dim() > 1 and unit_dim % x.dim() else 0
    if not 0 < rows < len(x):
        yield x
        return
    for start in range(0, len(x), rows):
        yield x[start : start + rows]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scalar(x: Tensor) -> Scalar:
    return x.item() if x.device.type == "cpu" else x.double() if x.device.type != "mps" else x.float()


def _first_two(x: Tensor) -> tuple[Scalar, Scalar]:
    """Σx and Σx², as exact as if they were computed around the mean."""
    count = x.numel()
    if x.device.type == "cpu":
        flat = x.reshape(-1)
        first, second = flat.sum().item(), torch.dot(flat, flat).item()
        mean = first / count
        if mean * mean <= _FAR**2 * (second / count - mean * mean) and _SMALLEST < second / count < math.inf:
            return first, second
        x = x.double()  # where squares lose digits, underflow or overflow
    variance, centre = (_scalar(each) for each in torch.var_mean(x, correction=0))
    return count * centre, count * (variance + centre * centre)
