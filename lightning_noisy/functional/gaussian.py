r"""Gaussian noise as a function: every number is computed from a key and its own address, and from nothing else.

No generator is advanced, so any part of the noise can be had alone, by any process, in any order. Two neighbouring
numbers come from one 64-bit counter: it starts as the key's first half plus the pair's index times Weyl's constant,
is mixed with the key's second half, and twice with itself by shifting and multiplying (as SplitMix64 does; Steele, Lea
and Flood 2014), and its two 32-bit words u become the numbers :math:`\sqrt 2\, \mathrm{erf}^{-1}(u / 2^{31})`.
Integer arithmetic is exact everywhere; devices differ in the last bits of erf⁻¹. Numbers lie within ±5.43, as words
of 32 bits, taken to float32, go no nearer to ±1.
"""

from __future__ import annotations

import hashlib
import threading
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Key", "Sampler", "add_gaussian_", "gaussian", "gaussian_at", "gaussian_like", "stream_key", "substream"]

Key = tuple[int, int]
_local = threading.local()  # the CPU's sampler

_WEYL = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio
_FACTOR = 0xD6E8FEB86659FD93
_TO_UNIT = (1 - 2**-24) / 2**31  # from a word, rounded to float32, into (-1, 1)

# MKL, which computes erf⁻¹ for torch on many CPUs, sets itself up at the first call. Where two threads make that at
# once, which happened in one process of a thousand, the result is off in the fifth digit. One element has one thread.
torch.erfinv(torch.zeros(1, device="cpu"))


def stream_key(*parts: int | str) -> Key:
    """Hash the parts that name a stream (seed, optimizer, step, ...) into its key.

    Args:
        parts: integers and strings. Their order counts, and ``("a", "bc")`` differs from ``("ab", "c")``.

    Returns:
        Two integers of 64 bits.

    >>> stream_key(0, "weight", 1) == stream_key(0, "weight", 1) != stream_key(0, "weight", 2)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def substream(key: Key, name: str) -> Key:
    """The key of one of many streams of a step: those of names lie far apart in the counters of ``key``.

    >>> substream(stream_key(0), "weight") != substream(stream_key(0), "bias")
    True
    """
    return (key[0] + stream_key(name)[0]) % 2**64, key[1]


def signed(number: int) -> int:
    """A number of 64 bits as the int64 with the same bits."""
    return (number + 2**63) % 2**64 - 2**63


def _mix_(counters: Tensor, other: Tensor, second: int) -> Tensor:
    """Turn int64 counters into random bits in place, with ``other`` as scratch and the key's second half."""
    # torch shifts int64 with the sign, so that an xor of the upper half into the lower one clears the top bit. It
    # comes back with the product; the last step adds, to keep it.
    torch.bitwise_right_shift(counters, 32, out=other)
    torch.bitwise_xor(counters, other, out=counters)
    torch.bitwise_xor(counters, second, out=counters)
    torch.mul(counters, signed(_FACTOR), out=counters)
    torch.bitwise_right_shift(counters, 32, out=other)
    torch.bitwise_xor(counters, other, out=counters)
    torch.mul(counters, signed(_FACTOR), out=counters)
    torch.bitwise_right_shift(counters, 32, out=other)
    return torch.add(counters, other, out=counters)


def erfinv_at(key: Key | tuple[Tensor, int], address: Tensor) -> Tensor:
    """The numbers at any addresses with half their variance, erf⁻¹ of uniform ones: the reference of the Sampler."""
    first = key[0] if isinstance(key[0], Tensor) else signed(key[0])
    counters = (address >> 1) * signed(_WEYL) + first
    bits = _mix_(counters, torch.empty_like(counters), signed(key[1]))
    words = torch.where(address % 2 == 0, bits << 32 >> 32, bits >> 32)
    return torch.erfinv(words.to(torch.float32) * _TO_UNIT)


