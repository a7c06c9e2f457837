"""Which numbers of the noise each gradient gets, and adding them fast.

Each parameter has numbers of its own, keyed by its name. Any shard of a gradient knows where in the whole it belongs,
and draws just its share. Numbers are drawn in batches that fit the cache, for many small gradients at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_noisy.functional.gaussian import Key, Sampler, erfinv_at, signed, stream_key, substream

__all__ = ["NoisePlan", "total_norm"]

_MOST_AT_ONCE = 1 << 16  # elements of a block that is not contiguous
_SMALL = 1 << 13  # elements; below, setting up the counters costs more than drawing, and they are kept:
_MOST_KEPT = 1 << 22  # for so many elements, in 16 MiB


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter, the index of its group, what its name adds to a key, and the address of its first element."""

    parameter: torch.nn.Parameter
    group: int
    offset: int
    start: int


@dataclass(frozen=True, slots=True)
class _Block:
    """A tensor whose elements have consecutive addresses in row-major order.

    Or only those of a row have: then ``start`` has the first address of each row, and ``even`` says whether all
    rows begin at an even address and have an even number of elements.
    """

    tensor: Tensor
    start: int | Tensor
    even: bool = False


class NoisePlan:
    """How the gradients of some parameters get their noise; made once, used at every step.

    Args:
        parameters: the parameters by name.
        groups: the index of each parameter's group, whose σ it gets; by default 0.
        shards: for parameters that are flat shards, the index of the first element in the whole.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        groups: list[int] | None = None,
        shards: dict[torch.nn.Parameter, int] | None = None,
    ) -> None:
        self._samplers: dict[torch.device, Sampler] = {}
        places = [
            _Place(p, group, substream((0, 0), name)[0], (shards or {}).get(p, 0))
            for (name, p), group in zip(parameters.items(), groups or [0] * len(parameters), strict=True)
        ]
        self._places = sorted(places, key=lambda place: place.group)
        self._packs: list[_Pack] = []
        self._single: list[_Place] = []
        kept = 0
        open_packs: dict[torch.device, _Pack] = {}
        for place in self._places:
            p = place.parameter
            fits = p.numel() < _SMALL and kept + p.numel() <= _MOST_KEPT
            if not fits or type(p.data) is not Tensor or p.is_complex() or place.start:
                self._single.append(place)
                continue
            kept += p.numel()
            pack = open_packs.get(p.device)
            if pack is None or not pack.take(place):
                pack = open_packs[p.device] = _Pack(self._sampler(p.device), place)
                self._packs.append(pack)
        for pack in self._packs:
            pack.close()

    def gradients(self, scales: list[float]) -> list[Tensor]:
        """The gradients that are there, of the groups whose scale is not 0."""
        return [g for place in self._places if (g := place.parameter.grad) is not None and scales[place.group]]

    def noise_norm(self, stds: list[float]) -> float:
        """Root of the expected squared norm of the noise on the gradients that are there."""
        total = 0.0
        for place in self._places:
            gradient = place.parameter.grad
            if gradient is not None:
                if gradient.is_sparse:
                    gradient = gradient.coalesce().values()
                total += stds[place.group] ** 2 * gradient.numel()
        return sqrt(total)

    def is_stale(self) -> bool:
        """Whether parameters have other sizes, or are elsewhere, than when the plan was made."""
        return any(pack.is_stale() for pack in self._packs)

    @torch.no_grad()
    def add_noise(self, stds: list[float], stream: tuple[int | str, ...], step: int) -> bool:
        """Add the noise of a step to every gradient that is there; tell whether there was any.

        Args:
            stds: by group, the standard deviation of a real element, and root of E|z|² of a complex one.
            stream: what the noise is keyed by beside the parameter's name and the step.
            step: t.

        Raises:
            TypeError: if a gradient is of a kind that noise can't be added to; none has got any then.
        """
        key, stds = stream_key(*stream, step), [std * sqrt(2) for std in stds]  # for numbers of variance 1/2
        packed = [(pack, *pack.gradients()) for pack in self._packs]
        places = [place for place in self._single if place.parameter.grad is not None]
        places += [place for _, _, others in packed for place in others]
        alike: dict[tuple[torch.device, float], list[_Place]] = {}
        for place in places:
            gradient = _checked_gradient(place.parameter)
            std = stds[place.group] * (sqrt(0.5) if gradient.is_complex() else 1.0)
            alike.setdefault((gradient.device, std), []).append(place)
        for pack, gradients, _ in packed:
            pack.add_noise(gradients, stds, key)
        for (device, std), group in alike.items():
            batch = _Batch(self._sampler(device), std, key)
            for place in group if std else ():
                for block in _blocks(place.parameter, place.start):
                    batch.add(block, place.offset)
            batch.flush()
        return bool(places) or any(g is not None for _, gradients, _ in packed for g in gradients)

    def _sampler(self, device: torch.device) -> Sampler:
        if device not in self._samplers:
            self._samplers[device] = Sampler(device)
        return self._samplers[device]


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, whole ones and shards: a 0-dimensional float32 tensor, on all ranks."""
    groups: dict[object, list[Tensor]] = {}
    norms = []
    for gradient in gradients:
        dense = gradient.coalesce().values() if gradient.is_sparse else gradient
        if dense.dtype in (torch.float16, torch.bfloat16):  # whose norms would overflow or be rounded
            whole = isinstance(dense, DTensor) or not dense.is_contiguous()
            parts = [dense] if whole else dense.view(-1).split(_MOST_AT_ONCE)  # little memory
            norms.append(torch.nn.utils.get_total_norm([torch.nn.utils.get_total_norm([p.float()]) for p in parts]))
            continue
        kind = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else gradient.device
        groups.setdefault(kind, []).append(dense)
    norms += [torch.nn.utils.get_total_norm(group) for group in groups.values()]
    reduced = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not reduced:
        return torch.zeros(())
    norm: Tensor = torch.stack([part.to(reduced[0].device, torch.float32) for part in reduced]).norm()
    return norm


