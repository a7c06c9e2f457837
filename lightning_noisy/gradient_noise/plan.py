"""Which random numbers each gradient gets, and adding them fast.

Each parameter has its own random numbers, keyed by its name. Any shard of a gradient knows its position in the full
one, and draws only its share. The compiled kernel adds noise to float32 gradients on the CPU in place; for others the
numbers are drawn in batches that fit the cache, for many small gradients at once.
"""

from __future__ import annotations

import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor

from lightning_noisy._torch_internals import add_each, has_values, version
from lightning_noisy.gradient_noise.gradients import Parameter, blocks, checked_gradient, local, padding_row, pointer
from lightning_noisy.kernels.backend import is_plain
from lightning_noisy.kernels.gaussian import AddressRanges, adds_to, signed, stream_key, substream

__all__ = ["Mark", "NoisePlan", "unchanged"]


_MOST_ROWS = 1 << 16  # of blocks whose noise is added in one call

# A parameter, its gradient, and how often the gradient had been changed in place.
Mark = tuple[Parameter, weakref.ref[Tensor], int]


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter, the index of its group, the key offset of its name, and the address of its first element."""

    parameter: Parameter
    group: int
    offset: int
    start: int


class NoisePlan:
    """How the gradients of some parameters get their noise; made once, used at every step.

    Args:
        parameters: the parameters by name.
        groups: the index of each parameter's group, whose σ it gets; by default 0.
        shards: for parameters that are flat shards, the index of the first element in the full parameter.
        padding: for weights of embeddings with a padding row, the index of its first element in the full weight, and
            its length: it gets no noise as long as its gradient is zero.

    Attributes:
        parameters: the parameters, by group.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        groups: list[int] | None = None,
        shards: Mapping[Any, int] | None = None,
        padding: Mapping[Any, tuple[int, int]] | None = None,
    ) -> None:
        places = [
            _Place(p, group, signed(substream((0, 0), name)[0]), (shards or {}).get(p, 0))
            for (name, p), group in zip(parameters.items(), groups or [0] * len(parameters), strict=True)
        ]
        self._places = sorted(places, key=lambda place: place.group)
        indices = [place.group for place in self._places]
        self._spans = {group: slice(bisect_left(indices, group), bisect_right(indices, group)) for group in {*indices}}
        rows = padding or {}
        self._padded = [(p.parameter, p.start, *rows[p.parameter]) for p in self._places if p.parameter in rows]
        self.parameters = [place.parameter for place in self._places]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        starts, offsets = ([getattr(place, name) for place in self._places] for name in ("start", "offset"))
        self._runs = AddressRanges(offsets, starts, self._sizes)

    def gradients(self, scales: list[float]) -> list[Tensor]:
        """The gradients that exist, of the groups whose scale is not 0."""
        return [g for place in self._places if (g := place.parameter.grad) is not None and scales[place.group]]

    def marks(self) -> list[Mark]:
        """What shows later whether the gradients have changed: for up to 16, since a backward pass changes all."""
        sample: list[Parameter] = [p for p in self.parameters[:: 1 + len(self.parameters) // 16] if p.grad is not None]
        sample = sample or [p for p in self.parameters if p.grad is not None][:1]
        return [(p, weakref.ref(g), version(g)) for p in sample if (g := p.grad) is not None]

    def noise_norm(self, stds: list[float]) -> float:
        """Root of the expected squared norm of the noise on the gradients that exist."""
        total = 0.0
        for place in self._places:
            gradient = place.parameter.grad
            if gradient is not None:
                if gradient.is_sparse:
                    gradient = gradient.coalesce().values()
                total += stds[place.group] ** 2 * gradient.numel()
        return sqrt(total)

    @torch.no_grad()
    def add_noise(self, stds: list[float], stream: tuple[int | str, ...], step: int) -> bool:
        """Add the noise of a step to every gradient that exists; return whether there was any.

        Args:
            stds: by group, the standard deviation of a real element, or the root of E|z|² of a complex one.
            stream: keys the noise, together with the parameter's name and the step.
            step: t.

        Raises:
            TypeError: if noise can't be added to a gradient; none has received any then.
        """
        first, second = stream_key(*stream, step)
        gradients = [parameter.grad for parameter in self.parameters]
        like, pointers = self._pointers(gradients)
        others = []
        taken = set(pointers)
        if 0 in pointers or len(taken) < len(pointers):
            # Gradients that the kernel can't take, and shared ones, of which each parameter gets its own.
            seen = {0}
            for i, (place, at) in enumerate(zip(self._places, pointers, strict=True)):
                if at in seen:
                    pointers[i] = 0
                    others += [place] * (gradients[i] is not None)
                seen.add(at)
        alike: dict[tuple[torch.device, float], list[_Place]] = {}
        for place in others:
            if not stds[place.group]:
                continue
            gradient = checked_gradient(place.parameter)
            if not has_values(gradient):
                continue
            if gradient.layout == torch.strided and (address := local(gradient).data_ptr()):
                if address in taken:
                    gradient = gradient.clone()
                    place.parameter.grad = gradient  # type: ignore[misc]  # never a fragment
                taken.add(address)
            std = stds[place.group] * (sqrt(0.5) if gradient.is_complex() else 1.0)
            alike.setdefault((gradient.device, std), []).append(place)
        rows = [row for padded in self._padded for row in padding_row(*padded)]
        before = [row.clone() for row in rows]
        if any(pointers):
            runs, where = self._runs.moved(first), torch.frombuffer(array("q", pointers), dtype=torch.int64)
            for group, span in self._spans.items():
                if stds[group]:
                    runs[span].add_at(where[span], second, stds[group], cast(Tensor, like))
                    changed = cast(list[Tensor], gradients[span])
                    if 0 in pointers[span]:
                        changed = list(compress(changed, pointers[span]))
                    torch.autograd.graph.increment_version(changed)
        for (device, std), group_of_places in alike.items():
            batch = _Batch(device, std, second)
            for place in group_of_places:
                for tensor, starts in blocks(place.parameter, place.start):
                    batch.add(tensor, starts, first + place.offset)
            batch.flush()
        for row, was in zip(rows, before, strict=True):
            row.copy_(torch.where(was.any(), row, was))
        return any(gradient is not None for gradient in gradients)

    def _pointers(self, gradients: list[Tensor | None]) -> tuple[Tensor | None, list[int]]:
        """The first gradient that a kernel takes, and the addresses of all that go with it in one call, else 0."""
        plain = (g for g in gradients if g is not None and g.dtype is torch.float32 and is_plain(g) and adds_to(g))
        like = next(plain, None)
        if like is None:
            return None, [0] * len(gradients)
        # `pointer`, inlined: with many small gradients, a call for each would take a tenth of the time.
        kind = torch.FloatTensor if like.is_cpu else torch.cuda.FloatTensor  # type: ignore[attr-defined]  # dense float32
        one_device = like.is_cpu or len({g.device for g in gradients if g is not None}) == 1
        return like, [
            g.data_ptr()
            if type(g) is Tensor
            and isinstance(g, kind)
            and g.numel() == size
            and g.is_contiguous()
            and not g.is_neg()
            and (one_device or g.device == like.device)
            else 0
            for g, size in zip(gradients, self._sizes, strict=True)
        ]


def unchanged(marks: list[Mark]) -> bool:
    """Whether there are marks, and no marked gradient has changed."""
    return bool(marks) and all(
        (gradient := then()) is not None and parameter.grad is gradient and version(gradient) == count
        for parameter, then, count in marks
    )


class _Batch:
    """Adds noise of one σ on one device, with few calls: collects blocks, and draws the numbers of all at once."""

    def __init__(self, device: torch.device, std: float, second: int) -> None:
        self._device = device
        self._std = std
        self._second = second
        self._most = _most_at_once(device)
        self._used = 0
        self._collected = 0
        self._in_place: dict[torch.dtype, list[tuple[Tensor, Tensor, AddressRanges]]] = {}
        self._tensors: list[Tensor] = []
        self._runs: list[tuple[int, int, int]] = []

    def add(self, tensor: Tensor, starts: list[int] | Tensor, first: int) -> None:
        """Process a block: a tensor, and the addresses at which its rows, of equal length, start."""
        first, rows, width = signed(first % 2**64), len(starts), tensor.numel() // len(starts)
        if address := pointer(tensor):
            pointers = address + tensor.itemsize * width * torch.arange(rows, device="cpu")
            self._in_place.setdefault(tensor.dtype, []).append((tensor, pointers, _rows(first, starts, width)))
            self._collected += rows
            if self._collected >= _MOST_ROWS:
                self._add_in_place()
        elif rows > 1:
            noise = _rows(first, starts, width).draw(self._second, self._std, self._device)
            with torch.inference_mode():
                tensor.add_(noise.view(tensor.shape))
        elif tensor.numel() <= self._most:
            if self._used + tensor.numel() > self._most:
                self.flush()
            self._tensors.append(tensor)
            self._runs.append((first, int(starts[0]), width))
            self._used += tensor.numel()
        else:
            start = int(starts[0])
            for part in tensor.view(-1).split(self._most):
                self.add(part, [start], first)
                start += part.numel()

    def flush(self) -> None:
        """Add the noise to the collected blocks."""
        if self._tensors:
            runs = AddressRanges(*map(list, zip(*self._runs, strict=True)))
            numbers = runs.draw(self._second, self._std, self._device)
            parts = numbers.split([tensor.numel() for tensor in self._tensors])
            noise = [part.view(tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True)]
            with torch.inference_mode():  # avoids autograd's overhead for each tensor
                add_each(self._tensors, noise)
        self._used, self._tensors, self._runs = 0, [], []
        self._add_in_place()

    def _add_in_place(self) -> None:
        """Add the noise to the blocks in the memory of which a kernel writes: those of a dtype in one launch."""
        for blocks_of_dtype in self._in_place.values():
            tensors, pointers, runs = map(list, zip(*blocks_of_dtype, strict=True))
            rows = [torch.cat([getattr(run, name) for run in runs]) for name in ("firsts", "starts", "counts")]
            AddressRanges(*rows).add_at(torch.cat(pointers), self._second, self._std, tensors[0])
            torch.autograd.graph.increment_version(tensors)
        self._in_place.clear()
        self._collected = 0


def _rows(first: int, starts: list[int] | Tensor, width: int) -> AddressRanges:
    firsts, widths = (torch.full((len(starts),), number, device="cpu") for number in (first, width))
    return AddressRanges(firsts, starts, widths)


def _most_at_once(device: torch.device) -> int:
    """The most numbers to draw at once: 0.5 MiB, which fits a CPU's cache, and elsewhere 4 MiB."""
    return 1 << (17 if device.type == "cpu" else 20)