def gaussian_at(key: Key, address: Tensor) -> Tensor:
    """The standard normal numbers of a key at any addresses.

    Args:
        key: from :func:`stream_key`.
        address: int64 tensor of any shape, >= 0.

    Returns:
        Float32 tensor of the same shape, on the same device.

    >>> address = torch.tensor([[4, 5], [0, 4]])
    >>> numbers = gaussian_at(stream_key(0), address)
    >>> bool(numbers[0, 0] == numbers[1, 1] != numbers[0, 1])
    True
    """
    return erfinv_at(key, address) * sqrt(2)


class Sampler:
    """Draws numbers fast, some ten thousand at a time, in memory that it keeps.

    ``counters[:n]`` are to be set to what :meth:`counters_of` gives, or to parts of several such, plus the first half
    of a key; then :meth:`draw` makes them into 2n numbers.

    Attributes:
        pairs: most pairs of numbers that can be drawn at once.
        counters: int64 tensor, shape (pairs,).
    """

    @torch.inference_mode(False)  # its memory is to be of use outside, too
    def __init__(self, device: torch.device) -> None:
        # 2 MiB, which the caches of two cores hold, and elsewhere 16 MiB, to occupy the device.
        self.pairs = 1 << (16 if device.type == "cpu" else 19)
        self.counters, self._other = (torch.empty(self.pairs, dtype=torch.int64, device=device) for _ in range(2))
        self._numbers = torch.empty(2 * self.pairs, dtype=torch.float32, device=device)
        self._ramp = torch.arange(self.pairs, dtype=torch.int64, device=device).mul_(signed(_WEYL))

    def counters_of(self, first: int | Tensor, pairs: int, offset: int, out: Tensor | None = None) -> Tensor:
        """Counters of consecutive pairs of addresses.

        Args:
            first: index of the first pair, >= 0; or a tensor of them, shape (rows, 1).
            pairs: how many, <= the sampler's.
            offset: is added: the first half of a key, for one.
            out: where to write them.

        Returns:
            Int64 tensor, shape (pairs,) or (rows, pairs).
        """
        if isinstance(first, Tensor):
            return torch.add(first * signed(_WEYL) + signed(offset), self._ramp[:pairs], out=out)
        return torch.add(self._ramp[:pairs], signed(first * _WEYL + offset), out=out)

    def draw(self, pairs: int, second: int) -> Tensor:
        """Make the first counters into numbers, divided by √2, which the scale of the noise can take in.

        Args:
            pairs: how many.
            second: second half of the key.

        Returns:
            Float32 tensor, shape (2 * pairs,). The next call overwrites it.
        """
        bits = _mix_(self.counters[:pairs], self._other[:pairs], signed(second))
        numbers = self._numbers[: 2 * pairs]
        return torch.erfinv(numbers.copy_(bits.view(torch.int32)).mul_(_TO_UNIT), out=numbers)

    def numbers(self, count: int, skip: int = 0) -> Tensor:
        """The memory of what :meth:`draw` returns: ``count`` numbers from the one with index ``skip`` on."""
        return self._numbers[skip : skip + count]


