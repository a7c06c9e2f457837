"""Fused activations on the CPU: value, derivative, moments and gradients in one pass over memory, block by block.

A block stays in the cache while everything is computed from it: memory access takes most of the time on the CPU. The
readable references are ``normalize_output`` in ``functional.normalized`` with ``functional.moments``, and
``output_noise`` in ``functional.noisy``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy._torch_internals import is_transforming
from lightning_noisy.kernels.gaussian import Key, draw_

__all__ = [
    "FusedFunction",
    "OutputNoise",
    "flat",
    "fused_function",
    "gradients",
    "moments",
    "normalize",
    "rescale_",
    "takes",
]

_BLOCK = 1 << 18
_aten = torch.ops.aten


class FusedFunction(NamedTuple):
    """A function φ on 1-dimensional contiguous tensors, computed by torch's kernels.

    Attributes:
        value: called with x and ``out``, writes φ(x) into ``out``.
        chain: called with g, x, φ(x) and ``out``, writes g φ′(x) into ``out``, which may be g.
        reads_value: whether ``chain`` reads φ(x).
    """

    value: Callable[[Tensor, Tensor], object]
    chain: Callable[[Tensor, Tensor, Tensor, Tensor], object]
    reads_value: bool = False

    def slope(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """φ′(x), in the memory of ``out`` if it has the shape and layout of x."""
        if out is None or out.shape != x.shape or out.stride() != x.stride():
            out = torch.empty_like(x)
        y = x
        if self.reads_value:
            y = torch.empty_like(x)
            self.value(x, y)
        self.chain(out.fill_(1), x, y, out)
        return out


def _leaky_relu(negative_slope: float = 0.01) -> FusedFunction:
    return FusedFunction(
        lambda x, out: _aten.leaky_relu.out(x, negative_slope, out=out),
        lambda g, x, y, out: _aten.leaky_relu_backward.grad_input(g, x, negative_slope, False, grad_input=out),
    )


def _gelu(approximate: str = "none") -> FusedFunction:
    return FusedFunction(
        lambda x, out: _aten.gelu.out(x, approximate=approximate, out=out),
        lambda g, x, y, out: _aten.gelu_backward.grad_input(g, x, approximate=approximate, grad_input=out),
    )


def _elu(alpha: float = 1.0) -> FusedFunction:
    return FusedFunction(
        lambda x, out: _aten.elu.out(x, alpha, out=out),
        lambda g, x, y, out: _aten.elu_backward.grad_input(g, alpha, 1, 1, False, x, grad_input=out),
    )


_RELU = FusedFunction(
    lambda x, out: torch.clamp_min(x, 0, out=out),
    lambda g, x, y, out: _aten.threshold_backward.grad_input(g, x, 0, grad_input=out),
)
_SILU = FusedFunction(
    lambda x, out: _aten.silu.out(x, out=out),
    lambda g, x, y, out: _aten.silu_backward.grad_input(g, x, grad_input=out),
)
_TANH = FusedFunction(
    lambda x, out: torch.tanh(x, out=out),
    lambda g, x, y, out: _aten.tanh_backward.grad_input(g, y, grad_input=out),
    reads_value=True,
)

# By module class, with options from the module's attributes; and by function, with default options.
_MODULES: dict[type[nn.Module], Callable[[Any], FusedFunction]] = {
    nn.ELU: lambda module: _elu(module.alpha),
    nn.GELU: lambda module: _gelu(module.approximate),
    nn.LeakyReLU: lambda module: _leaky_relu(module.negative_slope),
    nn.ReLU: lambda module: _RELU,
    nn.SiLU: lambda module: _SILU,
    nn.Tanh: lambda module: _TANH,
}
_FUNCTIONS: list[tuple[object, FusedFunction]] = [
    (F.elu, _elu()),
    (F.gelu, _gelu()),
    (F.leaky_relu, _leaky_relu()),
    (F.relu, _RELU),
    (torch.relu, _RELU),
    (F.silu, _SILU),
    (F.tanh, _TANH),
    (torch.tanh, _TANH),
]


def fused_function(function: object) -> FusedFunction | None:
    """The fused version of a function or module, or None if there is none.

    >>> fused_function(nn.ReLU()) is fused_function(F.relu)
    True
    """
    if isinstance(function, nn.Module):
        make = _MODULES.get(type(function))
        return make(function) if make else None
    return next((fast for known, fast in _FUNCTIONS if known is function), None)


def takes(x: Tensor) -> bool:
    """Whether the fused functions accept a tensor: float32 or float64, dense, on the CPU, and not traced."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)))
        and not is_transforming()
        and not torch.jit.is_tracing()
    )


