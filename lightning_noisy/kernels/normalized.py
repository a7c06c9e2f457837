"""Normalized activations by a kernel: moments, running statistics, value and gradient of scale * (φ(x) - shift).

The readable references are ``moments`` in ``functional.moments``, ``normalize_output`` and ``update_running`` in
``functional.normalized``, and ``slope`` in ``functional.slopes``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy._torch_internals import has_hooks
from lightning_noisy.kernels.backend import HALF_TOO, checked, choice, is_dense, is_plain, triton_kernels
from lightning_noisy.kernels.build import compiled_function, library, threads_for

__all__ = [
    "AS_POOLED",
    "BUFFERS",
    "FOLLOW",
    "FROM_BUFFERS",
    "POOL",
    "Function",
    "Kept",
    "Kernels",
    "Rule",
    "Statistics",
    "function_of",
    "kernels_for",
    "slopes",
    "takes",
]

# What becomes of a batch's statistics: none are computed; the running ones follow; they are added to ``pending``, and
# used until its first update; the same, but they are not added.
FROM_BUFFERS, FOLLOW, POOL, AS_POOLED = range(4)
_CLIP, _LEAKY, _SILU, _GELU, _GELU_TANH, _TANH, _ELU, _SIGMOID = range(8)  # as in functions.h


class Function(NamedTuple):
    """An elementwise function that the kernels know.

    Attributes:
        kind: its number in ``functions.h``.
        a: factor of x, or of what there is below 0.
        b: offset, or factor above 0.
        lower: bound of the values.
        upper: bound of the values.
    """

    kind: int
    a: float = 0.0
    b: float = 0.0
    lower: float = 0.0
    upper: float = 0.0


_RELU = Function(_CLIP, 1.0, 0.0, 0.0, math.inf)
_HARDSIGMOID = Function(_CLIP, 1 / 6, 0.5, 0.0, 1.0)
_SELU = Function(_ELU, 1.7580993408473766, 1.0507009873554805)  # a = scale * alpha, b = scale

# By module class, with options from the module's attributes; and by function, with default options.
_MODULES: dict[type[nn.Module], Callable[[Any], Function]] = {
    nn.ELU: lambda module: Function(_ELU, float(module.alpha), 1.0),
    nn.GELU: lambda module: Function(_GELU_TANH if module.approximate == "tanh" else _GELU),
    nn.Hardsigmoid: lambda module: _HARDSIGMOID,
    nn.Hardtanh: lambda module: Function(_CLIP, 1.0, 0.0, float(module.min_val), float(module.max_val)),
    nn.LeakyReLU: lambda module: Function(_LEAKY, float(module.negative_slope)),
    nn.ReLU: lambda module: _RELU,
    nn.ReLU6: lambda module: Function(_CLIP, 1.0, 0.0, 0.0, 6.0),
    nn.SELU: lambda module: _SELU,
    nn.SiLU: lambda module: Function(_SILU),
    nn.Sigmoid: lambda module: Function(_SIGMOID),
    nn.Tanh: lambda module: Function(_TANH),
}
_FUNCTIONS: dict[int, tuple[object, Function]] = {
    id(known): (known, function)
    for known, function in (
        (F.elu, Function(_ELU, 1.0, 1.0)),
        (F.gelu, Function(_GELU)),
        (F.hardsigmoid, _HARDSIGMOID),
        (F.hardtanh, Function(_CLIP, 1.0, 0.0, -1.0, 1.0)),
        (F.leaky_relu, Function(_LEAKY, 0.01)),
        (F.relu, _RELU),
        (torch.relu, _RELU),
        (F.relu6, Function(_CLIP, 1.0, 0.0, 0.0, 6.0)),
        (F.selu, _SELU),
        (F.sigmoid, Function(_SIGMOID)),
        (torch.sigmoid, Function(_SIGMOID)),
        (F.silu, Function(_SILU)),
        (F.tanh, Function(_TANH)),
        (torch.tanh, Function(_TANH)),
    )
}


def function_of(function: object) -> Function | None:
    """What the kernels know a function or module as; None if they don't.

    >>> function_of(nn.ReLU()) == function_of(F.relu)
    True
    """
    if isinstance(function, nn.Module):
        make = _MODULES.get(type(function))
        return make(function) if make and not has_hooks(function) else None
    return _FUNCTIONS.get(id(function), (None, None))[1]


class Rule(NamedTuple):
    """How the running statistics follow: see ``NormalizedActivation``.

    Attributes:
        momentum: m.
        lower: L.
        upper: U.
        max_rejections: number of batches in a row.
        beta: β.
        smallest: gains up to this are unusable.
    """

    momentum: float
    lower: float
    upper: float
    max_rejections: float
    beta: float
    smallest: float


# The buffers of ``NormalizedActivation`` that a forward pass updates in place.
BUFFERS = ("running_mean", "running_rho", "running_rho_prime", "num_batches_tracked", "num_rejected")
Statistics = Sequence[Tensor]
Kept = Any  # the scale, the shift and tanh α of a forward pass


class Kernels(Protocol):
    """What a backend has."""

    def forward(
        self,
        function: Function,
        x: Tensor,
        alpha: Tensor,
        statistics: Statistics,
        pending: Tensor | None,
        rule: Rule,
        mode: int,
        stride: int = 1,
    ) -> tuple[Tensor, Kept]:
        """Update the running statistics as ``mode`` says, and normalize with them.

        Args:
            function: φ.
            x: pre-activations that :func:`takes` accepts.
            alpha: α, one element.
            statistics: the running statistics, as BUFFERS names them.
            pending: count and sums of x, x², φ, φ² and φ′², float64, shape (6,); or None.
            rule: how they follow.
            mode: see FROM_BUFFERS.
            stride: the statistics are those of every n-th sample (dimension 0).

        Returns:
            The values, and what the backward pass needs.
        """

    def values(self, function: Function, x: Tensor, alpha: Tensor, statistics: Statistics, beta: float) -> Tensor:
        """The values with the running statistics as they are: those of ``forward`` with FROM_BUFFERS."""

    def backward(
        self, function: Function, x: Tensor, gradient: Tensor, kept: Kept, beta: float, alpha: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of x and α; the running statistics are constants.

        Args:
            function: φ.
            x: as in the forward pass.
            gradient: that of the values, in the memory order of x.
            kept: from the forward pass.
            beta: β.
            alpha: α, if its gradient is needed.
        """