def gaussian(key: Key, start: int, stop: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The standard normal numbers of a key at addresses ``start`` to ``stop``.

    Args:
        key: from :func:`stream_key`.
        start: first address, >= 0.
        stop: one past the last address.
        device: where to draw them.

    Returns:
        Float32 tensor, shape (stop - start,).

    >>> whole = gaussian(stream_key(0), 0, 100_000)
    >>> bool((gaussian(stream_key(0), 40_000, 40_003) == whole[40_000:40_003]).all())
    True
    """
    return gaussian_at(key, torch.arange(start, max(start, stop), device=device))


def sampler() -> Sampler:
    """The CPU's sampler of this thread, to be used at once."""
    if "sampler" not in _local.__dict__:
        _local.sampler = Sampler(torch.device("cpu"))
    found: Sampler = _local.sampler
    return found


@torch.no_grad()
def gaussian_like(x: Tensor, first: Tensor, second: int) -> Tensor:
    """Standard normal numbers for every element of a tensor, for noise that is drawn anew in each forward pass.

    Args:
        x: tensor whose shape and device they have.
        first: first half of the key, 0-dimensional int64 tensor: on a device its value isn't waited for.
        second: second half of the key.

    Returns:
        Float32 tensor, shape of ``x``, contiguous: element i in row-major order gets the number at address i.
    """
    if torch.compiler.is_compiling():
        as_operator = x.device.type == "cpu"  # where the hash, compiled, takes ten times as long as the sampler
    else:
        as_operator = torch._C._functorch.peek_interpreter_stack() is not None or type(x) not in (Tensor, nn.Parameter)
    if as_operator:
        drawn: Tensor = _as_operator(x.detach(), first, signed(second))
        return drawn
    return _drawn(x, first, second)


def _drawn(x: Tensor, first: Tensor, second: int) -> Tensor:
    if x.device.type != "cpu":
        return erfinv_at((first, second), torch.arange(x.numel(), device=x.device).view(x.shape)) * sqrt(2)
    numbers = torch.empty(x.shape, dtype=torch.float32)
    flat = numbers.view(-1)
    offset, start, draws = int(first), 0, sampler()
    while start < flat.numel():
        count = min(2 * draws.pairs, flat.numel() - start)
        pairs = (count + 1) // 2
        draws.counters_of(start // 2, pairs, offset, out=draws.counters[:pairs])
        torch.mul(draws.draw(pairs, second)[:count], sqrt(2), out=flat[start : start + count])
        start += count
    return numbers


_as_operator = torch.library.custom_op("lightning_noisy::gaussian_like", _drawn, mutates_args=())


@_as_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, first: Tensor, second: int) -> tuple[Tensor, int]:
    """Every element of the whole batch has a number of its own; or, of several streams, each its own stream."""
    size = info.batch_size
    of_x, of_first = in_dims[:2]
    if of_first is None and of_x is not None:
        return _as_operator(x.movedim(of_x, 0), first, second), 0
    parts = [x] * size if of_x is None else x.movedim(of_x, 0).unbind()
    streams = [first] * size if of_first is None else first.movedim(of_first, 0).unbind()
    return torch.stack([_as_operator(part, each, second) for part, each in zip(parts, streams, strict=True)]), 0


@_as_operator.register_fake
def _(x: Tensor, first: Tensor, second: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


@torch.no_grad()
def add_gaussian_(tensor: Tensor, std: float, key: Key, *, start: int = 0) -> Tensor:
    r"""Add :math:`\mathcal N(0, \sigma^2)` noise in place: element ``i`` gets the number at ``start + i``.

    Elements are counted in row-major order, whatever the strides. Numbers are drawn in float32, added in the
    wider of the two dtypes and rounded once. A complex element z takes two numbers, and gets noise with
    :math:`E|z|^2 = \sigma^2`. Non-finite elements stay non-finite. (Readable, and the reference of what gradients
    get; those are served by :class:`lightning_noisy.engine.noise_plan.NoisePlan`.)

    Args:
        tensor: strided real or complex float tensor of any shape, modified in place.
        std: σ, >= 0. With 0 the tensor is not touched.
        key: from :func:`stream_key`.
        start: address of the first element, >= 0.

    Returns:
        ``tensor``.

    >>> a, b = torch.zeros(4, 3), torch.zeros(3, 4).t()
    >>> torch.equal(add_gaussian_(a, 1.0, stream_key(0)), add_gaussian_(b, 1.0, stream_key(0)))
    True
    """
    if tensor.is_complex():
        add_gaussian_(torch.view_as_real(tensor), std * 0.5**0.5, key, start=start)
    elif std != 0:
        address = torch.arange(start, start + tensor.numel(), device=tensor.device).view(tensor.shape)
        tensor.add_(erfinv_at(key, address), alpha=std * sqrt(2))
    return tensor
