"""Activations in one sweep over the memory: value, derivative, moments and gradients, a block at a time.

A block stays in the cache while all that is needed of it is computed. On the CPU that is what the time goes into. The
readable references are :func:`~lightning_noisy.functional.normalized.normalize_output` with the moments by torch, and
:func:`~lightning_noisy.functional.noisy.output_noise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy.functional.gaussian import Key, sampler

__all__ = ["Kernel", "OutputNoise", "flat", "gradients", "kernel_of", "moments", "rescale_", "takes"]

# Writes the value at x into the second argument and the derivative into the third; 1-dimensional, contiguous.
Kernel = Callable[[Tensor, Tensor, Tensor], object]

_BLOCK = 1 << 16


def _relu(x: Tensor, y: Tensor, slope: Tensor) -> None:
    torch.clamp_min(x, 0, out=y)
    torch.sign(y, out=slope)


def _leaky_relu(x: Tensor, y: Tensor, slope: Tensor, negative_slope: float = 0.01) -> None:
    torch.sign(x, out=slope)
    slope.clamp_(0, 1).mul_(1 - negative_slope).add_(negative_slope)
    torch.mul(x, slope, out=y)


def _silu(x: Tensor, y: Tensor, slope: Tensor) -> None:
    torch.sigmoid(x, out=slope)
    torch.mul(x, slope, out=y)
    torch.lerp(slope, torch.ones((), dtype=x.dtype), y, out=slope)  # s + y (1 - s)


def _tanh(x: Tensor, y: Tensor, slope: Tensor) -> None:
    torch.tanh(x, out=y)
    torch.mul(y, y, out=slope)
    slope.neg_().add_(1)


def _gelu(x: Tensor, y: Tensor, slope: Tensor) -> None:
    below = torch.mul(x, math.sqrt(0.5)).erf_().add_(1).mul_(0.5)  # the normal distribution function
    torch.mul(x, below, out=y)
    torch.mul(x, x, out=slope)
    slope.mul_(-0.5).exp_().mul_(x).mul_(1 / math.sqrt(2 * math.pi)).add_(below)


def _elu(x: Tensor, y: Tensor, slope: Tensor) -> None:
    torch.clamp_max(x, 0, out=slope)
    torch.expm1(slope, out=y)
    torch.add(y, 1, out=slope)
    y.add_(torch.clamp_min(x, 0))


def kernel_of(function: object) -> Kernel | None:
    """The kernel of a function or module, or None if there is none.

    >>> kernel_of(nn.ReLU()) is kernel_of(F.relu)
    True
    """
    if isinstance(function, nn.Module):
        if type(function) is nn.LeakyReLU:
            return partial(_leaky_relu, negative_slope=function.negative_slope)
        exact = getattr(function, "approximate", "none") == "none" and getattr(function, "alpha", 1.0) == 1.0
        return _KERNELS.get(type(function)) if exact else None
    return next((kernel for key, kernel in _KERNELS.items() if key is function), None)


_KERNELS: dict[object, Kernel] = {
    nn.ELU: _elu,
    F.elu: _elu,
    nn.GELU: _gelu,
    F.gelu: _gelu,
    F.leaky_relu: _leaky_relu,
    nn.ReLU: _relu,
    F.relu: _relu,
    torch.relu: _relu,
    nn.SiLU: _silu,
    F.silu: _silu,
    nn.Tanh: _tanh,
    F.tanh: _tanh,
    torch.tanh: _tanh,
}


def takes(x: Tensor) -> bool:
    """Whether the sweeps can work on a tensor: dense, on the CPU, in single or double precision, and no proxy."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)))
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def flat(x: Tensor) -> Tensor:
    """A view of a tensor that :func:`takes`, in the order of its memory, shape (elements,)."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).reshape(-1)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, tensors[0].numel(), _BLOCK):
        yield tuple(tensor[start : start + _BLOCK] for tensor in tensors)


def moments(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """Write the values into ``y``, and return the moments that normalization needs.

    Args:
        kernel: of the function φ.
        x: float32 or float64, contiguous, shape (elements,), not empty.
        y: same shape and dtype; overwritten with φ(x).

    Returns:
        Var[x], E[φ], Var[φ] and E[φ′²], population moments over all elements.
    """
    slope = torch.empty(min(_BLOCK, x.numel()), dtype=x.dtype)
    centred = torch.empty_like(slope)
    count, origin_x, origin_y = x.numel(), 0.0, 0.0
    sums = [0.0] * 5
    for start, (part, value) in enumerate(_blocks(x, y)):
        derivative, shifted = slope[: part.numel()], centred[: part.numel()]
        kernel(part, value, derivative)
        if start == 0:  # moments around a value near the mean don't cancel
            origin_x, origin_y = float(part.mean()), float(value.mean())
        torch.sub(part, origin_x, out=shifted)
        sums[0] += float(shifted.sum())
        sums[1] += float(torch.dot(shifted, shifted))
        torch.sub(value, origin_y, out=shifted)
        sums[2] += float(shifted.sum())
        sums[3] += float(torch.dot(shifted, shifted))
        sums[4] += float(torch.dot(derivative, derivative))
    first_x, second_x, first_y, second_y, slopes = (total / count for total in sums)
    return second_x - first_x**2, origin_y + first_y, second_y - first_y**2, slopes


def rescale_(y: Tensor, scale: float, shift: float) -> None:
    """``scale * (y - shift)`` in place; ``y`` of shape (elements,)."""
    for (part,) in _blocks(y):
        part.sub_(shift).mul_(scale)


def gradients(kernel: Kernel, x: Tensor, gradient: Tensor, out: Tensor, scale: float, shift: float) -> float:
    """The backward pass of ``scale * (φ(x) - shift)``.

    Args:
        kernel: of the function φ.
        x: as in :func:`moments`.
        gradient: of the output, same shape and dtype.
        out: same shape and dtype; overwritten with the gradient of ``x``.
        scale: the factor.
        shift: the shift.

    Returns:
        The gradient of ``scale``.
    """
    value, slope = (torch.empty(min(_BLOCK, x.numel()), dtype=x.dtype) for _ in range(2))
    total = 0.0
    for part, incoming, outgoing in _blocks(x, gradient, out):
        y, derivative = value[: part.numel()], slope[: part.numel()]
        kernel(part, y, derivative)
        total += float(torch.dot(incoming, y)) - shift * float(incoming.sum())
        derivative.mul_(scale)
        torch.mul(incoming, derivative, out=outgoing)
    return total


@dataclass(frozen=True)
class OutputNoise:
    r"""NAN and NAH over a clipped line u, for one p: :math:`\phi = u + \alpha \Delta + d \sigma \epsilon`.

    With :math:`T = \tanh(p \Delta / 2) = 2 (\mathrm{sigmoid}(p \Delta) - 1/2)`, and since h saturates above where
    x > 0 and below where x < 0, :math:`d \sigma = k T |T|` with :math:`k = \mp \mathrm{sgn}(p)\, c / 4`, minus for
    α > 1. Its derivatives are those of :math:`T |T|`, :math:`|T| (1 - T^2)` times :math:`p \Delta'` and Δ.

    Args:
        slope: of u.
        offset: of u.
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
            key: of the noise.
        """
        draws = sampler()
        size = 2 * draws.pairs
        line_, delta_, t_ = (torch.empty(min(size, x.numel())) for _ in range(3))
        for start in range(0, x.numel(), size):
            part, value, kept = (tensor[start : start + size] for tensor in (x, y, weight))
            count = part.numel()
            line = self._line(part, line_[:count])
            delta, t = self._delta(line, delta_[:count]), t_[:count]
            draws.counters_of(start // 2, (count + 1) // 2, key[0], out=draws.counters[: (count + 1) // 2])
            epsilon = draws.draw((count + 1) // 2, key[1])[:count]
            torch.tanh(torch.mul(delta, self.p / 2, out=t), out=t)
            self._mean(line, delta, value)
            torch.abs(t, out=delta)
            delta.mul_(epsilon.abs_() if self.half_normal else epsilon)  # |T| ε
            torch.mul(delta, t, out=kept)
            value.add_(kept, alpha=self._k() * math.sqrt(2))
            torch.addcmul(delta, kept, t, value=-1, out=kept)

    def backward(self, x: Tensor, weight: Tensor, gradient: Tensor, out: Tensor) -> float:
        """Write the gradient of ``x`` into ``out``, and return that of p; arguments as in :meth:`forward`."""
        k = self._k() * math.sqrt(2)
        line_, delta_ = (torch.empty(min(_BLOCK, x.numel())) for _ in range(2))
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
        line_, delta_, t_ = (torch.empty(min(_BLOCK, x.numel())) for _ in range(3))
        for part, value in _blocks(x, y):
            count = part.numel()
            line = self._line(part, line_[:count])
            delta, t = self._delta(line, delta_[:count]), t_[:count]
            self._mean(line, delta, value)
            if self.half_normal:
                torch.tanh(delta.mul_(self.p / 2), out=t)
                value.addcmul_(t, torch.abs(t, out=delta), value=self._k() * math.sqrt(2 / math.pi))
