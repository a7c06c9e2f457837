"""Which numbers of the noise each gradient gets, and adding them fast.

Each parameter has numbers of its own, keyed by its name. Any shard of a gradient knows where in the whole it belongs,
and draws just its share. Float32 gradients on the CPU get it where they are, from the compiled kernel; for others the
numbers are drawn in batches that fit the cache, for many small gradients at once.
"""

from __future__ import annotations

import operator
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import compress
from math import prod, sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_noisy.kernels.gaussian import AddressRanges, compiled_library, signed, stream_key, substream

__all__ = ["Fragment", "Mark", "NoisePlan", "unchanged"]


class Fragment:
    """Consecutive elements of a parameter that lie in a flat vector of DeepSpeed; to a plan it is a parameter.

    Args:
        flat: the vector, whose gradient has its gradient.
        offset: its first element there.
        count: how many there are.
        start: its first element in the parameter.
    """

    def __init__(self, flat: Tensor, offset: int, count: int, start: int) -> None:
        self.start = start
        self._flat = flat
        self._part = slice(offset, offset + count)

    def numel(self) -> int:
        """How many elements there are."""
        return self._part.stop - self._part.start

    @property
    def grad(self) -> Tensor | None:
        """Their gradient, a view of that of the vector."""
        gradient = self._flat.grad
        if gradient is None or gradient.numel() == self.numel():
            return gradient
        return gradient.view(-1)[self._part]


Parameter = nn.Parameter | Fragment

# A parameter, its gradient, and how often that had been changed in place.
Mark = tuple[Parameter, weakref.ref[Tensor], int]

