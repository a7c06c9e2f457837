"""What one call of an activation adds to the sums of its site.

In two steps, before and after the call, since an in-place activation overwrites its input. On the CPU some samples at a
time: they stay in the cache, where memory access would take most of the time, and nothing as large as the activation is
allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy.functional.slopes import largest_slope, side_effect_free, slope
from lightning_noisy.functional.units import over_samples
from lightning_noisy.kernels import normalized as kernel
from lightning_noisy.kernels.sums import ElementSums, Scalar, element_sums, scalar
from lightning_noisy.nn.gpn import GPNActivation
from lightning_noisy.nn.noisy import NoisyActivation
from lightning_noisy.nn.normalized import NormalizedActivation
from lightning_noisy.replacement.dataflow import private_copy, random_states_kept
from lightning_noisy.replacement.recognition import LIBRARIES
from lightning_noisy.replacement.source import is_foreign

__all__ = ["Elementwise", "Measured", "Sums"]

Elementwise = Callable[[Tensor], Tensor]
_BLOCK = 1 << 18  # elements


class Sums(dict[str, Scalar]):
    """Sums by the names of the columns; and of each unit whether it has a slope, 1 or 0, and Σ|φ|."""

    def __init__(self, count: int) -> None:
        super().__init__(count=count)
        self.alive: Tensor | None = None
        self.levels: Tensor | None = None

    def __missing__(self, name: str) -> Scalar:
        return 0.0

    def add_moments(self, name: str, found: ElementSums) -> None:
        """Add Σx and Σx²."""
        self[name] += found.total
        self[name * 2] += found.square

    def add_alive(self, alive: Tensor) -> None:
        """Take in which units have a slope at some samples."""
        self.alive = alive if self.alive is None else torch.maximum(self.alive, alive)

    def add_levels(self, y: Tensor, over: list[int]) -> None:
        """Add Σ|φ| of some samples."""
        levels = y.abs().sum(over) if over else y.abs()
        self.levels = levels if self.levels is None else self.levels + levels


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
                self._smallest = self._threshold * scalar(largest_slope(function, device=h.device))
            fast = kernel.function_of(function)
            slopes: Tensor | None = None
            for part in _parts(h, unit_dim):
                x = _wide(part)
                sums.add_moments("x", element_sums(x))
                if not self._is_relu:  # whose other sums show in the output
                    known = fast and kernel.slopes(fast, part, slopes)
                    slopes = slope(function, part) if known is None else known
                    self._add_slopes(sums, function, part, x, slopes, unit_dim)
        return sums

    def _add_slopes(
        self, sums: Sums, function: Elementwise, part: Tensor, x: Tensor, slopes: Tensor, unit_dim: int
    ) -> None:
        """Add what the slopes at a part of the elements show; ``x`` is the part in float32 or better."""
        side = x if "left" in self._wanted else None
        found = element_sums(slopes, unit_dim, small=self._smallest, side=side)
        sums["saturated"] += found.flat
        sums["left"] += found.left
        sums["hard"] += found.hard
        sums.add_alive(cast(Tensor, found.alive))
        if self._noisy is None:
            sums["slopes"] += found.square
        else:
            sums["slopes"] += element_sums(slope(self._noisy._expected, x)).square
            if "magnitude" in self._wanted:
                hard = self._noisy.hard_function
                sums["magnitude"] += scalar((hard.hard(x) - hard.linear(x)).abs().sum())
        if self._scaled is not None:
            with side_effect_free(function, part) as evaluate:
                sums["inactive"] += element_sums(evaluate(part.clone()), inactive=True).inactive

    def after(self, y: Tensor, sums: Sums, unit_dim: int) -> Sums:
        """Add the sums of the output φ(h), of the shape of h, to those of :meth:`before`."""
        if self._scaled is not None:
            scale = self._scaled.scale
            sums["slopes"] *= (scalar(scale.detach()) if isinstance(scale, Tensor) else scale) ** 2
        for part in _parts(y, unit_dim):
            y = _wide(part)
            found = element_sums(y, unit_dim if self._is_relu else None, inactive=self._scaled is None)
            sums.add_moments("y", found)
            if self._scaled is None:
                sums["inactive"] += found.inactive
            if self._is_relu:
                sums["slopes"] += y.numel() - found.inactive
                sums.add_alive(cast(Tensor, found.alive))
            if "level" in self._wanted:
                sums.add_levels(y, over_samples(y, unit_dim))
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
