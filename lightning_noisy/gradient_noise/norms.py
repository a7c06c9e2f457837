"""Norms of gradients of any dtype, layout and sharding."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["total_norm", "wide_norm"]

_AT_ONCE = 1 << 16  # elements that are converted to float32 at a time


def total_norm(gradients: list[Tensor], *, unit: float = 1.0) -> Tensor:
    """The 2-norm of all gradients together, whole or sharded: a 0-dimensional float32 tensor, on all ranks.

    Args:
        gradients: of any dtype and layout.
        unit: what to divide elements by before they are squared, > 0.
    """
    groups: dict[object, list[Tensor]] = {}
    norms = []
    for gradient in gradients:
        dense = gradient.coalesce().values() if gradient.is_sparse else gradient
        if unit != 1 or dense.dtype in (torch.float16, torch.bfloat16):  # their norms would overflow or be rounded
            parts = (dense,)
            if not isinstance(dense, DTensor):  # to save memory
                ordered = dense.permute(sorted(range(dense.dim()), key=dense.stride().__getitem__, reverse=True))
                parts = ordered.view(-1).split(_AT_ONCE) if ordered.is_contiguous() else parts
            wide = [p.float() if dense.dtype.itemsize == 2 else p for p in parts]
            norms.append(torch.nn.utils.get_total_norm([torch.nn.utils.get_total_norm([p / unit]) for p in wide]))
            continue
        kind = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else gradient.device
        groups.setdefault(kind, []).append(dense)
    norms += [torch.nn.utils.get_total_norm(group) for group in groups.values()]
    reduced = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not reduced:
        return torch.zeros(())
    norm: Tensor = torch.stack([part.to(reduced[0].device, torch.float32) for part in reduced]).norm()
    return norm


def wide_norm(gradients: list[Tensor]) -> float:
    """The 2-norm as in :func:`total_norm`, also if squares of the elements overflow or underflow float32."""
    norm = float(total_norm(gradients))
    if 1e-15 < norm < 1e18 or not gradients:
        return norm
    largest = 0.0
    for gradient in gradients:
        dense = gradient.coalesce().values() if gradient.is_sparse else gradient
        if not dense.numel():
            continue
        most = torch.nn.utils.get_total_norm([dense], norm_type=float("inf"))
        largest = max(largest, float(most.full_tensor() if isinstance(most, DTensor) else most))
    return float(total_norm(gradients, unit=largest)) * largest if 0 < largest < inf else norm