_MOST_AT_ONCE = 1 << 16  # elements of a block whose numbers are drawn apart, and rows of any block
_MOST_IN_PLACE = 1 << 20  # elements of a block that has rows, and gets the numbers where it is


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter, the index of its group, what its name adds to a key, and the address of its first element."""

    parameter: Parameter
    group: int
    offset: int
    start: int


class NoisePlan:
    """How the gradients of some parameters get their noise; made once, used at every step.

    Args:
        parameters: the parameters by name.
        groups: the index of each parameter's group, whose σ it gets; by default 0.
        shards: for parameters that are flat shards, the index of the first element in the whole.
        padding: for weights of embeddings with a padding row, the index of its first element in the whole, and its
            length: it gets no noise as long as its gradient is zero.

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
        self._padded = [(p, *padding[p.parameter]) for p in self._places if p.parameter in padding] if padding else []
        self.parameters = [place.parameter for place in self._places]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        starts, offsets = ([getattr(place, name) for place in self._places] for name in ("start", "offset"))
        self._runs = AddressRanges(offsets, starts, self._sizes)

    def gradients(self, scales: list[float]) -> list[Tensor]:
        """The gradients that are there, of the groups whose scale is not 0."""
        return [g for place in self._places if (g := place.parameter.grad) is not None and scales[place.group]]

    def marks(self) -> list[Mark]:
        """What shows later whether the gradients are those of now: of up to 16, since a backward pass makes all."""
        sample: list[Parameter] = [p for p in self.parameters[:: 1 + len(self.parameters) // 16] if p.grad is not None]
        sample = sample or [p for p in self.parameters if p.grad is not None][:1]
        return [(p, weakref.ref(g), g._version) for p in sample if (g := p.grad) is not None]

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
        first, second = stream_key(*stream, step)
        gradients = [parameter.grad for parameter in self.parameters]
        # As in _pointer, written out: of many small gradients a call for each would take a tenth of the time.
        pointers = [
            g.data_ptr()
            if type(g) is Tensor
            and isinstance(g, torch.FloatTensor)
            and g.numel() == size
            and g.is_contiguous()
            and not g.is_neg()
            else 0
            for g, size in zip(gradients, self._sizes, strict=True)
        ]
        if any(pointers) and compiled_library() is None:
            pointers = [0] * len(pointers)
        others = []
        taken = set(pointers)
        if 0 in pointers or len(taken) < len(pointers):
            # Some need another way: also gradients that several parameters share, of which each gets its own.
            seen = {0}
            for i, (place, pointer) in enumerate(zip(self._places, pointers, strict=True)):
                if pointer in seen:
                    pointers[i] = 0
                    others += [place] * (gradients[i] is not None)
                seen.add(pointer)
        alike: dict[tuple[torch.device, float], list[_Place]] = {}
        for place in others:
            if not stds[place.group]:
                continue
            gradient = _checked_gradient(place.parameter)
            if isinstance(gradient, FakeTensor):
                continue  # without values
            if gradient.layout == torch.strided and (address := _local(gradient).data_ptr()):
                if address in taken:
                    gradient = gradient.clone()
                    place.parameter.grad = gradient  # type: ignore[misc]  # none of a fragment
                taken.add(address)
            std = stds[place.group] * (sqrt(0.5) if gradient.is_complex() else 1.0)
            alike.setdefault((gradient.device, std), []).append(place)
        rows = [row for padded in self._padded for row in _padding_row(*padded)]
        before = [row.clone() for row in rows]
        if any(pointers):
            runs, where = self._runs.moved(first), torch.frombuffer(array("q", pointers), dtype=torch.int64)
            for group, span in self._spans.items():
                if stds[group]:
                    runs[span].add_at(where[span], second, stds[group])
                    changed = cast(list[Tensor], gradients[span])
                    if 0 in pointers[span]:
                        changed = list(compress(changed, pointers[span]))
                    torch.autograd.graph.increment_version(changed)
        for (device, std), group_of_places in alike.items():
            batch = _Batch(device, std, second)
            for place in group_of_places:
                for tensor, starts in _blocks(place.parameter, place.start):
                    batch.add(tensor, starts, first + place.offset)
            batch.flush()
        for row, was in zip(rows, before, strict=True):
            row.copy_(torch.where(was.any(), row, was))
        return any(gradient is not None for gradient in gradients)


def unchanged(marks: list[Mark]) -> bool:
    """Whether there are marks, and all gradients are those of then."""
    return bool(marks) and all(
        (gradient := then()) is not None and parameter.grad is gradient and gradient._version == version
        for parameter, then, version in marks
    )


def _pointer(tensor: Tensor) -> int:
    """Where a tensor lies in memory, if that is what the kernel takes: float32, on the CPU, contiguous. Else 0."""
    plain = type(tensor) is Tensor and isinstance(tensor, torch.FloatTensor)  # dense ones, on the CPU
    if plain and tensor.is_contiguous() and not tensor.is_neg():
        return tensor.data_ptr()
    return 0


class _Batch:
    """Adds the noise of one device and σ, with few calls: collects blocks, and draws the numbers of all at once."""

    def __init__(self, device: torch.device, std: float, second: int) -> None:
        self._device = device
        self._std = std
        self._second = second
        self._most = _most_at_once(device)
        self._used = 0
        self._tensors: list[Tensor] = []
        self._runs: list[tuple[int, int, int]] = []

    def add(self, tensor: Tensor, starts: list[int] | Tensor, first: int) -> None:
        """Take in a block: a tensor, and the addresses at which its rows, of equal length, start."""
        first, rows, width = signed(first % 2**64), len(starts), tensor.numel() // len(starts)
        pointer = _pointer(tensor)
        if pointer and compiled_library() is not None:
            pointers = pointer + 4 * width * torch.arange(rows, device="cpu")
            _rows(first, starts, width).add_at(pointers, self._second, self._std)
            torch.autograd.graph.increment_version(tensor)
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
        """Add the noise to what has been collected."""
        if self._tensors:
            runs = AddressRanges(*map(list, zip(*self._runs, strict=True)))
            numbers = runs.draw(self._second, self._std, self._device)
            parts = numbers.split([tensor.numel() for tensor in self._tensors])
            noise = [part.view(tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True)]
            with torch.inference_mode():  # spares every tensor autograd's part
                torch._foreach_add_(self._tensors, noise)
        self._used, self._tensors, self._runs = 0, [], []


def _rows(first: int, starts: list[int] | Tensor, width: int) -> AddressRanges:
    firsts, widths = (torch.full((len(starts),), number, device="cpu") for number in (first, width))
    return AddressRanges(firsts, starts, widths)


def _most_at_once(device: torch.device) -> int:
    """Most numbers to draw into memory: 0.5 MiB, which a CPU's cache holds, and elsewhere 4 MiB."""
    return 1 << (17 if device.type == "cpu" else 20)


def _checked_gradient(parameter: Parameter) -> Tensor:
    """The gradient, if it is of a kind that noise can be added to; made coalesced, and no conjugate view."""
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
        gradient = gradient.coalesce()
        if not (values := gradient.values()).is_contiguous():
            parts = gradient.indices(), values.contiguous()
            gradient = torch.sparse_coo_tensor(*parts, gradient.shape, is_coalesced=True, check_invariants=False)
        parameter.grad = gradient  # type: ignore[misc]  # none of a fragment
    elif gradient.layout != torch.strided:
        raise TypeError(f"Noise needs a dense or sparse COO gradient, got one of layout {gradient.layout}.")
    elif _overlaps(gradient):  # expanded, for one
        gradient = gradient.contiguous()
        parameter.grad = gradient  # type: ignore[misc]
    elif gradient.is_conj() or gradient.is_neg():  # views, of which autograd makes some of complex parameters
        gradient = gradient.resolve_conj().resolve_neg()
        parameter.grad = gradient  # type: ignore[misc]
    return gradient


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements may lie at one place in memory."""
    end = 0
    for step, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if step <= end:
            return tensor.numel() > 0
        end += step * (size - 1)
    return False


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _padding_row(place: _Place, first: int, count: int) -> Iterator[Tensor]:
    """The part of an embedding's gradient that is its padding row, if it is here."""
    gradient = place.parameter.grad
    if gradient is None or gradient.is_sparse or isinstance(gradient, FakeTensor):  # torch leaves it out of sparse ones
        return
    if gradient.dim() == 1:  # a flat shard
        begin, end = first - place.start, first + count - place.start
        if end > 0 and begin < gradient.numel():
            yield gradient[max(begin, 0) : end]
        return
    row = first // count
    if isinstance(gradient, DTensor):
        row -= compute_local_shape_and_global_offset(gradient.shape, gradient.device_mesh, gradient.placements)[1][0]
    if 0 <= row < len(local := _local(gradient)):
        yield local[row]


def _blocks(parameter: Parameter, start: int) -> Iterator[tuple[Tensor, list[int] | Tensor]]:
    """The parts of a parameter's gradient, as plain dense real tensors, and the addresses where their rows start.

    Within a row, which may be the whole tensor, addresses are consecutive in row-major order.
    """
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
        rows, values = gradient.indices()[0].cpu(), gradient.values()
        if values.is_complex():
            values = torch.view_as_real(values)
        width = prod(values.shape[1:])
        if not values.numel():
            return
        if width > _MOST_AT_ONCE:
            yield from ((row, [start + i * width]) for i, row in zip(rows.tolist(), values, strict=True))
            return
        height = min(_most(values) // width, _MOST_AT_ONCE)
        for part, indices in zip(values.split(height), rows.split(height), strict=True):
            yield part, start + indices * width
    elif gradient.is_complex():
        real = torch.view_as_real(gradient)
        yield from _windows(real, 2 * start, _strides(tuple(real.shape)))
    else:
        yield from _windows(gradient, start, _strides(tuple(gradient.shape)))


def _windows(tensor: Tensor, start: int, steps: tuple[int, ...]) -> Iterator[tuple[Tensor, list[int] | Tensor]]:
    """Blocks of a tensor whose address goes up by ``steps`` along its dimensions."""
    shape, size, most = tuple(tensor.shape), tensor.numel(), _most(tensor)
    inner = len(shape)  # the dimensions from this one on lie one after another
    while inner and (shape[inner - 1] == 1 or steps[inner - 1] == prod(shape[inner:])):
        inner -= 1
    if not size:
        return
    if inner == 0 and (size <= most or tensor.is_contiguous()):
        yield tensor, [start]
    elif size <= most and prod(shape[:inner]) <= _MOST_AT_ONCE:
        starts = torch.full((1,), start, device="cpu")
        for length, step in zip(shape[:inner], steps[:inner], strict=True):
            starts = (starts[:, None] + torch.arange(length, device="cpu") * step).view(-1)
        yield tensor, starts
    elif (row := size // shape[0]) > most or prod(shape[1:inner]) > _MOST_AT_ONCE:
        for i in range(shape[0]):
            yield from _windows(tensor[i], start + i * steps[0], steps[1:])
    else:
        rows = max(1, min(most // row, _MOST_AT_ONCE // prod(shape[1:inner])))
        for i in range(0, shape[0], rows):
            yield from _windows(tensor[i : i + rows], start + i * steps[0], steps)


def _most(tensor: Tensor) -> int:
    return _MOST_IN_PLACE if compiled_library() is not None and _pointer(tensor) else _MOST_AT_ONCE


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
