"""Noise on the output of a clipped line (NAN and NAH) by a kernel: values, gradients, and slopes.

For elements with one p, or one for each channel, the noise is drawn within the kernel; gates bring theirs, and have a p
and a c for each column. The readable reference is ``output_noise`` in ``functional.noisy``. The kernel's sigmoid is a
polynomial, so that values differ from the reference's in the last bits.
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_noisy.kernels.backend import HALF_TOO, checked, choice, is_dense, is_plain, triton_kernels
from lightning_noisy.kernels.build import compiled_function, library, threads_for
from lightning_noisy.kernels.gaussian import Key, draw_, gaussian_at, signed

__all__ = ["Kernels", "Line", "derivative_by_p", "kernels_for", "output_noise", "takes", "takes_columns"]


class Line(NamedTuple):
    """h(x) = clip(slope x + offset, lower, upper), and what else the columns have in common.

    Attributes:
        slope: of the line, > 0.
        offset: its value at 0.
        lower: bound of h.
        upper: bound of h.
        alpha: α.
        level: what ε is where no noise is given.
        half: whether ε is the size of the noise that is given.
    """

    slope: float
    offset: float
    lower: float
    upper: float
    alpha: float
    level: float = 0.0
    half: bool = False


class Kernels(Protocol):
    """What a backend has for elements; ``keep`` and ``next_key`` wait for no device."""

    def keep(self, c: Tensor) -> Any:
        """The c of a forward pass, which may be annealed before the backward pass."""

    def next_key(self, state: Tensor, *, advance: bool, distance: int, second: int) -> tuple[Any, int]:
        """The key of a pass's noise.

        Args:
            state: a seed, and the number of passes so far, int64, shape (2,); counts this pass.
            advance: False for a pass that is repeated, with the same noise.
            distance: between the keys of two passes.
            second: the key's second half.
        """

    def forward(self, x: Tensor, p: Tensor, c: Any, key: tuple[Any, int] | None, line: Line) -> Tensor:
        """The values.

        Args:
            x: accepted by :func:`takes`.
            p: of shape (1,), or one for each channel (dimension 1 of x).
            c: from ``keep``.
            key: of the noise: element i in row-major order gets the number at i. None: ``line.level`` in its place.
            line: h and options.
        """

    def backward(
        self, x: Tensor, p: Tensor, c: Any, key: tuple[Any, int] | None, line: Line, gradient: Tensor, *, of_p: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of x and p, from that of the values, in the memory order of x."""


def takes(x: Tensor, p: Tensor | None, c: Tensor | None, state: Tensor | None, *, noisy: bool) -> bool:
    """Whether there is a kernel for an input, its parameters and the state of the noise."""
    if not (is_plain(x) and is_dense(x)) or p is None or not (type(p) is nn.Parameter or type(p) is Tensor):
        return False
    if c is None or c.requires_grad or state is None or state.dtype is not torch.int64 or not state.is_contiguous():
        return False
    single = p.numel() == 1
    return (
        p.dtype is c.dtype is torch.float32
        and type(c) is type(state) is Tensor
        and not (p.is_neg() or c.is_neg())
        and ((x.is_cpu and p.is_cpu and c.is_cpu and state.is_cpu) or p.device == c.device == state.device == x.device)
        and p.is_contiguous()
        and (x.is_contiguous() or (not noisy and single))  # noise is assigned in row-major order
        and (single or (x.is_cpu and x.dim() > 1 and len(p) == x.shape[1]))
        and kernels_for(x) is not None
    )


