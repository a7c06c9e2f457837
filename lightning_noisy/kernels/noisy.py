"""Noise on the output of a clipped line (NAN and NAH) with a p and a c for each column: by ``noisy.c``, on the CPU.

The readable reference is ``output_noise`` in ``functional.noisy``. The kernel's sigmoid is a polynomial, so that values
differ from the reference's in the last bits, also where there is no noise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_noisy._torch_internals import is_transforming
from lightning_noisy.kernels.build import compiled_function

__all__ = ["Line", "derivative_by_p", "output_noise", "takes"]


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


def takes(x: Tensor) -> bool:
    """Whether the kernel is there and takes a tensor: float32 on the CPU, not traced."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(x) is Tensor
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transforming())
        and _load() is not None
    )


def output_noise(
    x: Tensor, noise: Tensor | None, p: Tensor, c: Tensor, line: Line, *, slope: Tensor | None = None
) -> Tensor:
    """The values, and the slopes by x.

    Args:
        x: shape (rows, blocks * columns), float32; rows are contiguous.
        noise: shape (blocks, rows, columns), float32; blocks are contiguous. Without noise there is one block.
        p: shape (blocks * columns,), contiguous.
        c: the same.
        line: h and options.
        slope: gets the slopes; of the shape of x, contiguous.
    """
    value = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _run(x, noise, p, c, line, value=value, slope=slope)
    return value


def derivative_by_p(x: Tensor, noise: Tensor | None, p: Tensor, c: Tensor, line: Line, gradient: Tensor) -> Tensor:
    """Of each column the sum of the gradient (contiguous) times the derivative by p; the rest as in output_noise."""
    sums = torch.zeros(_threads(x), x.shape[1], dtype=torch.float32, device="cpu")
    _run(x, noise, p, c, line, gradient=gradient, by_p=sums)
    return sums.sum(0)


def _threads(x: Tensor) -> int:
    """Starting one takes up to 0.1 ms."""
    return min(torch.get_num_threads(), max(1, x.numel() >> 18), 16)


def _run(
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
    function: Callable[..., None] | None = None,
) -> None:
    function = function or _load()
    assert function is not None
    tensors = (x, noise, p, c, gradient, value, slope, by_p)
    function(
        *(None if each is None else each.data_ptr() for each in tensors),
        len(x),
        *((1, x.shape[1]) if noise is None else (len(noise), noise.shape[2])),
        x.stride(0),
        0 if noise is None else noise.stride(0),
        _numbers(line),
        line.half,
        _threads(x),
    )


@lru_cache
def _numbers(line: Line) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 6)(*line[:6])


@cache
def _load() -> Callable[..., None] | None:
    """The function of ``noisy.c``, unless it isn't there or its numbers are wrong."""
    types = [*[ctypes.c_void_p] * 8, *[ctypes.c_int64] * 5, ctypes.c_void_p, *[ctypes.c_int] * 2]
    function = compiled_function("noisy.c", "output_noise", types)
    if function is None:
        return None
    # Of x = 3, h = 1 and p = 1: 1.1 h - 0.1 u + c (1 / (1 + e²) - 1 / 2)² ε, and h at 0.5.
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    x, one, value = torch.tensor([[3.0, 0.5]], **options), torch.ones(2, **options), torch.empty(1, 2, **options)
    _run(x, None, one, one, Line(1, 0, -1, 1, 1.1, 2.0), value=value, function=function)
    return function if torch.allclose(value, torch.tensor([[1.0900128, 0.5]], **options), atol=1e-5) else None