class _Pack:
    """Small parameters of one device, drawn at once: their counters and the numbers' views are kept."""

    def __init__(self, sampler: Sampler, first: _Place) -> None:
        self._sampler = sampler
        self._places: list[_Place] = []
        self._pairs = 0
        self.take(first)

    def take(self, place: _Place) -> bool:
        """Add a parameter if there is room for it."""
        pairs = _pairs(place.parameter)
        if self._pairs + pairs > self._sampler.pairs:
            return False
        self._places.append(place)
        self._pairs += pairs
        return True

    def close(self) -> None:
        """Prepare for :meth:`add_noise`."""
        groups = [place.group for place in self._places]
        self._runs = {group: slice(groups.index(group), len(groups) - groups[::-1].index(group)) for group in groups}
        self._parameters = [place.parameter for place in self._places]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._views, counters, used = [], [], 0
        for place, size in zip(self._places, self._sizes, strict=True):
            pairs = _pairs(place.parameter)
            counters.append(self._sampler.counters_of(0, pairs, place.offset))
            self._views.append(self._sampler.numbers(size, 2 * used).view(place.parameter.shape))
            used += pairs
        self._counters = torch.cat(counters)

    def is_stale(self) -> bool:
        """Whether the parameters have other sizes, or are elsewhere, than the views of their numbers."""
        moved = self._parameters[0].device != self._counters.device
        return moved or [parameter.numel() for parameter in self._parameters] != self._sizes

    def gradients(self) -> tuple[list[Tensor | None], list[_Place]]:
        """The parameters' gradients, and the places of those that need another way, for which there is None."""
        gradients = [parameter.grad for parameter in self._parameters]
        others = []
        if {None if g is None else g.layout for g in gradients} - {None, torch.strided}:
            for i, place in enumerate(self._places):
                gradient = gradients[i]
                if gradient is not None and gradient.layout is not torch.strided:
                    gradients[i] = None
                    others.append(place)
        return gradients, others

    def add_noise(self, gradients: list[Tensor | None], stds: list[float], key: Key) -> None:
        """Add a step's noise to the gradients that are not None."""
        everything = slice(0, len(gradients))
        alike = len({stds[group] for group in self._runs}) == 1
        runs = [(everything, stds[next(iter(self._runs))])] if alike else [(r, stds[g]) for g, r in self._runs.items()]
        if not any(std for _, std in runs) or all(g is None for g in gradients):
            return
        torch.add(self._counters, signed(key[0]), out=self._sampler.counters[: self._pairs])
        self._sampler.draw(self._pairs, key[1])
        for run, std in runs:
            targets, views = gradients[run], self._views[run]
            present = [g for g in targets if g is not None]
            if len(present) < len(targets):
                views = [view for g, view in zip(targets, views, strict=True) if g is not None]
            if present and std:
                _add(present, views, std)


def _add(tensors: list[Tensor], noise: list[Tensor], std: float) -> None:
    with torch.inference_mode():  # spares every tensor autograd's part
        torch._foreach_add_(tensors, noise, alpha=std)


def _pairs(parameter: Tensor) -> int:
    return (parameter.numel() + 1) // 2