def takes_columns(x: Tensor) -> bool:
    """Whether there is a kernel for gates: plain tensors, float32 on the CPU."""
    return x.dtype is torch.float32 and x.is_cpu and is_plain(x) and _compiled() is not None


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for the dtype and device of a tensor, if their numbers are right there."""
    if x.is_cpu and choice() == "auto":
        return _compiled() if x.dtype is torch.float32 else None
    kernels = triton_kernels("noisy", x) if x.dtype in HALF_TOO else None
    return kernels if kernels is not None and _is_right(kernels, x.device) else None


def output_noise(
    x: Tensor, noise: Tensor | None, p: Tensor, c: Tensor, line: Line, *, slope: Tensor | None = None
) -> Tensor:
    """The values of gates, and the slopes by x.

    Args:
        x: shape (rows, blocks * columns), float32; rows are contiguous.
        noise: shape (blocks, rows, columns), float32; blocks are contiguous. Without noise there is one block.
        p: shape (blocks * columns,), contiguous.
        c: the same.
        line: h and options.
        slope: gets the slopes; of the shape of x, contiguous.
    """
    value = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _for_columns().columns(x, noise, p, c, line, value=value, slope=slope)
    return value


def derivative_by_p(x: Tensor, noise: Tensor | None, p: Tensor, c: Tensor, line: Line, gradient: Tensor) -> Tensor:
    """Of each column the sum of the gradient (contiguous) times the derivative by p; the rest as in output_noise."""
    sums = _sums_of_parts(x)
    _for_columns().columns(x, noise, p, c, line, gradient=gradient, by_p=sums)
    return sums.sum(0)


class _Compiled:
    """Those of ``noisy.c``, for float32 on the CPU; see :class:`Kernels`."""

    def __init__(self) -> None:
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._columns = compiled_function("noisy_columns", [*[pointer] * 8, *[size] * 5, pointer, size, integer])
        self._elements = compiled_function(
            "noisy_elements",
            [*[pointer] * 2, ctypes.c_float, *[pointer] * 4, *[size] * 3, integer, *[size] * 2, pointer, integer],
        )

    def keep(self, c: Tensor) -> float:
        return c.item()

    def next_key(self, state: Tensor, *, advance: bool, distance: int, second: int) -> Key:
        numbers = (ctypes.c_int64 * 2).from_address(state.data_ptr())  # a tenth of the time of operations on tensors
        numbers[1] += advance
        return (numbers[0] + numbers[1] * distance) % 2**64, second

    def forward(self, x: Tensor, p: Tensor, c: float, key: Key | None, line: Line) -> Tensor:
        value = torch.empty_like(x)
        if x.dim() == 2 and p.numel() > 1:
            self.columns(x, _noise(x, key), p, torch.full_like(p, c), line, value=value)
        else:
            self.elements(x, p, c, key, line, value=value)
        return value

    def backward(
        self, x: Tensor, p: Tensor, c: float, key: Key | None, line: Line, gradient: Tensor, *, of_p: bool
    ) -> tuple[Tensor, Tensor | None]:
        slope = torch.empty_like(x)
        if x.dim() == 2 and p.numel() > 1:
            sums = _sums_of_parts(x) if of_p else None
            noise, each = _noise(x, key), torch.full_like(p, c)
            self.columns(x, noise, p, each, line, gradient=gradient, slope=slope, by_p=sums)
            return slope, None if sums is None else sums.sum(0)
        by_p = torch.empty_like(p) if of_p else None
        self.elements(x, p, c, key, line, gradient=gradient, slope=slope, by_p=by_p)
        return slope, by_p

    def columns(
        self,
        x: Tensor,
        noise: Tensor | None,
        p: Tensor,
        c: Tensor,
        line: Line,
        *,
        gradient: Tensor | None = None,
        value: Tensor | None = None,
        slope: Tensor | None = None,
        by_p: Tensor | None = None,
    ) -> None:
        tensors = (x, noise, p, c, gradient, value, slope, by_p)
        self._columns(
            *(None if each is None else each.data_ptr() for each in tensors),
            len(x),
            *((1, x.shape[1]) if noise is None else (len(noise), noise.shape[2])),
            x.stride(0),
            0 if noise is None else noise.stride(0),
            _struct(line),
            _rows_at_once(x),
            threads_for(x.numel()),
        )

    def elements(
        self,
        x: Tensor,
        p: Tensor,
        c: float,
        key: Key | None,
        line: Line,
        *,
        gradient: Tensor | None = None,
        value: Tensor | None = None,
        slope: Tensor | None = None,
        by_p: Tensor | None = None,
    ) -> None:
        units = p.numel()
        self._elements(
            x.data_ptr(),
            p.data_ptr(),
            c,
            *(None if each is None else each.data_ptr() for each in (gradient, value, slope, by_p)),
            x.numel(),
            units,
            math.prod(x.shape[2:]) if units > 1 else 1,
            key is not None,
            *((0, 0) if key is None else (signed(key[0]), signed(key[1]))),
            _struct(line),
            threads_for(x.numel()),
        )


def _rows_at_once(x: Tensor) -> int:
    """How many rows are summed in single precision; whatever the number of threads."""
    return min(1024, max(1, (1 << 15) // x.shape[1]))


def _sums_of_parts(x: Tensor) -> Tensor:
    return torch.zeros(-(-len(x) // _rows_at_once(x)), x.shape[1], dtype=torch.float32, device="cpu")


def _noise(x: Tensor, key: Key | None) -> Tensor | None:
    return (
        None if key is None else draw_(torch.empty(x.numel(), dtype=torch.float32, device="cpu"), key).view(1, *x.shape)
    )


@lru_cache(1024)
def _struct(line: Line) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("6fi", *line))


@cache
def _compiled() -> _Compiled | None:
    """Those of ``noisy.c``, unless they aren't there or their numbers are wrong."""
    if library() is None:
        return None
    kernels = _Compiled()
    return kernels if all(check(kernels, torch.device("cpu")) for check in (_is_right, _columns_are_right)) else None