def takes(x: Tensor, alpha: Tensor, buffers: Mapping[str, Tensor | None]) -> bool:
    """Whether there is a kernel for a pre-activation, α and running statistics."""
    mean, rho, rho_prime, tracked, rejected = map(buffers.get, BUFFERS)
    if mean is None or rho is None or rho_prime is None or tracked is None or rejected is None:
        return False
    return (
        is_plain(x)
        and is_dense(x)
        and type(mean) is type(rho) is type(rho_prime) is type(tracked) is type(rejected) is Tensor
        and (type(alpha) is nn.Parameter or type(alpha) is Tensor)
        and alpha.dtype is mean.dtype is rho.dtype is rho_prime.dtype is torch.float32
        and tracked.dtype is rejected.dtype is torch.int64
        and not (mean.requires_grad or rho.requires_grad or rho_prime.requires_grad)
        and alpha.numel() == 1
        and not (alpha.is_neg() or mean.is_neg() or rho.is_neg() or rho_prime.is_neg())
        and ((x.is_cpu and alpha.is_cpu and mean.is_cpu) or alpha.device == mean.device == x.device)
        and kernels_for(x) is not None
    )


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for the dtype and device of a tensor, if their numbers are right there."""
    if x.is_cpu and choice() == "auto":
        return _compiled() if x.dtype is torch.float32 else None
    kernels = triton_kernels("normalized", x) if x.dtype in HALF_TOO else None
    return kernels if kernels is not None and _is_right(kernels, x.device) else None


def slopes(function: Function, x: Tensor, out: Tensor | None = None) -> Tensor | None:
    """φ′(x) in the memory of ``out``, if it has the shape and layout of x; None if there is no kernel for x."""
    if x.is_cpu and x.dtype is torch.float32 and is_plain(x) and is_dense(x) and (kernels := _compiled()) is not None:
        if out is None or out.shape != x.shape or out.stride() != x.stride():
            out = torch.empty_like(x)
        kernels.slopes(function, x, out)
        return out
    return None


_Kept = ctypes.c_double * 3


class _Compiled:
    """Those of ``normalized.c``, for float32 on the CPU; see :class:`Kernels`."""

    def __init__(self) -> None:
        pointer, integer, size, kind = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, (ctypes.c_int, ctypes.c_void_p)
        self._forward = compiled_function(
            "normalized_forward", [*[pointer] * 2, *[size] * 3, *kind, *[pointer] * 9, *[integer] * 2]
        )
        self._backward = compiled_function(
            "normalized_backward", [*[pointer] * 3, size, *kind, ctypes.c_double, *[pointer] * 2, integer]
        )
        self._values = compiled_function(
            "normalized_values", [*[pointer] * 2, size, *kind, ctypes.c_double, *[pointer] * 4, integer]
        )
        self._slopes = compiled_function("normalized_slopes", [*[pointer] * 2, size, *kind])

    def forward(
        self,
        function: Function,
        x: Tensor,
        alpha: Tensor,
        statistics: Statistics,
        pending: Tensor | None,
        rule: Rule,
        mode: int,
        stride: int = 1,
    ) -> tuple[Tensor, Kept]:
        y, kept, count = torch.empty_like(x), _Kept(), x.numel()
        columns = step = count
        if stride > 1 and x.dim():
            columns = count // len(x)
            step = stride * columns
        self._forward(
            x.data_ptr(),
            y.data_ptr(),
            count,
            columns,
            step,
            function.kind,
            _options(function),
            _rule(rule),
            alpha.data_ptr(),
            *[buffer.data_ptr() for buffer in statistics],
            pending.data_ptr() if pending is not None and mode == POOL else None,
            kept,
            mode,
            threads_for(count),
        )
        return y, kept

    def values(self, function: Function, x: Tensor, alpha: Tensor, statistics: Statistics, beta: float) -> Tensor:
        y, count = torch.empty_like(x), x.numel()
        self._values(
            x.data_ptr(),
            y.data_ptr(),
            count,
            function.kind,
            _options(function),
            beta,
            alpha.data_ptr(),
            statistics[0].data_ptr(),
            statistics[1].data_ptr(),
            statistics[2].data_ptr(),
            threads_for(count),
        )
        return y

    def backward(
        self, function: Function, x: Tensor, gradient: Tensor, kept: Kept, beta: float, alpha: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        of_x, of_alpha = torch.empty_like(x), None if alpha is None else torch.empty_like(alpha)
        self._backward(
            x.data_ptr(),
            gradient.data_ptr(),
            of_x.data_ptr(),
            x.numel(),
            function.kind,
            _options(function),
            beta,
            kept,
            None if of_alpha is None else of_alpha.data_ptr(),
            threads_for(x.numel()),
        )
        return of_x, of_alpha

    def slopes(self, function: Function, x: Tensor, out: Tensor) -> None:
        self._slopes(x.data_ptr(), out.data_ptr(), x.numel(), function.kind, _options(function))


@lru_cache(1024)
def _options(function: Function) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 4)(*function[1:])


@lru_cache(1024)
def _rule(rule: Rule) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * 6)(*rule)


@cache
def _compiled() -> _Compiled | None:
    """Those of ``normalized.c``, unless they aren't there or their numbers are wrong."""
    if library() is None:
        return None
    kernels = _Compiled()
    return kernels if _is_right(kernels, torch.device("cpu")) else None


