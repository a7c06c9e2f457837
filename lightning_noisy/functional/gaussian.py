"""Reproducible Gaussian noise: an endless vector of numbers per key, any part of which can be drawn alone.

The vector is cut into chunks of fixed size, and each chunk has a generator of its own, seeded from the key and
the chunk's index. So the number at an address is a function of the key and the address: not of what else is
drawn, by which process or thread, nor of the global random state. On another kind of device the numbers are
others, since torch's generators are, and processors with other vector instructions differ in the last bits.

torch's CPU generator takes 32 bits of a seed, so that now and then two of a long training's many chunks, mostly
of different steps, are the same: among n chunks about n² / 2³³ pairs.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["add_gaussian_", "chunk_size", "draw_chunk", "gaussian", "stream_key"]


def stream_key(*parts: int | str) -> bytes:
    """Hash the parts that name a stream (seed, optimizer, step, ...) into its 128-bit key.

    Args:
        parts: integers and strings. Their order counts, and ``("a", "bc")`` differs from ``("ab", "c")``.

    Returns:
        16 bytes.

    >>> stream_key(0, "weight", 1) == stream_key(0, "weight", 1) != stream_key(0, "weight", 2)
    True
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def chunk_size(device: torch.device) -> int:
    """Elements of a chunk, a multiple of 16.

    On the CPU a chunk fits the cache, takes long beside setting up its generator, and is not split among
    threads by torch; elsewhere it is large enough to occupy the device, in 16 MiB.
    """
    return 1 << (15 if device.type == "cpu" else 22)


def draw_chunk(buffer: Tensor, key: bytes, index: int, stop: int, generator: torch.Generator) -> None:
    """Write the first ``stop`` numbers of a chunk, or more of them, into ``buffer``.

    Args:
        buffer: float32 tensor, shape (chunk_size,).
        key: 16 bytes from :func:`stream_key`.
        index: which chunk, >= 0.
        stop: how many numbers are needed, <= chunk_size.
        generator: of the buffer's device; it is seeded here.
    """
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=key).digest()
    generator.manual_seed(int.from_bytes(digest, "little"))
    # torch's CPU generator draws in blocks of 16, so that a prefix of whole blocks is the same however long it is;
    # fewer numbers, or a rest, it draws by another rule. On other devices only equal lengths give equal numbers.
    if buffer.device.type == "cpu":
        buffer = buffer[: -(-stop // 16) * 16]
    buffer.normal_(generator=generator)


def gaussian(key: bytes, start: int, stop: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The standard normal numbers at addresses ``start`` to ``stop`` of a key's vector.

    Args:
        key: 16 bytes from :func:`stream_key`.
        start: first address, >= 0.
        stop: one past the last address.
        device: where to draw them.

    Returns:
        Float32 tensor, shape (stop - start,).

    >>> whole = gaussian(stream_key(0), 0, 100_000)
    >>> bool((gaussian(stream_key(0), 40_000, 40_003) == whole[40_000:40_003]).all())
    True
    """
    device = torch.device(device)
    size, generator = chunk_size(device), torch.Generator(device)
    numbers = torch.empty(max(stop - start, 0), dtype=torch.float32, device=device)
    buffer = torch.empty(size, dtype=torch.float32, device=device)
    for index in range(start // size, -(-stop // size) if stop > start else 0):
        first, last = max(start, index * size), min(stop, (index + 1) * size)
        draw_chunk(buffer, key, index, last - index * size, generator)
        numbers[first - start : last - start] = buffer[first - index * size : last - index * size]
    return numbers


@torch.no_grad()
def add_gaussian_(tensor: Tensor, std: float, key: bytes, *, start: int = 0) -> Tensor:
    r"""Add :math:`\mathcal N(0, \sigma^2)` noise in place: element ``i`` gets the number at ``start + i``.

    Elements are counted in row-major order, whatever the strides. Numbers are drawn in float32, added in the
    wider of the two dtypes and rounded once. A complex element z takes two numbers, and gets noise with
    :math:`E|z|^2 = \sigma^2`. Non-finite elements stay non-finite.

    Args:
        tensor: strided real or complex float tensor of any shape, modified in place.
        std: σ, >= 0. With 0 the tensor is not touched.
        key: 16 bytes from :func:`stream_key`.
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
        noise = gaussian(key, start, start + tensor.numel(), device=tensor.device)
        tensor.add_(noise.view(tensor.shape), alpha=std)
    return tensor
