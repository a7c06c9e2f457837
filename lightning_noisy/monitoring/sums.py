"""Sums over the elements and the units of activations: what batches add to, and what one reduction pools over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["COLUMNS", "Array", "Pooled", "SiteSums"]

# Of the elements of a site: their number; Σh, Σh², Σφ, Σφ², Σφ′²; how many are saturated, how many of these have h < 0,
# and of how many φ′ is 0; how many are inactive; Σ|Δ| of a noisy activation; how many have a gradient g of φ, and Σg².
COLUMNS = (
    *("count", "x", "xx", "y", "yy", "slopes", "saturated", "left", "hard", "inactive", "magnitude"),
    *("graded", "gradients"),
)
_MAX_PENDING = 1024
Array = NDArray[Any]


@dataclass
class Pooled:
    """Sums over all batches of a window and all ranks, on the CPU.

    Attributes:
        columns: by the names of COLUMNS, float64, shape (sites,).
        dead: share of the units whose slope was 0 in every call, shape (sites,); NaN where units are unknown.
        dormant: share of the units whose mean absolute activation is at most τ times the layer's, shape (sites,).
        extra: sums of other things, by name.
    """

    columns: dict[str, Array]
    dead: Array
    dormant: Array
    extra: dict[str, Tensor] = field(default_factory=dict)


class SiteSums:
    """Sums of several sites, as tensors on one device.

    A unit is one of the same number of features or channels in each call. Ranks that split a layer (tensor parallel)
    have other units; all other ranks have the same.

    Args:
        sites: their number.
        device: where the sums are. They are float64 (float32 on MPS, which has no other).
        levels: whether Σ|φ| of the units is added, for dormant ones; the same on all ranks.
        shards: by how many ranks the layers are split.
        shard: which of them this rank has.
    """

    def __init__(
        self, sites: int, *, device: torch.device, levels: bool = True, shards: int = 1, shard: int = 0
    ) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self._table = torch.zeros(sites, len(COLUMNS), dtype=self.dtype, device=device)
        self._adds_at_once = device.type == "cpu"
        self._pending: list[tuple[int, list[Tensor | float]]] = []  # rows to be added to it elsewhere, many at once
        # Of each unit, shape (units,): 1 if it had a slope somewhere, else 0; and Σ|φ|.
        self._alive: list[Tensor | None] = [None] * sites
        self._levels: list[Tensor | None] = [None] * sites
        self._has_levels = levels
        self._mixed = [False] * sites
        self._shards, self._shard = shards, shard
        self._know(np.zeros((shards, sites), dtype=np.int64))

    def _know(self, sizes: Array) -> None:
        """Keep the numbers of units, shape (shards, sites), and which site each unit of all shards is of."""
        self._sizes = sizes
        self._owner = np.tile(np.arange(sizes.shape[1]), self._shards).repeat(sizes.ravel())

    @property
    def table(self) -> Tensor:
        """The sums of the elements, shape (sites, len(COLUMNS))."""
        pending, self._pending = self._pending, []
        if pending:
            device, rows = self._table.device, [row for _, row in pending]
            numbers = [[0.0 if isinstance(each, Tensor) else each for each in row] for row in rows]
            where = [(i, j) for i, row in enumerate(rows) for j, each in enumerate(row) if isinstance(each, Tensor)]
            added = torch.tensor(numbers, dtype=self.dtype).to(device)
            if where:  # without waiting for the device
                values = torch.stack([rows[i][j].to(added) for i, j in where])  # type: ignore[union-attr]
                added[tuple(torch.tensor(where).T.to(device))] = values
            self._table.index_add_(0, torch.tensor([site for site, _ in pending], device=device), added)
        return self._table

    def reset(self) -> None:
        """Start anew."""
        self._pending.clear()
        self._table.zero_()
        for alive in filter(_is_known, self._alive):
            alive.zero_()
        for levels in filter(_is_known, self._levels):
            levels.zero_()

    def add(
        self, site: int, sums: Mapping[str, Tensor | float], alive: Tensor | None = None, levels: Tensor | None = None
    ) -> None:
        """Add one call, or a part of it.

        Args:
            site: its number.
            sums: some of COLUMNS, 0-dimensional.
            alive: 1 for each unit that has a slope somewhere, else 0, float, shape (units,).
            levels: Σ|φ| of each unit, same shape; only with ``alive``.
        """
        row = [sums.get(name, 0.0) for name in COLUMNS]
        if self._adds_at_once:
            self._table.numpy()[site] += row
        else:
            self._pending.append((site, row))
        if len(self._pending) >= _MAX_PENDING:
            _ = self.table
        if alive is None:
            return
        known = self._alive[site]
        if known is None:
            self._alive[site] = alive.clone()
        elif known.shape == alive.shape:
            torch.maximum(known, alive.to(known.dtype), out=known)
        else:
            self._mixed[site] = True
            return
        if levels is not None:
            before = self._levels[site]
            self._levels[site] = levels.to(self.dtype) if before is None else before.add_(levels)

    def pooled(
        self,
        reduce: Callable[[Tensor], Tensor] | None = None,
        extra: Mapping[str, Tensor] | None = None,
        *,
        tau: float = 0.025,
    ) -> Pooled:
        """The sums of all ranks, by one call of ``reduce`` and one transfer to the CPU.

        Whenever a rank has met a site first, all ranks learn its number of units by one call more.

        Args:
            reduce: adds up a 1-dimensional tensor over the ranks; None for one process.
            extra: other tensors to be added up, with the same names and shapes on all ranks.
            tau: τ of dormant units, >= 0.
        """
        extra = extra or {}
        own = [
            -1 if mixed else 0 if alive is None else len(alive)
            for alive, mixed in zip(self._alive, self._mixed, strict=True)
        ]
        sizes = np.array([own])  # of one process
        while True:
            if reduce is None and not np.array_equal(sizes.clip(0), self._sizes):
                self._know(sizes.clip(0))
            parts = [self.table.flatten(), self._unit_part(own)]
            parts += [each.detach().to(self._table).flatten() for each in extra.values()]
            if reduce is not None:
                parts.append(self._header(own))
            flat = torch.cat([each.to(self._table.device) for each in parts])
            flat = (flat if reduce is None else reduce(flat)).cpu().double()
            table, units, *others = flat.split([each.numel() for each in parts])
            if reduce is None:
                break
            sizes = _agreed(others.pop().view(3, self._shards, -1).numpy())
            if np.array_equal(sizes.clip(0), self._sizes):
                break
            self._know(sizes.clip(0))
        dead, dormant = self._shares(units.numpy(), sizes, tau)
        named = zip(extra, others, strict=True)
        return Pooled(
            dict(zip(COLUMNS, table.view(-1, len(COLUMNS)).numpy().T, strict=True)),
            dead,
            dormant,
            {name: value.view(extra[name].shape) for name, value in named},
        )

    def _header(self, own: Sequence[int]) -> Tensor:
        """How many ranks know a number of units n, Σn and Σn²; shape (3, shards, sites), flat."""
        header = torch.zeros(3, self._shards, len(own), dtype=self.dtype)
        header[:, self._shard] = torch.tensor([[n != 0, n, n * n] for n in own], dtype=self.dtype).view(-1, 3).T
        return header.flatten()

    def _unit_part(self, own: Sequence[int]) -> Tensor:
        """Which of this rank's units have a slope, and Σ|φ| if asked for, between zeros for those of other shards.

        Shape (1 or 2, units of all shards), flat.
        """
        parts = []
        for known in (self._alive, self._levels) if self._has_levels else (self._alive,):
            for shard, sizes in enumerate(self._sizes.tolist()):
                is_own = shard == self._shard
                for size, mine, each in zip(sizes, own, known, strict=True):
                    if not is_own or size != mine or each is None:
                        each = torch.zeros(size, device=self._table.device)
                    parts.append(each)
        return torch.cat(parts).to(self.dtype) if parts else torch.zeros(0, dtype=self.dtype)

    def _shares(self, units: Array, sizes: Array, tau: float) -> tuple[Array, Array]:
        """The shares of dead and of dormant units, of all shards."""
        owner, sites = self._owner, sizes.shape[1]
        alive, *levels = units.reshape(1 + self._has_levels, len(owner))
        number = np.where((sizes > 0).all(0), self._sizes.sum(0), np.nan)
        dead = np.bincount(owner, alive == 0, sites) / number
        if not levels:
            return dead, np.full(sites, np.nan)
        level = np.bincount(owner, levels[0], sites) / number
        return dead, np.bincount(owner, levels[0] <= tau * level[owner], sites) / number


def _is_known(each: Tensor | None) -> TypeGuard[Tensor]:
    return each is not None


def _agreed(header: Array) -> Array:
    """The numbers of units, shape (shards, sites): 0 if nobody has called the site, -1 if ranks disagree."""
    known, total, squares = header
    size = (total / known.clip(1)).round().astype(np.int64)
    return np.where((known * squares == total * total) & (total >= 0), size, -1)