def flat(x: Tensor) -> Tensor:
    """A view in memory order, shape (elements,), of a tensor that :func:`takes` accepts."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).reshape(-1)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, tensors[0].numel(), _BLOCK):
        yield tuple(tensor[start : start + _BLOCK] for tensor in tensors)


def _sample_blocks(x: Tensor, stride: int) -> Iterator[tuple[Tensor]]:
    """Every ``stride``-th sample (dimension 0) of a tensor that :func:`takes` accepts, flat, several at a time."""
    sample = x[::stride]
    rows = max(1, _BLOCK * len(sample) // sample.numel())
    for start in range(0, len(sample), rows):
        yield (sample[start : start + rows].reshape(-1),)


def moments(function: FusedFunction, x: Tensor, y: Tensor | None = None, *, stride: int = 1) -> tuple[float, ...]:
    """Return the moments that normalization needs, and write the values into ``y`` if it is given.

    Args:
        function: the function φ.
        x: float32 or float64, not empty; if ``y`` is given, contiguous, shape (elements,).
        y: same shape and dtype; overwritten with φ(x).
        stride: if ``y`` is not given, use every ``stride``-th sample (dimension 0).

    Returns:
        The moments over the elements used, in the order of ``Moments``.
    """
    parts = _sample_blocks(x, stride) if y is None else _blocks(x, y)
    count, origin_x, origin_y = 0, 0.0, 0.0
    sums = [0.0] * 5
    for start, (part, *values) in enumerate(parts):
        if start == 0:  # no later part is larger
            slope, shifted, scratch = (torch.empty_like(part) for _ in range(3))
            ones = torch.ones_like(part)
        if part.numel() < slope.numel():
            slope, shifted, scratch, ones = (tensor[: part.numel()] for tensor in (slope, shifted, scratch, ones))
        value = values[0] if values else scratch
        count += part.numel()
        function.value(part, value)
        function.chain(ones, part, value, slope)
        if start == 0:  # moments around a value near the mean avoid cancellation
            origin_x, origin_y = float(part.mean()), float(value.mean())
        torch.sub(part, origin_x, out=shifted)
        sums[0] += float(shifted.sum())
        sums[1] += float(torch.dot(shifted, shifted))
        torch.sub(value, origin_y, out=shifted)
        sums[2] += float(shifted.sum())
        sums[3] += float(torch.dot(shifted, shifted))
        sums[4] += float(torch.dot(slope, slope))
    first_x, second_x, first_y, second_y, slopes = (total / count for total in sums)
    var_x, var_y = second_x - first_x * first_x, second_y - first_y * first_y
    return origin_x + first_x, var_x, origin_y + first_y, var_y, slopes


def rescale_(y: Tensor, scale: float, shift: float) -> None:
    """``scale * (y - shift)`` in place; ``y`` of shape (elements,). Bit for bit equal to :func:`normalize`."""
    constant = torch.tensor(-scale * shift, dtype=y.dtype)
    for (part,) in _blocks(y):
        torch.add(constant, part, alpha=scale, out=part)


def normalize(function: FusedFunction, x: Tensor, y: Tensor, scale: float, shift: float) -> None:
    """Write ``scale * (φ(x) - shift)`` into ``y``; arguments as in :func:`moments`."""
    constant = torch.tensor(-scale * shift, dtype=x.dtype)
    for part, value in _blocks(x, y):
        function.value(part, value)
        torch.add(constant, value, alpha=scale, out=value)


def gradients(
    function: FusedFunction,
    x: Tensor,
    gradient: Tensor,
    out: Tensor,
    scale: float,
    shift: float,
    *,
    of_scale: bool = True,
) -> float:
    """The backward pass of ``scale * (φ(x) - shift)``.

    Args:
        function: the function φ.
        x: as in :func:`moments`.
        gradient: gradient of the output, same shape and dtype.
        out: same shape and dtype; overwritten with the gradient of ``x``.
        scale: the factor.
        shift: the shift.
        of_scale: whether to compute the gradient of ``scale``.

    Returns:
        The gradient of ``scale``; 0 if ``of_scale`` is False.
    """
    values = torch.empty(min(_BLOCK, x.numel()), dtype=x.dtype)
    total = 0.0
    for part, incoming, outgoing in _blocks(x, gradient, out):
        y = values[: part.numel()]
        function.value(part, y)
        function.chain(incoming, part, y, outgoing)
        outgoing.mul_(scale)
        if of_scale:
            total += float(torch.dot(incoming, y.sub_(shift)))
    return total


@dataclass(frozen=True)
class OutputNoise:
    r"""NAN and NAH where h clips a line u, for a scalar p: :math:`\phi = u + \alpha \Delta + d \sigma \epsilon`.

    With :math:`T = \tanh(p \Delta / 2) = 2 (\mathrm{sigmoid}(p \Delta) - 1/2)`, and since h saturates above where
    x > 0 and below where x < 0, :math:`d \sigma = k T |T|` with :math:`k = \mp \mathrm{sgn}(p)\, c / 4`, minus for
    α > 1. The derivatives of :math:`T |T|` by x and p are :math:`|T| (1 - T^2)` times :math:`p \Delta'` and Δ.

    Args:
        slope: slope of u.
        offset: value of u at 0.
        bounds: what u is clipped to.
        alpha: α.
        p: p.
        c: c.
        half_normal: whether ε = |ξ|.
    """

    slope: float
    offset: float
    bounds: tuple[float, float]
    alpha: float
    p: float
    c: float
    half_normal: bool

    def _k(self) -> float:
        return (-1.0 if self.alpha > 1 else 1.0) * math.copysign(1.0, self.p) * self.c / 4

    def _line(self, x: Tensor, out: Tensor) -> Tensor:
        if (self.slope, self.offset) == (1, 0):
            return x
        return torch.mul(x, self.slope, out=out).add_(self.offset)

    def _hard(self, line: Tensor, out: Tensor) -> Tensor:
        lower, upper = self.bounds
        return torch.clamp(line, lower, None if upper == math.inf else upper, out=out)

    def _delta(self, line: Tensor, out: Tensor) -> Tensor:
        return self._hard(line, out).sub_(line)

    def _mean(self, line: Tensor, delta: Tensor, out: Tensor) -> Tensor:
        if self.alpha == 1:  # exactly h
            return self._hard(line, out)
        return torch.add(line, delta, alpha=self.alpha, out=out)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor, key: Key) -> None:
        """Write φ into ``y``, and what the backward pass needs, ε |T| (1 - T²), into ``weight``.

        Args:
            x: float32, contiguous, shape (elements,).
            y: same shape.
            weight: same shape.
            key: key of the noise.
        """
        k, start = self._k(), 0
        line_, delta_, t_, epsilon_ = (torch.empty(min(_BLOCK, x.numel()), dtype=torch.float32) for _ in range(4))
        for part, value, kept in _blocks(x, y, weight):
            count = part.numel()
            line = self._line(part, line_[:count])
            delta, t = self._delta(line, delta_[:count]), t_[:count]
            epsilon = draw_(epsilon_[:count], key, start=start)
            start += count
            torch.tanh(torch.mul(delta, self.p / 2, out=t), out=t)
            self._mean(line, delta, value)
            torch.abs(t, out=delta)
            delta.mul_(epsilon.abs_() if self.half_normal else epsilon)  # |T| ε
            torch.mul(delta, t, out=kept)
            value.add_(kept, alpha=k)
            torch.addcmul(delta, kept, t, value=-1, out=kept)

    def backward(self, x: Tensor, weight: Tensor, gradient: Tensor, out: Tensor) -> float:
        """Write the gradient of ``x`` into ``out``, and return that of p; arguments as in :meth:`forward`."""
        k = self._k()
        line_, delta_ = (torch.empty(min(_BLOCK, x.numel()), dtype=torch.float32) for _ in range(2))
        total = 0.0
        for part, kept, incoming, outgoing in _blocks(x, weight, gradient, out):
            count = part.numel()
            delta = self._delta(self._line(part, line_[:count]), delta_[:count])
            torch.mul(incoming, kept, out=outgoing)  # g W
            total += k * float(torch.dot(outgoing, delta))
            delta.sign_().abs_().mul_(-self.alpha).add_(1)  # 1 where h doesn't saturate, else 1 - α
            outgoing.mul_(-self.p * k).addcmul_(incoming, delta)
            if self.slope != 1:
                outgoing.mul_(self.slope)
        return total

    def expectation(self, x: Tensor, y: Tensor) -> None:
        """Write E[φ] into ``y``; arguments as in :meth:`forward`."""
        line_, delta_, t_ = (torch.empty(min(_BLOCK, x.numel()), dtype=torch.float32) for _ in range(3))
        for part, value in _blocks(x, y):
            count = part.numel()
            line = self._line(part, line_[:count])
            delta, t = self._delta(line, delta_[:count]), t_[:count]
            self._mean(line, delta, value)
            if self.half_normal:
                torch.tanh(delta.mul_(self.p / 2), out=t)
                value.addcmul_(t, torch.abs(t, out=delta), value=self._k() * math.sqrt(2 / math.pi))