def _for_columns() -> _Compiled:
    kernels = _compiled()
    assert kernels is not None
    return kernels


_CHECKED = Line(1.0, 0.0, -1.0, 1.0, 1.1, 2.0)


@checked
@torch.no_grad()
def _is_right(kernels: Kernels, device: torch.device) -> bool:
    """Whether the numbers are those of the formula at some points, and slopes those of differences of values."""
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    x, p, c = (
        torch.tensor([3.0, 0.5, -1.5, -40.0], **options),
        torch.full((1,), 0.5, **options),
        torch.ones((), **options),
    )
    kept, state = kernels.keep(c), torch.tensor([3, 0], device=device)
    key = kernels.next_key(state, advance=True, distance=7, second=5)
    noise = gaussian_at((10, 5), torch.arange(4, device="cpu")).to(device)
    line, h = _CHECKED, 1e-2

    def run(x: Tensor, p: Tensor, key: Any, level: float = 0.0) -> Tensor:
        return kernels.forward(x, p, kept, key, line._replace(level=level))

    none, one, values = run(x, p, None), run(x, p, None, 1.0), run(x, p, key)
    of_x, of_p = kernels.backward(x, p, kept, key, line, torch.ones_like(x), of_p=True)
    by_x, by_p = (run(x + h, p, key) - run(x - h, p, key)), (run(x, p + h, key) - run(x, p - h, key))
    pairs = [
        # At x = 3, h = 1 and p = 1/2: 1.1 h - 0.1 u + (1 / (1 + e) - 1 / 2)² ε; between the bounds h.
        (run(x, p, None, 2.0)[:2], torch.tensor([0.9067761, 0.5], **options), 1e-5),
        (values, none + (one - none) * noise, 1e-5),
        (of_x[:3], by_x[:3] / (2 * h), 1e-3),
        (of_p, by_p.sum(0, keepdim=True) / (2 * h), 1e-3),
    ]
    same = all(a is not None and torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b, tolerance in pairs)
    return same and state.tolist() == [3, 1]


@checked
@torch.no_grad()
def _columns_are_right(kernels: _Compiled, device: torch.device) -> bool:
    """Whether those of columns are those of elements."""
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    x, ones, key = torch.tensor([[3.0, 0.5, -1.5, -40.0]], **options), torch.ones(4, **options), (3, 5)
    noise, value, slope, by_p = (
        gaussian_at(key, torch.arange(4, device="cpu"))[None, None],
        *torch.zeros(3, 1, 4, **options),
    )
    kernels.columns(x, noise, ones, ones, _CHECKED, gradient=ones, value=value, slope=slope, by_p=by_p)
    of_x, of_p = kernels.backward(x[0], ones[:1], 1.0, key, _CHECKED, ones, of_p=True)
    pairs = [
        (value[0], kernels.forward(x[0], ones[:1], 1.0, key, _CHECKED)),
        (slope[0], of_x),
        (by_p.sum()[None], of_p),
    ]
    return all(b is not None and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
