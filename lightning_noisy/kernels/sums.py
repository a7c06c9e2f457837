"""Sums and counts over the elements of a tensor: on the CPU by ``sums.c`` in one pass, else by torch's operations.

Both are exact to double precision where that matters: sums of squares keep the digits of a variance that is small
beside the mean, or tiny.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_noisy.kernels.build import compiled_function

__all__ = ["ElementSums", "Scalar", "element_sums", "reference_sums", "scalar"]

Scalar = float | Tensor  # numbers on the CPU, 0-dimensional tensors elsewhere, which nothing waits for
# Float32 sums of squares lose too many digits of the variance if the mean is this many times the deviation.
_FAR = 3.0
_SMALLEST = 1e-30  # mean squares below lose digits by underflow


class ElementSums(NamedTuple):
    r"""What :func:`element_sums` finds.

    Attributes:
        total: Σx.
        square: Σx².
        inactive: how many have x <= 0.
        flat: how many have \|x\| < small.
        left: how many of these have side < 0.
        hard: how many have x = 0.
        alive: of each unit, 1 if an element isn't 0, else 0; float32, shape (units,).
    """

    total: Scalar
    square: Scalar
    inactive: Scalar = 0.0
    flat: Scalar = 0.0
    left: Scalar = 0.0
    hard: Scalar = 0.0
    alive: Tensor | None = None


def element_sums(
    x: Tensor,
    unit_dim: int | None = None,
    *,
    small: Scalar | None = None,
    side: Tensor | None = None,
    inactive: bool = False,
) -> ElementSums:
    """Sums and counts over all elements; those that aren't asked for may be 0.

    Args:
        x: floating point, any shape but that of a scalar, not empty.
        unit_dim: the dimension of the units, if ``alive`` is asked for.
        small: asks for ``flat`` and ``hard``; >= 0.
        side: asks for ``left``; of the shape of x.
        inactive: asks for ``inactive``.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type == "cpu" and type(x) is Tensor and x.dtype == torch.float32:
        function = _load()
        ordered = _in_memory_order(x, unit_dim)
        alike = side is None or (side.dtype, side.stride()) == (x.dtype, x.stride())
        if function is not None and ordered is not None and alike:
            return _compiled_sums(function, *ordered, small, side)
    return reference_sums(x, unit_dim, small=small, side=side, inactive=inactive)


def reference_sums(
    x: Tensor,
    unit_dim: int | None = None,
    *,
    small: Scalar | None = None,
    side: Tensor | None = None,
    inactive: bool = False,
) -> ElementSums:
    """The same by torch's operations; x is float32 or float64."""
    total, square = _first_two(x)
    found = ElementSums(total, square)
    if inactive:
        found = found._replace(inactive=scalar((x <= 0).count_nonzero()))
    if small is not None:
        is_flat = x.abs() < small
        found = found._replace(flat=scalar(is_flat.count_nonzero()), hard=scalar((x == 0).count_nonzero()))
        if side is not None:
            found = found._replace(left=scalar((is_flat & (side < 0)).count_nonzero()))
    if unit_dim is not None:
        over = [dim for dim in range(x.dim()) if dim != unit_dim % x.dim()]
        alive = (x != 0).to(torch.float32)
        found = found._replace(alive=alive.amax(over) if over else alive)
    return found


def scalar(x: Tensor) -> Scalar:
    """A 0-dimensional tensor as a number, unless one would have to wait for it."""
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
    variance, centre = (scalar(each) for each in torch.var_mean(x, correction=0))
    return count * centre, count * (variance + centre * centre)


def _in_memory_order(x: Tensor, unit_dim: int | None) -> tuple[Tensor, int | None] | None:
    """A contiguous view of x, and its dimension of the units; None if there is none."""
    if x.is_contiguous():
        return x, unit_dim
    if x.dim() == 4 and unit_dim in (None, 1) and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1), None if unit_dim is None else 3
    return None


def _compiled_sums(
    function: Callable[..., None], x: Tensor, unit_dim: int | None, small: Scalar | None, side: Tensor | None
) -> ElementSums:
    """The same by the kernel; x is contiguous, and side in the same order."""
    alive, outer, units, inner = None, x.numel(), 1, 1
    if unit_dim is not None:
        shape, dim = x.shape, unit_dim % x.dim()
        units, outer, inner = shape[dim], math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        alive = torch.zeros(units, device="cpu", dtype=torch.float32)
    out = (ctypes.c_double * 6)()
    function(
        x.data_ptr(),
        None if side is None else side.data_ptr(),
        outer,
        units,
        inner,
        -1.0 if small is None else float(small),
        ctypes.addressof(out),
        None if alive is None else alive.data_ptr(),
    )
    return ElementSums(out[0], out[1], out[2], out[3], out[4], out[5], alive)


@cache
def _load() -> Callable[..., None] | None:
    """The function of ``sums.c``, unless it isn't there or its numbers are wrong."""
    types = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_float, *[ctypes.c_void_p] * 2]
    function = compiled_function("element_sums", types)
    if function is None:
        return None
    x = (torch.arange(3 * 5 * 143, device="cpu").view(3, 5, 143) % 7 - 2).float()  # whose sums are exact
    found = _compiled_sums(function, x, 1, 2.0, x)
    expected = reference_sums(x, 1, small=2.0, side=x, inactive=True)
    same = found[:-1] == expected[:-1] and torch.equal(found.alive, expected.alive)  # type: ignore[arg-type]
    return function if same else None
