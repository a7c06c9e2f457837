"""The kinds of gradients that are supported, and the positions of their elements in the full parameter."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from lightning_noisy._torch_internals import first_index, has_values
from lightning_noisy.kernels.backend import is_plain
from lightning_noisy.kernels.gaussian import adds_to

__all__ = ["Fragment", "Parameter", "blocks", "checked_gradient", "local", "padding_row", "pointer"]


class Fragment:
    """Consecutive elements of a parameter in a flat vector of DeepSpeed; a plan treats them as a parameter.

    Args:
        flat: the vector, whose gradient contains theirs.
        offset: index of the first element in the vector.
        count: number of elements.
        start: index of the first element in the parameter.
    """

    def __init__(self, flat: Tensor, offset: int, count: int, start: int) -> None:
        self.start = start
        self._flat = flat
        self._part = slice(offset, offset + count)

    def numel(self) -> int:
        """The number of elements."""
        return self._part.stop - self._part.start

    @property
    def grad(self) -> Tensor | None:
        """Their gradient, a view of the vector's gradient."""
        gradient = self._flat.grad
        if gradient is None or gradient.numel() == self.numel():
            return gradient
        return gradient.view(-1)[self._part]


Parameter = nn.Parameter | Fragment

_MOST_AT_ONCE = 1 << 16  # elements of a block whose noise is drawn into a buffer, and rows of any block
_MOST_IN_PLACE = 1 << 20  # elements of a block of rows that gets its noise in place


def pointer(tensor: Tensor) -> int:
    """The address of a tensor if a kernel takes it: plain, contiguous, on the CPU float32. Else 0."""
    return tensor.data_ptr() if is_plain(tensor) and tensor.is_contiguous() and adds_to(tensor) else 0


def checked_gradient(parameter: Parameter) -> Tensor:
    """The gradient, if noise can be added to it; made coalesced, without overlapping memory, and no conjugate view."""
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
        parameter.grad = gradient  # type: ignore[misc]  # never a fragment
    elif gradient.layout != torch.strided:
        raise TypeError(f"Noise needs a dense or sparse COO gradient, got one of layout {gradient.layout}.")
    elif _overlaps(gradient):  # such as an expanded one
        gradient = gradient.contiguous()
        parameter.grad = gradient  # type: ignore[misc]
    elif gradient.is_conj() or gradient.is_neg():  # views that autograd may make for complex parameters
        gradient = gradient.resolve_conj().resolve_neg()
        parameter.grad = gradient  # type: ignore[misc]
    return gradient


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements may share memory."""
    end = 0
    for step, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if step <= end:
            return tensor.numel() > 0
        end += step * (size - 1)
    return False


def local(gradient: Tensor) -> Tensor:
    """This rank's shard of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def padding_row(parameter: Parameter, start: int, first: int, count: int) -> Iterator[Tensor]:
    """The part of an embedding's gradient that is its padding row, if this rank has it."""
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse or not has_values(gradient):  # torch omits it from sparse ones
        return
    if gradient.dim() == 1:  # a flat shard
        begin, end = first - start, first + count - start
        if end > 0 and begin < gradient.numel():
            yield gradient[max(begin, 0) : end]
        return
    row = first // count
    if isinstance(gradient, DTensor):
        row -= first_index(gradient)[0]
    if 0 <= row < len(rows := local(gradient)):
        yield rows[row]


def blocks(parameter: Parameter, start: int) -> Iterator[tuple[Tensor, list[int] | Tensor]]:
    """The parts of a parameter's gradient, as plain dense real tensors, and the addresses where their rows start.

    Within a row, which may be the whole tensor, addresses are consecutive in row-major order.
    """
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor):
        shard, whole, first = gradient.to_local(), tuple(gradient.shape), first_index(gradient)
        if shard.is_complex():
            shard, whole, first = torch.view_as_real(shard), (*whole, 2), (*first, 0)
        strides = _strides(whole)
        yield from _windows(shard, start + sum(map(operator.mul, first, strides)), strides)
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
    """Blocks of a tensor whose addresses increase by ``steps`` along its dimensions."""
    shape, size, most = tuple(tensor.shape), tensor.numel(), _most(tensor)
    inner = len(shape)  # addresses are consecutive from this dimension on
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
    return _MOST_IN_PLACE if pointer(tensor) else _MOST_AT_ONCE


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