class _Batch:
    """Collects blocks of one device and σ until a sampler is full, and then draws the numbers of all."""

    def __init__(self, sampler: Sampler, std: float, key: Key) -> None:
        self._sampler = sampler
        self._std = std
        self._key = key
        self._used = 0  # pairs
        self._tensors: list[Tensor] = []
        self._views: list[Tensor] = []

    def add(self, block: _Block, offset: int) -> None:
        """Take a block in, and add the noise to what there is no more room for."""
        tensor, start = block.tensor, block.start
        if isinstance(start, Tensor):
            width = tensor.numel() // len(start)
            if block.even:
                self._put(tensor, start.view(-1, 1) // 2, width // 2, 0, offset)
            else:
                address = start.view(-1, 1) + torch.arange(width, device=start.device)
                key = ((self._key[0] + offset) % 2**64, self._key[1])
                tensor.add_(erfinv_at(key, address).view(tensor.shape), alpha=self._std)
            return
        if not tensor.is_contiguous():
            self._put(tensor, start // 2, -(-(start % 2 + tensor.numel()) // 2), start % 2, offset)
            return
        tensor = tensor.view(-1)
        while tensor.numel():
            if self._used == self._sampler.pairs:
                self.flush()
            skip = start % 2
            room = 2 * (self._sampler.pairs - self._used) - skip
            part, tensor = tensor[:room], tensor[room:]
            self._put(part, start // 2, -(-(skip + part.numel()) // 2), skip, offset)
            start += part.numel()

    def _put(self, tensor: Tensor, first: int | Tensor, pairs: int, skip: int, offset: int) -> None:
        shape = (pairs,) if isinstance(first, int) else (len(first), pairs)
        if self._used + prod(shape) > self._sampler.pairs:
            self.flush()
        end = self._used + prod(shape)
        out = self._sampler.counters[self._used : end].view(shape)
        self._sampler.counters_of(first, pairs, self._key[0] + offset, out=out)
        self._tensors.append(tensor)
        self._views.append(self._sampler.numbers(tensor.numel(), 2 * self._used + skip).view(tensor.shape))
        self._used = end

    def flush(self) -> None:
        """Add the noise to what has been collected."""
        if self._tensors:
            self._sampler.draw(self._used, self._key[1])
            _add(self._tensors, self._views, self._std)
        self._used, self._tensors, self._views = 0, [], []


def _checked_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient, if it is of a kind that noise can be added to; sparse ones coalesced."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor):
        if any(isinstance(placement, Partial) for placement in gradient.placements):
            raise TypeError(
                f"A gradient of shape {tuple(gradient.shape)} is a partial sum ({gradient.placements}): every summand"
                " would get the noise. Reduce it before the optimizer's step."
            )
    elif gradient.layout == torch.sparse_coo:
        if gradient.sparse_dim() != 1:
            raise TypeError(f"Noise on a sparse gradient needs one sparse dimension, got {gradient.sparse_dim()}.")
        parameter.grad = gradient = gradient.coalesce()
    elif gradient.layout != torch.strided:
        raise TypeError(f"Noise needs a dense or sparse COO gradient, got one of layout {gradient.layout}.")
    return gradient


def _blocks(parameter: torch.nn.Parameter, start: int) -> Iterator[_Block]:
    """The parts of a parameter's gradient, as plain dense real tensors, and where their numbers are."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor):
        _, first = compute_local_shape_and_global_offset(gradient.shape, gradient.device_mesh, gradient.placements)
        local, whole, first = gradient.to_local(), tuple(gradient.shape), tuple(first)
        if local.is_complex():
            local, whole, first = torch.view_as_real(local), (*whole, 2), (*first, 0)
        strides = _strides(whole)
        yield from _windows(local, start + sum(map(operator.mul, first, strides)), strides)
    elif gradient.is_sparse:
        # Rows without a gradient get no noise, as they get no update from a sparse optimizer.
        rows, values = gradient.indices()[0], gradient.values()
        if values.is_complex():
            values = torch.view_as_real(values)
        width = prod(values.shape[1:])
        if not values.numel():
            return
        if width > _MOST_AT_ONCE:
            yield from (_Block(row, start + i * width) for i, row in zip(rows.tolist(), values, strict=True))
            return
        height = _MOST_AT_ONCE // width
        for part, indices in zip(values.split(height), rows.split(height), strict=True):
            yield _Block(part, start + indices * width, even=start % 2 == width % 2 == 0)
    elif gradient.is_complex():
        real = torch.view_as_real(gradient)
        yield from _windows(real, 2 * start, _strides(tuple(real.shape)))
    else:
        yield from _windows(gradient, start, _strides(tuple(gradient.shape)))


def _windows(tensor: Tensor, start: int, steps: tuple[int, ...]) -> Iterator[_Block]:
    """Blocks of a tensor whose address goes up by ``steps`` along its dimensions."""
    shape, size = tuple(tensor.shape), tensor.numel()
    inner = len(shape)  # the dimensions from this one on lie one after another
    while inner and (shape[inner - 1] == 1 or steps[inner - 1] == prod(shape[inner:])):
        inner -= 1
    if not size:
        return
    if inner == 0 and (size <= _MOST_AT_ONCE or tensor.is_contiguous()):
        yield _Block(tensor, start)
    elif size <= _MOST_AT_ONCE:
        starts = torch.full((1,), start, device=tensor.device)
        for length, step in zip(shape[:inner], steps[:inner], strict=True):
            starts = (starts[:, None] + torch.arange(length, device=tensor.device) * step).view(-1)
        even = not any(number % 2 for number in (start, prod(shape[inner:]), *steps[:inner]))
        yield _Block(tensor, starts, even)
    elif (row := size // shape[0]) > _MOST_AT_ONCE:
        for i in range(shape[0]):
            yield from _windows(tensor[i], start + i * steps[0], steps[1:])
    else:
        rows = _MOST_AT_ONCE // row
        for i in range(0, shape[0], rows):
            yield from _windows(tensor[i : i + rows], start + i * steps[0], steps)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
