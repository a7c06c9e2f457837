r"""Counter-based Gaussian noise: every number is a function of only a key and its address.

There is no generator state, so any process can draw any part of the noise, in any order. Each pair of neighboring
numbers comes from one 64-bit counter: the key's first half plus the pair's index times Weyl's constant. The counter
is mixed with the key's second half, and twice with itself by shifts and multiplications (in the manner of SplitMix64;
Steele, Lea and Flood 2014). Its two 32-bit words, as u in (0, 1] and t in [-1, 1], become the numbers
:math:`\sqrt{-2 \ln u} \cos \pi t` and :math:`\sqrt{-2 \ln u} \sin \pi t` (Box and Muller 1958), which lie within ±6.67.

On the CPU, logarithm, sine and cosine are polynomials whose operations IEEE 754 rounds correctly, so the bits are the
same on every CPU, and in the kernel ``gaussian.c``, which is used wherever there is a C compiler. Other devices use
torch's functions, which differ in the last bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
import warnings
from collections.abc import Callable
from functools import cache
from math import pi
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_noisy._torch_internals import is_transforming, is_watched
from lightning_noisy.kernels.backend import HALF_TOO, checked, is_plain, triton_kernels
from lightning_noisy.kernels.build import compiled_function, threads_for, why_not

__all__ = [
    "AddressRanges",
    "Key",
    "add_gaussian_",
    "adds_to",
    "draw_",
    "gaussian_at",
    "gaussian_like",
    "stream_key",
    "substream",
]

Key = tuple[int, int]

_WEYL = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio
_FACTOR = 0xD6E8FEB86659FD93
_AT_ONCE = 1 << 17  # numbers that torch's operations draw at once: a few MiB, which fit a CPU's cache

# Minimax fits over the range, each coefficient rounded to float32 before the next was fitted.
_LOG = (-0.666677177, 0.500034928, -0.399307430, 0.331312805, -0.297544450, 0.287004471, -0.178343669)
_SIN = (1.57079625, -0.645962775, 0.0796861798, -0.00466894731, 0.000149283500)
_COS = (1.0, -1.23370051, 0.253669083, -0.0208619013, 0.000916733348, -0.0000234020771)


def stream_key(*parts: int | str) -> Key:
    """Hash the parts that name a stream (seed, optimizer, step, ...) into its key.

    Args:
        parts: integers and strings. Their order matters, and ``("a", "bc")`` differs from ``("ab", "c")``.

    Returns:
        Two 64-bit integers.

    >>> stream_key(0, "weight", 1) == stream_key(0, "weight", 1) != stream_key(0, "weight", 2)
    True
    """
    digest = hashlib.blake2b(repr(tuple(map(plain, parts))).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def plain(part: int | str) -> int | str:
    """Convert an integer or string of any type (an enum, NumPy's) to int or str.

    Raises:
        TypeError: if it is neither.
    """
    return str.__str__(part) if isinstance(part, str) else operator.index(part)


def substream(key: Key, name: str) -> Key:
    """The key of a named stream within ``key``: the counters of different names are far apart.

    >>> substream(stream_key(0), "weight") != substream(stream_key(0), "bias")
    True
    """
    return (key[0] + stream_key(name)[0]) % 2**64, key[1]


def signed(number: int) -> int:
    """A 64-bit number as the int64 with the same bits."""
    return (number + 2**63) % 2**64 - 2**63


def _bits(counters: Tensor, second: int) -> Tensor:
    """The random bits (int64) for int64 counters and the key's second half."""
    # torch's shift of int64 is arithmetic, so an xor of the upper half into the lower one clears the top bit. The
    # product fills it again; the last step adds instead, to keep it.
    bits = (counters >> 32).bitwise_xor_(counters).bitwise_xor_(signed(second)).mul_(signed(_FACTOR))
    bits = (bits >> 32).bitwise_xor_(bits).mul_(signed(_FACTOR))
    return (bits >> 32).add_(bits)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value.mul_(x).add_(coefficient)
    return value


def _radius(u: Tensor) -> Tensor:
    """√(-2 ln u) for float32 in (0, 1]."""
    if u.device.type != "cpu":
        return u.log().mul_(-2).sqrt_()
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # so that u = 2^exponent (1 + f), with 1 + f in [√½, √2)
    f = (bits - (exponent << 23)).view(torch.float32).sub_(1)
    f2 = f * f
    square = _polynomial(f, _LOG).mul_(f2 * f).add_(f2).add_(f.mul_(-2)).add_(exponent.float().mul_(-1.38629436))
    return square.double().sqrt_().float()  # MKL rounds one float32 square root in a hundred incorrectly


def _on_circle(t: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of πt for float32 in [-1, 1]."""
    if t.device.type != "cpu":
        return torch.cos(t * pi), torch.sin(t * pi)
    t2 = t * t
    s, c = _polynomial(t2, _SIN).mul_(t), _polynomial(t2, _COS)  # of half the angle
    twice = s + s
    return s.mul_(twice).neg_().add_(1), c.mul_(twice)


def _pairs(counters: Tensor, second: int, std: float) -> tuple[Tensor, Tensor]:
    """The two float32 numbers of each int64 counter, times σ."""
    bits = _bits(counters, second)
    radius = _radius((bits & 0xFFFFFFFF).bitwise_right_shift_(1).float().mul_(2**-31).add_(2**-32)).mul_(std)
    cosine, sine = _on_circle(bits.bitwise_right_shift_(32).float().mul_(2**-31))
    return cosine.mul_(radius), sine.mul_(radius)


def _at(first: int | Tensor, second: int, address: Tensor, std: float) -> Tensor:
    even, odd = _pairs((address >> 1) * signed(_WEYL) + first, second, std)
    return torch.where(address % 2 == 0, even, odd)


def gaussian_at(key: Key, address: Tensor, std: float = 1.0) -> Tensor:
    """The normal numbers of a key at any addresses: the readable reference of the fast implementations.

    Args:
        key: from :func:`stream_key`.
        address: int64 tensor of any shape, >= 0.
        std: σ, >= 0; the numbers are multiplied by it in float32.

    Returns:
        Float32 tensor of the same shape, on the same device.

    >>> address = torch.tensor([[4, 5], [0, 4]])
    >>> numbers = gaussian_at(stream_key(0), address)
    >>> bool(numbers[0, 0] == numbers[1, 1] != numbers[0, 1])
    True
    """
    return _at(signed(key[0]), key[1], address, std)


class AddressRanges:
    """Ranges of consecutive addresses, of one or several streams.

    Attributes:
        firsts: the first half of each range's key, as int64.
        starts: its first address, >= 0.
        counts: its number of addresses. All three are int64 tensors of shape (ranges,) on the CPU.
    """

    def __init__(self, firsts: list[int] | Tensor, starts: list[int] | Tensor, counts: list[int] | Tensor) -> None:
        self.firsts, self.starts, self.counts = (
            numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.int64, device="cpu")
            for numbers in (firsts, starts, counts)
        )

    def __getitem__(self, part: slice) -> AddressRanges:
        return AddressRanges(self.firsts[part], self.starts[part], self.counts[part])

    def moved(self, offset: int) -> AddressRanges:
        """The ranges with ``offset`` added to the first halves of their keys."""
        return AddressRanges(self.firsts + signed(offset % 2**64), self.starts, self.counts)

    def add_at(self, pointers: Tensor, second: int, std: float, like: Tensor) -> None:
        """Add the numbers to floats in memory; needs a kernel for ``like``, see :func:`adds_to`.

        Args:
            pointers: address of each range's elements, int64 on the CPU, shape (ranges,); 0 skips a range. The memory
                of two ranges must not overlap, since several threads write to it.
            second: second half of the key.
            std: σ, >= 0.
            like: a tensor of the dtype and on the device of the elements.
        """
        arrays = [t.contiguous() for t in (pointers, self.firsts, self.starts, self.counts)]  # alive during the call
        if (triton := _triton_of(like)) is not None:
            triton.add_ranges(*arrays, signed(second), std, like)
            return
        add = compiled_kernel()
        assert add is not None
        threads = threads_for(int(self.counts[pointers != 0].sum()))
        add(len(pointers), *(t.data_ptr() for t in arrays), signed(second), std, threads)

    def draw(self, second: int, std: float, device: torch.device | str = "cpu") -> Tensor:
        """The numbers of all ranges, concatenated.

        Args:
            second: second half of the key.
            std: σ, >= 0.
            device: where to draw them.

        Returns:
            Float32 tensor, shape (sum of the counts,).
        """
        total = int(self.counts.sum())
        if adds_to(out := torch.empty(0, dtype=torch.float32, device=device)):
            out = out.new_zeros(total)
            self.add_at(out.data_ptr() + 4 * (self.counts.cumsum(0) - self.counts), second, std, out)
            return out
        skips = self.starts % 2
        pairs = (skips + self.counts + 1) // 2
        ends = pairs.cumsum(0)
        size = int(ends[-1]) if len(ends) else 0
        # The counter of a range's pair i is first + (start // 2 + i) W.
        bases = self.firsts + (self.starts // 2 - ends + pairs) * signed(_WEYL)
        bases = bases.to(device)
        if len(bases) > 1:
            bases = bases.repeat_interleave(pairs.to(device), output_size=size)
        counters = torch.arange(size, device=device).mul_(signed(_WEYL)).add_(bases)
        numbers = torch.stack(_pairs(counters, second, std), -1).view(-1)
        if total == len(numbers):
            return numbers
        begins = 2 * (ends - pairs) + skips
        kept = (begins - self.counts.cumsum(0) + self.counts).to(device)
        return numbers[
            kept.repeat_interleave(self.counts.to(device), output_size=total) + torch.arange(total, device=device)
        ]


def adds_to(x: Tensor) -> bool:
    """Whether there is a kernel that adds noise to a dense tensor of that dtype on that device."""
    if _triton_of(x) is not None:
        return True
    return x.is_cpu and x.dtype is torch.float32 and compiled_kernel() is not None


def _triton_of(x: Tensor) -> ModuleType | None:
    """The kernels in Triton, if they take a tensor and give the numbers of :func:`gaussian_at`."""
    kernels = triton_kernels("gaussian", x)
    return kernels if kernels is not None and x.dtype in HALF_TOO and _is_right(kernels, x.device) else None


@checked
@torch.no_grad()
def _is_right(kernels: ModuleType, device: torch.device) -> bool:
    """Whether the numbers are those of the reference, but for the last bit of a few."""
    out, first = torch.zeros(4099, dtype=torch.float32, device=device), torch.tensor([7], device=device)
    kernels.draw_(out, first, 13)
    reference = gaussian_at((7, 13), torch.arange(4099, device="cpu"))
    return bool(((out.cpu() - reference).abs() <= 1.2e-7 * reference.abs()).all())


def _add_run(add: Callable[..., None], out: Tensor, key: Key, start: int, std: float) -> None:
    """Add the numbers of a range to a contiguous float32 tensor on the CPU."""
    run = (ctypes.c_int64 * 4)(out.data_ptr(), signed(key[0]), start, out.numel())
    arrays = (ctypes.addressof(run) + 8 * i for i in range(4))
    add(1, *arrays, signed(key[1]), std, threads_for(out.numel()))


@cache
def _load() -> tuple[Callable[..., None] | None, list[str]]:
    """The function of ``gaussian.c`` or None, and the reason if it is still to be reported."""
    types = [ctypes.c_int64, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_float, ctypes.c_int]
    add = compiled_function("add_gaussian", types)
    if add is None:
        return None, [why_not()] if why_not() else []
    numbers = torch.zeros(1027, dtype=torch.float32, device="cpu")
    _add_run(add, numbers, (7, 13), 11, 0.3)
    if torch.equal(numbers, gaussian_at((7, 13), torch.arange(11, 1038, device="cpu"), 0.3)):
        return add, []
    return None, ["compiled, it gives other numbers than torch's operations"]


def compiled_kernel() -> Callable[..., None] | None:
    """``add_gaussian`` of ``gaussian.c``, or None if it is unavailable, with one warning.

    ``LIGHTNING_NOISY_KERNEL=0`` disables it, without a warning.
    """
    add, reasons = _load()
    if reasons:
        reason = reasons.pop()  # before the warning, which filters may turn into an error
        warnings.warn(
            "Noise on the CPU is drawn by torch's operations, about ten times slower than by the compiled kernel,"
            f" which needs a C compiler (cc, or $CC): {reason}. LIGHTNING_NOISY_KERNEL=0 does without the kernel and"
            " this warning.",
            stacklevel=3,
        )
    return add


def draw_(out: Tensor, key: Key, *, start: int = 0, std: float = 1.0) -> Tensor:
    """Write the numbers of a key from address ``start`` on, times σ.

    Args:
        out: float32 tensor on the CPU, contiguous, shape (count,).
        key: from :func:`stream_key`.
        start: first address, >= 0.
        std: σ, >= 0.

    Returns:
        ``out``.

    Raises:
        ValueError: if ``out`` or ``start`` is invalid.
    """
    if start < 0 or out.dtype != torch.float32 or out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(f"draw_ needs a contiguous float32 tensor on the CPU and start >= 0, got {out!r} and {start}.")
    add = compiled_kernel() if is_plain(out) else None
    if add is not None:
        _add_run(add, out.zero_(), key, start, std)
        return out
    for begin in range(0, out.numel(), _AT_ONCE):
        part = out[begin : begin + _AT_ONCE]
        part.copy_(AddressRanges([signed(key[0])], [start + begin], [part.numel()]).draw(key[1], std))
    return out


@torch.no_grad()
def gaussian_like(x: Tensor, first: Tensor, second: int) -> Tensor:
    """A standard normal number for each element of a tensor, such as for new noise in each forward pass.

    Args:
        x: tensor that gives the shape and the device.
        first: first half of the key, 0-dimensional int64 tensor, so that a device needs no host sync.
        second: second half of the key.

    Returns:
        Float32 tensor, shape of ``x``, contiguous: element i in row-major order gets the number at address i.
    """
    if torch.compiler.is_compiling():
        opaque = x.device.type == "cpu"  # there Inductor's code for the hash takes ten times as long
    else:
        opaque = is_transforming() or is_watched() or type(x) not in (Tensor, nn.Parameter)
    if opaque:
        drawn: Tensor = _gaussian_like_operator(x.detach(), first, signed(second))
        return drawn
    return _drawn(x, first, second)


def _drawn(x: Tensor, first: Tensor, second: int) -> Tensor:
    if torch.compiler.is_compiling():
        return _at(first, second, torch.arange(x.numel(), device=x.device).view(x.shape), 1.0)
    numbers = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if (triton := _triton_of(numbers)) is not None:
        triton.draw_(numbers, first.to(x.device), signed(second))
        return numbers
    if x.device.type != "cpu":
        return _at(first, second, torch.arange(x.numel(), device=x.device).view(x.shape), 1.0)
    draw_(numbers.view(-1), (int(first), second))
    return numbers


_gaussian_like_operator = torch.library.custom_op("lightning_noisy::gaussian_like", _drawn, mutates_args=())


@_gaussian_like_operator.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, first: Tensor, second: int) -> tuple[Tensor, int]:
    """Each element of the whole batch gets its own number; with several streams, each slice its own stream."""
    size = info.batch_size
    of_x, of_first = in_dims[:2]
    if of_first is None and of_x is not None:
        return _gaussian_like_operator(x.movedim(of_x, 0), first, second), 0
    parts = [x] * size if of_x is None else x.movedim(of_x, 0).unbind()
    streams = [first] * size if of_first is None else first.movedim(of_first, 0).unbind()
    return torch.stack(
        [_gaussian_like_operator(part, each, second) for part, each in zip(parts, streams, strict=True)]
    ), 0


@_gaussian_like_operator.register_fake
def _(x: Tensor, first: Tensor, second: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


@torch.no_grad()
def add_gaussian_(tensor: Tensor, std: float, key: Key, *, start: int = 0) -> Tensor:
    r"""Add :math:`\mathcal N(0, \sigma^2)` noise in place: element ``i`` gets the number at ``start + i``.

    Elements are counted in row-major order, whatever the strides. Numbers are drawn in float32, added in the
    wider of the two dtypes and rounded once. A complex element takes two numbers, and its noise z has
    :math:`E|z|^2 = \sigma^2`. Non-finite elements stay non-finite. This is the readable reference of
    :class:`lightning_noisy.gradient_noise.plan.NoisePlan`, which adds the noise to gradients.

    Args:
        tensor: strided real or complex float tensor of any shape, modified in place.
        std: σ, >= 0. With 0 the tensor doesn't change.
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
        tensor.add_(gaussian_at(key, address, std))
    return tensor
