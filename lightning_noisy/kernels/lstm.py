"""An LSTM over the time steps of a packed sequence, with a backward pass written by hand.

Autograd would keep and visit a dozen small operations per step. Here a step of the forward pass keeps its
pre-activations and its cell state, and all slopes are computed from these for all steps at once. The readable reference
is ``lstm`` in ``functional.recurrent``, with the same arguments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_noisy.kernels.build import compiled_function

__all__ = ["Gates", "Linearized", "linearized", "lstm_sequence"]

# The values, the slopes, and what makes the gradients of the parameters from that of the values.
Linearized = tuple[Tensor, Tensor, Callable[[Tensor], Sequence[Tensor | None]]]


class Gates(Protocol):
    """Elementwise functions side by side, with parameters.

    Attributes:
        tensors: the parameters.
    """

    tensors: tuple[Tensor, ...]

    def linearized(self, x: Tensor, tensors: Sequence[Tensor]) -> Linearized:
        """The values at all steps, and the slopes; ``tensors`` are the parameters."""

    def prepare(self, *tensors: Tensor) -> Any:
        """What :meth:`value` needs, from the parameters or others in their place."""

    def value(self, x: Tensor, rows: slice, prepared: Any) -> Tensor:
        """The values at x, shape (rows, columns), the rows of all steps that ``rows`` says."""


def lstm_sequence(
    of_input: Tensor,
    state: tuple[Tensor, Tensor],
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    activations: tuple[Gates, Gates, Gates],
    batch_sizes: Sequence[int],
    *,
    previous: Tensor | None,
    last: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Equal to ``lstm`` of ``functional.recurrent``, which says what the arguments are; overwrites ``of_input``.

    ``previous`` is that of ``previous_rows``, or None where all sequences have all steps and ``reverse`` is False;
    ``last`` that of ``last_rows``. Second derivatives raise an error.
    """
    tensors = [tensor for each in activations for tensor in each.tensors]
    out, h, c = _Sequence.apply(
        of_input, *state, weight_hh, weight_hr, activations, list(batch_sizes), previous, last, reverse, *tensors
    )
    return out, (h, c)


def _before(first: Tensor, rows: Tensor, previous: Tensor | None) -> Tensor:
    """The state before each row."""
    if previous is None:
        return torch.cat([first, rows[: len(rows) - len(first)]])
    return torch.cat([first, rows])[previous]


_Step = Callable[..., None]


def _step_of(like: Tensor) -> _Step:
    """The elementwise part of a step of the backward pass: by the kernel, or by torch's operations."""
    function = _load() if like.device.type == "cpu" and like.dtype == torch.float32 else None
    return _backward_step if function is None else partial(_compiled_step, function)


def _backward_step(
    h: Tensor, c: Tensor, by_gates: Tensor, by_o: Tensor, by_g: Tensor, by_cell: Tensor, f: Tensor, z: Tensor,
    of_h: Tensor | None = None, of_c: Tensor | None = None,
) -> None:  # fmt: skip
    """From the gradients of o φ(c') and c' those of the pre-activations, z, and of the cell state before, c.

    ``of_h`` and ``of_c`` keep the two.
    """
    hidden = c.shape[1]
    c.addcmul_(h, by_cell)
    if of_h is not None and of_c is not None:
        of_h.copy_(h)
        of_c.copy_(c)
    torch.mul(c[:, None], by_gates, out=z[:, : 2 * hidden].view(-1, 2, hidden))
    torch.mul(h, by_o, out=z[:, 2 * hidden : 3 * hidden])
    torch.mul(c, by_g, out=z[:, 3 * hidden :])
    c *= f


def _compiled_step(function: Callable[..., None], *tensors: Tensor | None) -> None:
    pointers = [None if each is None else each.data_ptr() for each in tensors]
    pointers += [None] * (10 - len(pointers))
    c, f = cast(Tensor, tensors[1]), cast(Tensor, tensors[6])
    function(*pointers, f.stride(0), *c.shape)


@cache
def _load() -> Callable[..., None] | None:
    """The function of ``lstm.c``, unless it isn't there or its numbers are wrong."""
    function = compiled_function("lstm_backward_step", [*[ctypes.c_void_p] * 10, *[ctypes.c_int64] * 3])
    if function is None:
        return None
    numbers = torch.arange(1, 15, dtype=torch.float32, device="cpu").view(14, 1, 1).expand(14, 2, 3).contiguous()
    h, c, o, g, cell, f = numbers[:6]
    results = []
    for step in (_backward_step, partial(_compiled_step, function)):
        after, z, kept = c.clone(), numbers[:4].reshape(2, 12).clone(), numbers[:2].clone()
        step(h, after, numbers[6:8].reshape(2, 2, 3), o, g, cell, f, z, *kept)
        results.append(torch.cat([after.flatten(), z.flatten(), kept.flatten()]))
    return function if torch.equal(*results) else None  # small integers, which are exact


