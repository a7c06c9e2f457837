"""Which numbers of the noise each gradient gets, and adding them fast.

A parameter of 32,768 elements or more has a vector of numbers to itself, keyed by its name. Smaller ones share
one vector, in which they lie in the order of their names: one draw serves hundreds of them. Any shard of a
gradient knows where in the whole it belongs, and draws just the chunks that it overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_noisy.functional.gaussian import chunk_size, draw_chunk, gaussian, stream_key

__all__ = ["NoisePlan", "SharedAddresses", "is_small", "total_norm"]

_SMALL = 1 << 15  # elements; smaller parameters share a vector
_MOST_BUFFERED = 128  # chunks of the shared vector with a buffer of their own: 16 MiB
_MOST_AT_ONCE = 1 << 20  # elements of a block that is drawn apart from its place: 4 MiB
# Elements, 11 ms of one thread: for a millisecond or more after a backward pass torch's own threads spin on the cores.
_WORTH_THREADS = 1 << 22

# A piece of work: adds some numbers with the help of a scratch buffer and a generator.
_Task = Callable[[Tensor, torch.Generator], None]


class SharedAddresses:
    """Addresses of small parameters in the vector that they share, none of them across the end of a chunk."""

    def __init__(self) -> None:
        self._addresses: dict[str, int] = {}
        self._end = 0

    def extend(self, sizes: dict[str, int]) -> None:
        """Give addresses to names that have none, in alphabetical order, after those that have."""
        for name in sorted(sizes.keys() - self._addresses.keys()):
            if self._end % _SMALL + sizes[name] > _SMALL:
                self._end += -self._end % _SMALL
            self._addresses[name] = self._end
            self._end += sizes[name]

    def __getitem__(self, name: str) -> int:
        return self._addresses[name]


def is_small(parameter: Tensor, numel: int | None = None) -> bool:
    """Whether the parameter, of ``numel`` elements with all its shards, shares a vector with others."""
    return (parameter.numel() if numel is None else numel) < _SMALL and not parameter.is_complex()


@dataclass(frozen=True, slots=True)
class _Block:
    """A tensor that gets the numbers from ``start`` on, in ``shape``; of these, if given, those in ``window``."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]
    window: tuple[slice | Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter, the factor of its σ, and where its numbers are: the name of their vector, and the first address."""

    parameter: torch.nn.Parameter
    scale: float
    vector: str
    start: int


class NoisePlan:
    """How the gradients of some parameters get their noise; made once, used at every step.

    Args:
        parameters: the parameters by name.
        addresses: where the small ones lie in their shared vector.
        scales: a factor of σ for each parameter, >= 0; by default 1.
        shards: for parameters that are flat shards, the first element and the number of elements of the whole.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        addresses: SharedAddresses,
        scales: list[float] | None = None,
        shards: dict[torch.nn.Parameter, tuple[int, int]] | None = None,
    ) -> None:
        self._places = []
        for (name, p), scale in zip(parameters.items(), scales or [1.0] * len(parameters), strict=True):
            first, numel = (shards or {}).get(p, (0, p.numel()))
            small = is_small(p, numel)
            self._places.append(_Place(p, scale, "" if small else name, first + (addresses[name] if small else 0)))
        by_chunk: dict[tuple[int, float], list[_Place]] = {}
        self._single: list[_Place] = []
        for place in self._places:
            plain = type(place.parameter.data) is Tensor and place.parameter.device.type == "cpu"
            if plain and not place.vector:
                by_chunk.setdefault((place.start // _SMALL, place.scale), []).append(place)
            else:
                self._single.append(place)
        self._groups: list[_SmallGroup] = []
        for (chunk, scale), places in sorted(by_chunk.items()):
            if len(self._groups) < _MOST_BUFFERED:
                self._groups.append(_SmallGroup(chunk, scale, places))
            else:
                self._single += places

    def gradients(self) -> list[Tensor]:
        """The gradients that are there."""
        return [place.parameter.grad for place in self._places if place.parameter.grad is not None]

    def noise_norm(self) -> float:
        """Root of the expected squared norm of the noise on the gradients that are there, for σ = 1."""
        total = 0.0
        for place in self._places:
            gradient = place.parameter.grad
            if gradient is not None:
                if gradient.is_sparse:
                    gradient = gradient.coalesce().values()
                total += place.scale**2 * gradient.numel()
        return sqrt(total)

    def is_stale(self) -> bool:
        """Whether small parameters have other shapes, or are elsewhere, than when the plan was made."""
        return any(group.is_stale() for group in self._groups)

    def add_noise(self, std: float, stream: tuple[int | str, ...], step: int) -> bool:
        """Add the noise of a step to every gradient that is there; tell whether there was any.

        Args:
            std: standard deviation of a real element, and root of E|z|² of a complex one, for a scale of 1.
            stream: what the noise is keyed by beside the vector's name and the step.
            step: t.

        Raises:
            TypeError: if a gradient is of a kind that noise can't be added to; none has got any then.
        """
        shared_key = stream_key(*stream, "", step)
        blocks: list[tuple[bytes, float, _Block]] = []
        grouped: list[_Task] = []
        places = list(self._single)
        for group in self._groups:
            task, odd = group.task(std, shared_key)
            grouped += [task] if task is not None else []
            places += odd
        for place in places:
            if place.parameter.grad is not None:
                key = stream_key(*stream, place.vector, step) if place.vector else shared_key
                scale = std * place.scale * (0.5**0.5 if place.parameter.is_complex() else 1.0)
                blocks += [(key, scale, block) for block in _blocks(place.parameter, place.start)]
        if not (grouped or any(place.parameter.grad is not None for place in places)):
            return False
        blocks = [item for item in blocks if item[1] != 0]
        for device in {block.tensor.device for *_, block in blocks} | {torch.device("cpu")}:
            here = [item for item in blocks if item[2].tensor.device == device]
            tasks = list(_tasks(here, device))
            elements = sum(block.tensor.numel() for *_, block in here)
            if device.type == "cpu" and std != 0:
                tasks += grouped
                elements += len(grouped) * _SMALL
            _run(tasks, device, elements)
        return True


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, whole ones and shards: a 0-dimensional float32 tensor, on all ranks."""
    groups: dict[object, list[Tensor]] = {}
    norms = []
    for gradient in gradients:
        dense = gradient.coalesce().values() if gradient.is_sparse else gradient
        if dense.dtype in (torch.float16, torch.bfloat16):  # whose norms would overflow or be rounded
            norms.append(torch.nn.utils.get_total_norm([dense.float()]))
            continue
        kind = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else gradient.device
        groups.setdefault(kind, []).append(dense)
    norms += [torch.nn.utils.get_total_norm(group) for group in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not whole:
        return torch.zeros(())
    norm: Tensor = torch.stack([part.to(whole[0].device, torch.float32) for part in whole]).norm()
    return norm


class _SmallGroup:
    """Small parameters on the CPU that share a chunk: the chunk has a buffer, and the numbers' views are kept."""

    def __init__(self, chunk: int, scale: float, places: list[_Place]) -> None:
        self._chunk = chunk
        self._scale = scale
        self._places = places
        spans = [(place.start - chunk * _SMALL, place.parameter) for place in places]
        self._stop = max(start + p.numel() for start, p in spans)
        self._buffer = torch.empty(-(-self._stop // 16) * 16, dtype=torch.float32, device="cpu")
        self._shapes = [p.shape for _, p in spans]
        self._views = [self._buffer[start : start + p.numel()].view(p.shape) for start, p in spans]

    def is_stale(self) -> bool:
        """Whether the parameters have other shapes, or are elsewhere, than the views of their numbers."""
        moved = self._places[0].parameter.device.type != "cpu"
        return moved or [place.parameter.shape for place in self._places] != self._shapes

    def task(self, std: float, key: bytes) -> tuple[_Task | None, list[_Place]]:
        """What is to do for the gradients as they are now, and the places of those that need another way."""
        grads = [place.parameter.grad for place in self._places]
        gradients = [g for g in grads if g is not None and g.layout is torch.strided]
        views, odd = self._views, []
        if len(gradients) < len(views):
            present = [
                (g, place, view) for g, place, view in zip(grads, self._places, views, strict=True) if g is not None
            ]
            odd = [place for g, place, _ in present if g.layout is not torch.strided]
            views = [view for g, _, view in present if g.layout is torch.strided]
            if not gradients:
                return None, odd

        def add(buffer: Tensor, generator: torch.Generator) -> None:
            draw_chunk(self._buffer, key, self._chunk, self._stop, generator)
            torch._foreach_add_(gradients, views, alpha=std * self._scale)

        return (add if self._scale else _nothing), odd


def _nothing(buffer: Tensor, generator: torch.Generator) -> None:
    """The work of a scale of 0."""


def _blocks(parameter: torch.nn.Parameter, start: int) -> Iterator[_Block]:
    """The parts of a parameter's gradient, as plain dense real tensors."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor):
        if any(isinstance(placement, Partial) for placement in gradient.placements):
            raise TypeError(
                f"A gradient of shape {tuple(gradient.shape)} is a partial sum ({gradient.placements}): every summand"
                " would get the noise. Reduce it before the optimizer's step."
            )
        shape, offset = compute_local_shape_and_global_offset(gradient.shape, gradient.device_mesh, gradient.placements)
        local = gradient.to_local()
        whole, offset, shape = tuple(gradient.shape), tuple(offset), tuple(shape)
        if local.is_complex():
            local, whole, offset, shape = torch.view_as_real(local), (*whole, 2), (*offset, 0), (*shape, 2)
        if local.numel():
            yield from _windows(local, start, whole, offset, shape)
    elif gradient.layout == torch.sparse_coo:
        # Rows without a gradient get no noise, as they get no update from a sparse optimizer.
        parameter.grad = gradient = gradient.coalesce()
        if gradient.sparse_dim() != 1:
            raise TypeError(f"Noise on a sparse gradient needs one sparse dimension, got {gradient.sparse_dim()}.")
        rows, values = gradient.indices()[0], gradient.values()
        if values.is_complex():
            values = torch.view_as_real(values)
        size = prod(values.shape[1:])
        height = max(1, _MOST_AT_ONCE // max(size, 1))  # rows of the whole that are drawn at once
        for top in range(0, gradient.shape[0], height):
            first, last = torch.searchsorted(rows, torch.tensor([top, top + height], device=rows.device)).tolist()
            if first < last:
                window = (rows[first:last] - top,)
                bottom = min(top + height, gradient.shape[0])
                yield _Block(values[first:last], start + top * size, (bottom - top, *values.shape[1:]), window)
    elif gradient.layout != torch.strided:
        raise TypeError(f"Noise needs a dense or sparse COO gradient, got one of layout {gradient.layout}.")
    elif gradient.is_complex():
        real = torch.view_as_real(gradient)
        yield _Block(real, start, tuple(real.shape))
    else:
        yield _Block(gradient, start, tuple(gradient.shape))


def _windows(
    local: Tensor, start: int, shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...]
) -> Iterator[_Block]:
    """A shard that is ``size`` elements from ``offset`` on of a whole of ``shape``, as blocks."""
    if len(shape) == 0 or size[1:] == shape[1:]:  # whole rows: their numbers lie one after another
        row = prod(shape[1:])
        yield _Block(local, start + (offset[0] * row if offset else 0), tuple(local.shape))
        return
    row = prod(shape[1:])
    if row > _MOST_AT_ONCE:
        for i in range(size[0]):
            yield from _windows(local[i], start + (offset[0] + i) * row, shape[1:], offset[1:], size[1:])
        return
    window = tuple(slice(o, o + n) for o, n in zip(offset[1:], size[1:], strict=True))
    rows = max(1, _MOST_AT_ONCE // row)
    for i in range(0, size[0], rows):
        part = local[i : i + rows]
        yield _Block(part, start + (offset[0] + i) * row, (len(part), *shape[1:]), (slice(None), *window))


def _tasks(blocks: list[tuple[bytes, float, _Block]], device: torch.device) -> Iterator[_Task]:
    """The work that adds the numbers: per chunk where a tensor's memory has their order, else per block."""
    chunk = chunk_size(device)
    parts: dict[tuple[bytes, int, float], list[tuple[Tensor, int, int]]] = {}
    for key, std, block in blocks:
        if block.window is not None or not block.tensor.is_contiguous():
            yield from (_apart(part, std, key) for part in _portions(block))
            continue
        flat, start = block.tensor.view(-1), block.start
        while flat.numel():
            index, first = divmod(start, chunk)
            part, flat = flat[: chunk - first], flat[chunk - first :]
            parts.setdefault((key, index, std), []).append((part, first, first + part.numel()))
            start += part.numel()
    yield from (_in_chunk(entries, *place) for place, entries in parts.items())


def _in_chunk(entries: list[tuple[Tensor, int, int]], key: bytes, index: int, std: float) -> _Task:
    def add(buffer: Tensor, generator: torch.Generator) -> None:
        draw_chunk(buffer, key, index, max(last for *_, last in entries), generator)
        for part, first, last in entries:
            part.add_(buffer[first:last], alpha=std)

    return add


def _apart(block: _Block, std: float, key: bytes) -> _Task:
    def add(buffer: Tensor, generator: torch.Generator) -> None:
        stop = block.start + prod(block.shape)
        noise = gaussian(key, block.start, stop, device=block.tensor.device).view(block.shape)
        block.tensor.add_(noise if block.window is None else noise[block.window], alpha=std)

    return add


def _portions(block: _Block) -> Iterator[_Block]:
    """A block in portions of rows that are drawn at once."""
    if block.window is not None or block.tensor.dim() == 0:
        yield block
        return
    row = prod(block.shape[1:])
    if row > _MOST_AT_ONCE:
        for i in range(block.shape[0]):
            yield from _portions(_Block(block.tensor[i], block.start + i * row, block.shape[1:]))
        return
    rows = max(1, _MOST_AT_ONCE // max(row, 1))
    for i in range(0, block.shape[0], rows):
        part = block.tensor[i : i + rows]
        yield _Block(part, block.start + i * row, tuple(part.shape))


def _run(tasks: list[_Task], device: torch.device, elements: int) -> None:
    """Do the work, on the CPU in as many threads as torch uses."""

    @torch.no_grad()
    def work(share: list[_Task]) -> None:
        buffer = torch.empty(chunk_size(device), dtype=torch.float32, device=device)
        generator = torch.Generator(device)
        for task in share:
            task(buffer, generator)

    threads = min(torch.get_num_threads(), len(tasks)) if device.type == "cpu" and elements > _WORTH_THREADS else 1
    if threads <= 1:
        if tasks:
            work(tasks)
        return
    # Made anew for each step: 0.1 ms beside several, and no thread is left behind or lost in a fork.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [tasks[i::threads] for i in range(threads)]))