_SAMPLES: list[tuple[Callable[[Tensor], Tensor], Function]] = [  # one of each kind
    (F.hardsigmoid, _HARDSIGMOID),
    (partial(F.leaky_relu, negative_slope=0.2), Function(_LEAKY, 0.2)),
    (F.silu, Function(_SILU)),
    (F.gelu, Function(_GELU)),
    (partial(F.gelu, approximate="tanh"), Function(_GELU_TANH)),
    (torch.tanh, Function(_TANH)),
    (F.selu, _SELU),
    (torch.sigmoid, Function(_SIGMOID)),
]


@checked
@torch.no_grad()
def _is_right(kernels: Kernels, device: torch.device) -> bool:
    """Whether values, gradients and statistics are those of torch's functions in double precision, for each kind."""
    return all(_differs_little(kernels, device, known, function) for known, function in _SAMPLES)


@torch.no_grad()
def _differs_little(
    kernels: Kernels, device: torch.device, known: Callable[[Tensor], Tensor], function: Function
) -> bool:
    x = torch.linspace(-4.03, 4.07, 90, dtype=torch.float32, device="cpu")
    wide, h, curve = x.double(), 1e-5, math.tanh(0.5)
    y, slope = known(wide), (known(wide + h) - known(wide - h)) / (2 * h)
    mean, rho, rho_prime = y.mean(), y.var(correction=0) / wide.var(correction=0), slope.square().mean()
    scale = ((rho + rho_prime) / (2 * rho * rho_prime)).sqrt() + 0.3 * curve
    x, alpha = x.to(device), torch.full((1,), 0.5, dtype=torch.float32, device=device)
    dtypes = [torch.float32] * 3 + [torch.int64] * 2
    buffers = [torch.zeros((), dtype=dtype, device=device) for dtype in dtypes]
    rule = Rule(0.1, 0.2, 5.0, 10, 0.3, 1e-6)
    value, kept = kernels.forward(function, x, alpha, buffers, None, rule, FOLLOW)
    of_x, of_alpha = kernels.backward(function, x, x, kept, 0.3, alpha)
    pairs = [
        (kernels.values(function, x, alpha, buffers, 0.3), scale * (y - mean)),
        (value, scale * (y - mean)),
        (of_x, wide * scale * slope),
        (of_alpha, 0.3 * (1 - curve**2) * (wide * (y - mean)).sum()[None]),
        *zip(buffers, (mean, rho, rho_prime), strict=False),
    ]
    return all(a is not None and torch.allclose(a.double().cpu(), b, rtol=1e-4, atol=1e-5) for a, b in pairs)