def _split(activations: Sequence[Gates], tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The parameters of each."""
    parts, rest = [], list(tensors)
    for each in activations:
        parts.append(tuple(rest[: len(each.tensors)]))
        del rest[: len(each.tensors)]
    return parts


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, of_input: Tensor, h0: Tensor, c0: Tensor, weight_hh: Tensor, weight_hr: Tensor | None,
        activations: tuple[Gates, Gates, Gates], sizes: list[int], previous: Tensor | None, last: Tensor, reverse: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        gates, cell, output = activations
        prepared = [each.prepare(*part) for each, part in zip(activations, _split(activations, tensors), strict=True)]
        hidden, rows = c0.shape[1], len(of_input)
        z = of_input.detach()
        c_all, out = z.new_empty(rows, hidden), z.new_empty(rows, h0.shape[1])
        parts = [each.split(sizes) for each in (z, c_all, out)]
        transposed = weight_hh.t()
        start = 0 if not reverse else rows
        times = range(len(sizes))
        h, c = h0, c0
        for time in reversed(times) if reverse else times:
            size = sizes[time]
            if reverse:
                start -= size
            z_now, c_now, h_now = (each[time] for each in parts)
            if len(h) > size:
                h, c = h[:size], c[:size]
            elif len(h) < size:
                h, c = torch.cat([h, h0[len(h) : size]]), torch.cat([c, c0[len(c) : size]])
            elif reverse and time == len(sizes) - 1:
                h, c = h0[:size], c0[:size]
            here = slice(start, start + size)
            z_now.addmm_(h, transposed)
            y = gates.value(z_now[:, : 3 * hidden], here, prepared[0])
            i, f, o = y[:, :hidden], y[:, hidden : 2 * hidden], y[:, 2 * hidden :]
            torch.mul(f, c, out=c_now).addcmul_(i, cell.value(z_now[:, 3 * hidden :], here, prepared[1]))
            values = output.value(c_now, here, prepared[2])
            if weight_hr is None:
                torch.mul(o, values, out=h_now)
            else:
                torch.mm(o * values, weight_hr.t(), out=h_now)
            h, c = h_now, c_now
            if not reverse:
                start += size
        ctx.save_for_backward(z, c_all, out, h0, c0, weight_hh, weight_hr, previous, *tensors)
        ctx.activations, ctx.sizes, ctx.reverse = activations, sizes, reverse
        if reverse:
            return out, out[: sizes[0]].clone(), c_all[: sizes[0]].clone()
        return out, out[last], c_all[last]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor, of_h: Tensor, of_c: Tensor) -> tuple[Tensor | None, ...]:
        z, c_all, out, h0, c0, weight_hh, weight_hr, previous, *tensors = ctx.saved_tensors
        activations, sizes, reverse = ctx.activations, ctx.sizes, ctx.reverse
        hidden = c0.shape[1]
        inputs = z[:, : 3 * hidden], z[:, 3 * hidden :], c_all
        found = [
            each.linearized(x, part)
            for each, x, part in zip(activations, inputs, _split(activations, tensors), strict=True)
        ]
        (of_three, g, values), slope, more = zip(*found, strict=True)
        i, f, o = of_three.chunk(3, 1)
        c_before = _before(c0, c_all, previous)
        # The slopes of c' by the pre-activations of i, f and g; of h' by that of o, and by c'.
        of_gates = z.new_empty(len(z), 2, hidden)
        torch.mul(g, slope[0][:, :hidden], out=of_gates[:, 0])
        torch.mul(c_before, slope[0][:, hidden : 2 * hidden], out=of_gates[:, 1])
        of_o, of_g, of_cell = values * slope[0][:, 2 * hidden :], i * slope[1], o * slope[2]
        of_z = torch.empty_like(z)
        needs_more = any(ctx.needs_input_grad[10:])
        of_values = torch.empty_like(c_all) if needs_more else None  # gradients of o φ(c'), and of c'
        of_cells = torch.empty_like(c_all) if needs_more else None
        of_projected = torch.empty_like(out) if weight_hr is not None else None
        names = of_out, of_gates, of_o, of_g, of_cell, of_z, f, of_values, of_cells, of_projected
        parts: list[Any] = [[None] * len(sizes) if each is None else each.split(sizes) for each in names]
        all_h, all_c = of_h.clone(), of_c.clone()
        step = _step_of(z)
        times = range(len(sizes))
        for time in times if reverse else reversed(times):
            out_now, gates_now, o_now, g_now, cell_now, z_now, f_now, *kept = (each[time] for each in parts)
            h, c = all_h[: sizes[time]], all_c[: sizes[time]]
            h += out_now
            if weight_hr is None:
                by_value = h
            else:
                kept[2].copy_(h)
                by_value = h @ weight_hr
            step(by_value, c, gates_now, o_now, g_now, cell_now, f_now, z_now, *kept[:2])
            torch.mm(z_now, weight_hh, out=h)
        of_weight = of_z.t() @ _before(h0, out, previous) if ctx.needs_input_grad[3] else None
        of_projection = None
        if weight_hr is not None and ctx.needs_input_grad[4]:
            of_projection = cast(Tensor, of_projected).t() @ (o * values)
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        if needs_more:
            of_values, of_cells = cast(Tensor, of_values), cast(Tensor, of_cells)
            of_y = torch.cat([of_cells * g, of_cells * c_before, of_values * values], 1), of_cells * i, of_values * o
            of_tensors = [each for make, gradient in zip(more, of_y, strict=True) for each in make(gradient)]
        return of_z, all_h, all_c, of_weight, of_projection, *[None] * 5, *of_tensors


def linearized(gates: Gates, x: Tensor, tensors: Sequence[Tensor]) -> Linearized:
    """What :meth:`Gates.linearized` returns, by autograd."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        leaves = [each.detach().requires_grad_(each.requires_grad) for each in tensors]
        y = gates.value(leaf, slice(None), gates.prepare(*leaves))
        wanted = [each for each in leaves if each.requires_grad]
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=bool(wanted), materialize_grads=True)

    def of_tensors(gradient: Tensor) -> Sequence[Tensor | None]:
        found = iter(torch.autograd.grad(y, wanted, gradient, allow_unused=True) if wanted else ())
        return [next(found) if each.requires_grad else None for each in leaves]

    return y.detach(), slope, of_tensors
