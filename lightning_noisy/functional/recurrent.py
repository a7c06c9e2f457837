"""Recurrent layers over the time steps of a packed sequence, with any gates: the readable loops.

The data of all steps are in one tensor, those of a step side by side, as in a ``PackedSequence``: ``batch_sizes`` has
the number of sequences that have each step, which doesn't increase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Activation", "State", "gru", "last_rows", "lstm", "over_steps", "previous_rows", "rnn"]

State = tuple[Tensor, ...]
# An elementwise function of pre-activations, shape (rows, columns), and of which rows of all steps they are.
Activation = Callable[[Tensor, slice], Tensor]


def over_steps(
    step: Callable[[slice, State], State], state: State, batch_sizes: Sequence[int], *, reverse: bool = False
) -> tuple[Tensor, State]:
    """Apply a step to one time after the other.

    Args:
        step: makes the states after a time of those before it; called with the rows of that time. The first state is
            the output.
        state: initial ones, each of shape (batch_sizes[0], features).
        batch_sizes: number of sequences at each time, at least one.
        reverse: go from the last time to the first.

    Returns:
        The outputs, shape (sum of batch_sizes, features), and the states after each sequence's last step.
    """
    starts = [0]
    for size in batch_sizes:
        starts.append(starts[-1] + size)
    times = range(len(batch_sizes))
    outputs: list[Tensor] = []
    finished: list[State] = []
    first, known = state, 0 if reverse else len(state[0])
    state = tuple(each[:known] for each in first)
    for time in reversed(times) if reverse else times:
        size = batch_sizes[time]
        if size > known:  # of the reverse direction: sequences whose last step this is
            state = tuple(torch.cat([each, begin[known:size]]) for each, begin in zip(state, first, strict=True))
        elif size < known:
            finished.append(tuple(each[size:] for each in state))
            state = tuple(each[:size] for each in state)
        known = size
        state = step(slice(starts[time], starts[time + 1]), state)
        outputs.append(state[0])
    finished.append(state)
    last = tuple(torch.cat(each[::-1]) for each in zip(*finished, strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), last


def lstm(
    of_input: Tensor,
    state: State,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    activations: tuple[Activation, Activation, Activation],
    batch_sizes: Sequence[int],
    *,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    r"""A long short-term memory: :math:`c' = f c + i g` and :math:`h' = o\, \phi(c')`, projected if there is W_hr.

    Args:
        of_input: what the inputs contribute, with biases, shape (rows, 4 hidden); columns of i, f, o and g.
        state: h, shape (batch, hidden or projected), and c, shape (batch, hidden).
        weight_hh: shape (4 hidden, hidden or projected), rows as the columns of ``of_input``.
        weight_hr: shape (projected, hidden), or None.
        activations: of the gates i, f, o side by side; of g; and of c'.
        batch_sizes: see :func:`over_steps`.
        reverse: see :func:`over_steps`.

    Returns:
        As :func:`over_steps`.
    """
    gates, cell, output = activations
    hidden = weight_hh.shape[0] // 4

    def step(rows: slice, state: State) -> State:
        h, c = state
        z = torch.addmm(of_input[rows], h, weight_hh.t())
        i, f, o = gates(z[:, : 3 * hidden], rows).chunk(3, 1)
        c = torch.addcmul(f * c, i, cell(z[:, 3 * hidden :], rows))
        h = o * output(c, rows)
        return (h if weight_hr is None else F.linear(h, weight_hr)), c

    return over_steps(step, state, batch_sizes, reverse=reverse)


def gru(
    of_input: Tensor,
    state: State,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    activations: tuple[Activation, Activation],
    batch_sizes: Sequence[int],
    *,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    r"""A gated recurrent unit: :math:`h' = n + u (h - n)` with :math:`n = \phi(x_n + r (W h)_n)`.

    Args:
        of_input: what the inputs contribute, with their bias, shape (rows, 3 hidden); columns of r, u and n.
        state: h, shape (batch, hidden).
        weight_hh: shape (3 hidden, hidden).
        bias_hh: shape (3 hidden,), or None.
        activations: of the gates r, u side by side; and of n.
        batch_sizes: see :func:`over_steps`.
        reverse: see :func:`over_steps`.

    Returns:
        As :func:`over_steps`.
    """
    gates, new = activations
    hidden = weight_hh.shape[1]

    def step(rows: slice, state: State) -> State:
        (h,) = state
        x, of_state = of_input[rows], F.linear(h, weight_hh, bias_hh)
        r, u = gates(x[:, : 2 * hidden] + of_state[:, : 2 * hidden], rows).chunk(2, 1)
        n = new(torch.addcmul(x[:, 2 * hidden :], r, of_state[:, 2 * hidden :]), rows)
        return (n + u * (h - n),)

    return over_steps(step, state, batch_sizes, reverse=reverse)


def rnn(
    of_input: Tensor,
    state: State,
    weight_hh: Tensor,
    activations: tuple[Activation],
    batch_sizes: Sequence[int],
    *,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    r"""An Elman network: :math:`h' = \phi(x + W h)`. Arguments: see :func:`lstm`; all have ``hidden`` columns."""

    def step(rows: slice, state: State) -> State:
        return (activations[0](torch.addmm(of_input[rows], state[0], weight_hh.t()), rows),)

    return over_steps(step, state, batch_sizes, reverse=reverse)


def previous_rows(batch_sizes: Sequence[int], *, reverse: bool = False) -> Tensor:
    """Where the state before each row is: its number in the initial states followed by all rows, shape (rows,).

    >>> previous_rows([2, 1]).tolist(), previous_rows([2, 1], reverse=True).tolist()
    ([0, 1, 2], [4, 1, 0])
    """
    first, start, numbers = batch_sizes[0], 0, []
    for time, size in enumerate(batch_sizes):
        own = torch.arange(size)
        if reverse:
            following = batch_sizes[time + 1] if time + 1 < len(batch_sizes) else 0
            own = torch.where(own < following, first + start + size + own, own)
        elif time:
            own = first + start - batch_sizes[time - 1] + own
        numbers.append(own)
        start += size
    return torch.cat(numbers)


def last_rows(batch_sizes: Sequence[int]) -> Tensor:
    """The row of the last step of each sequence, shape (batch_sizes[0],).

    >>> last_rows([2, 1]).tolist()
    [2, 1]
    """
    sizes = torch.tensor(batch_sizes)
    times = (sizes[:, None] > torch.arange(batch_sizes[0])).sum(0) - 1
    return (sizes.cumsum(0) - sizes)[times] + torch.arange(batch_sizes[0])
