"""Reproducible Gaussian noise: a stream of numbers per key, independent of the global random state.

The noise of a tensor is cut into chunks of fixed size, and each chunk has a generator of its own, seeded
from the key and the chunk's index. So element ``i`` depends on the key and on ``i`` alone: not on the
tensor's strides, not on what else was drawn, not on which process draws it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["add_gaussian_", "stream_key"]

CHUNK = 1 << 15  # elements: fits the cache, long beside a generator's set-up, and torch doesn't split its addition


def stream_key(*parts: int | str) -> bytes:
    """Hash the parts that name a stream (seed, parameter, step, ...) into its 128-bit key.

    Args:
        parts: integers and strings. Their order counts, and ``("a", "bc")`` differs from ``("ab", "c")``.

    Returns:
        16 bytes.

    >>> stream_key(0, "weight", 1) == stream_key(0, "weight", 1) != stream_key(0, "weight", 2)
    True
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _normal_chunk(key: bytes, index: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first ``size`` standard normal numbers of chunk ``index``."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=key).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    # On the CPU torch draws in blocks of 16, and fewer numbers, or a rest, by another rule.
    rounded = -(-size // 16) * 16
    return torch.empty(rounded, device=device, dtype=dtype).normal_(generator=generator)[:size]


def add_gaussian_(tensor: Tensor, std: float, key: bytes) -> Tensor:
    r"""Add :math:`\mathcal N(0, \sigma^2)` noise in place; element ``i`` of it is a function of ``(key, i)``.

    Elements are counted in row-major order, whatever the strides. Numbers are drawn in float32 (float64
    for double precision) and, for half-precision tensors, added in float32 and rounded once. A complex
    element z gets noise with :math:`E|z|^2 = \sigma^2`. Non-finite elements stay non-finite.

    Args:
        tensor: strided real or complex float tensor of any shape, modified in place.
        std: σ, >= 0. With 0 the tensor is not touched.
        key: 16 bytes from :func:`stream_key`.

    Returns:
        ``tensor``.

    >>> a, b = torch.zeros(4, 3), torch.zeros(3, 4).t()
    >>> torch.equal(add_gaussian_(a, 1.0, stream_key(0)), add_gaussian_(b, 1.0, stream_key(0)))
    True
    """
    if std == 0:
        return tensor
    if tensor.is_complex():
        add_gaussian_(torch.view_as_real(tensor), std * 0.5**0.5, key)
        return tensor
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # A view where the layout allows one; elsewhere the sum is made in a copy and written back.
    flat = tensor.reshape(-1)
    for index, piece in enumerate(flat.split(CHUNK)):
        noise = _normal_chunk(key, index, piece.numel(), device=tensor.device, dtype=dtype)
        if piece.dtype == dtype:
            piece.add_(noise, alpha=std)
        else:
            piece.copy_(noise.mul_(std).add_(piece))
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
    return tensor
