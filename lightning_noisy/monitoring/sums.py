"""Sums over the elements and the units of activations: what batches add to, and what one reduction pools over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Pooled", "SiteSums"]

# Of the elements of a site: their number; Σh, Σh², Σφ, Σφ², Σφ′²; how many are saturated, how many of these have h < 0,
# and of how many φ′ is 0; how many are inactive; Σ|Δ| of a noisy activation; how many have a gradient g of φ, and Σg².
COLUMNS = (
    *("count", "x", "xx", "y", "yy", "slopes", "saturated", "left", "hard", "inactive", "magnitude"),
    *("graded", "gradients"),
)


@dataclass
class Pooled:
    """Sums over all batches of a window and all ranks, on the CPU.

    Attributes:
        columns: by the names of COLUMNS, float64, shape (sites,).
        dead: share of the units whose slope was 0 in every call, shape (sites,); NaN where units are unknown.
        dormant: share of the units whose mean absolute activation is at most τ times the layer's, shape (sites,).
        extra: sums of other things, by name.
    """

    columns: dict[str, Tensor]
    dead: Tensor
    dormant: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class SiteSums:
    """Sums of several sites, as tensors on one device.

    A unit is one of the same number of features or channels in each call. Ranks that split a layer (tensor parallel)
    have other units; all other ranks have the same.

    Args:
        sites: their number.
        device: where the sums are. They are float64 (float32 on MPS, which has no other).
        shards: by how many ranks the layers are split.
        shard: which of them this rank has.
    """

    def __init__(self, sites: int, *, device: torch.device, shards: int = 1, shard: int = 0) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.table = torch.zeros(sites, len(COLUMNS), dtype=self.dtype, device=device)
        # Of each unit: in how many calls it had a slope, and Σ|φ|, shape (2, units).
        self.units: list[Tensor | None] = [None] * sites
        self._mixed = [False] * sites
        self._shards, self._shard = shards, shard
        self._sizes = torch.zeros(shards, sites, dtype=torch.long)  # units of each site, as all ranks know them

    def reset(self) -> None:
        """Start anew."""
        self.table.zero_()
        self.units = [None if each is None else torch.zeros_like(each) for each in self.units]

    def add(self, site: int, sums: Mapping[str, Tensor | float], units: Tensor | None = None) -> None:
        """Add one call, or a part of it.

        Args:
            site: its number.
            sums: some of COLUMNS, 0-dimensional.
            units: shape (2, units), see above.
        """
        row = [sums.get(name, 0.0) for name in COLUMNS]
        if self.table.device.type == "cpu":
            self.table[site] += torch.tensor([float(each) for each in row], dtype=self.dtype)
        else:  # without waiting for the device
            scalars = [torch.as_tensor(each, dtype=self.dtype, device=self.table.device) for each in row]
            self.table[site] += torch.stack(scalars)
        known = self.units[site]
        if units is None:
            return
        if known is None:
            self.units[site] = units.to(self.dtype)
        elif known.shape == units.shape:
            known += units
        else:
            self._mixed[site] = True

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
        sizes_here = (0 if each is None else each.shape[1] for each in self.units)
        own = torch.tensor(
            [-1 if mixed else size for size, mixed in zip(sizes_here, self._mixed, strict=True)], dtype=torch.long
        )
        if reduce is None:
            self._sizes = own.clamp_min(0)[None]
        while True:
            parts = [self._header(own), self.table.flatten(), self._unit_part(own)]
            parts += [each.detach().to(self.table).flatten() for each in extra.values()]
            flat = torch.cat([each.to(self.table.device) for each in parts])
            flat = (flat if reduce is None else reduce(flat)).cpu().double()
            header, table, units, *others = flat.split([each.numel() for each in parts])
            sizes = _agreed(header.view(3, self._shards, -1))
            if torch.equal(sizes.clamp_min(0), self._sizes):
                break
            self._sizes = sizes.clamp_min(0)
        dead, dormant = self._shares(units, sizes, tau)
        named = zip(extra, others, strict=True)
        return Pooled(
            dict(zip(COLUMNS, table.view(-1, len(COLUMNS)).T, strict=True)),
            dead,
            dormant,
            {name: value.view(extra[name].shape) for name, value in named},
        )

    def _header(self, own: Tensor) -> Tensor:
        """How many ranks know a number of units n, Σn and Σn²; shape (3, shards, sites), flat."""
        header = torch.zeros(3, self._shards, len(own), dtype=self.dtype)
        header[:, self._shard] = torch.stack([own != 0, own, own * own]).to(self.dtype)
        return header.flatten()

    def _unit_part(self, own: Tensor) -> Tensor:
        """The sums of this rank's units between zeros for those of other shards, shape (2, units of all shards)."""
        parts = []
        for shard, sizes in enumerate(self._sizes.tolist()):
            for size, mine, units in zip(sizes, own.tolist(), self.units, strict=True):
                is_own = shard == self._shard and units is not None and size == mine
                parts.append(units if is_own else torch.zeros(2, size, dtype=self.dtype, device=self.table.device))
        return torch.cat(parts, 1).flatten() if parts else torch.zeros(0, dtype=self.dtype)  # type: ignore[arg-type]

    def _shares(self, units: Tensor, sizes: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """The shares of dead and of dormant units, of all shards."""
        alive, magnitude = units.view(2, -1)
        sites = len(self.units)
        owner = torch.arange(sites).repeat(self._shards).repeat_interleave(self._sizes.flatten())

        def per_site(values: Tensor) -> Tensor:
            return torch.zeros(sites, dtype=torch.float64).index_add_(0, owner, values)

        number = per_site(torch.ones_like(alive)).where((sizes > 0).all(0), torch.nan)
        level = per_site(magnitude) / number
        is_dormant = magnitude <= tau * level[owner]
        return per_site((alive == 0).double()) / number, per_site(is_dormant.double()) / number


def _agreed(header: Tensor) -> Tensor:
    """The numbers of units, shape (shards, sites): 0 if nobody has called the site, -1 if ranks disagree."""
    known, total, squares = header
    size = (total / known.clamp_min(1)).round().long()
    same = (known * squares == total * total) & (total >= 0)
    return torch.where(same, size, -1)
