"""The gates of torch's recurrent layers, whose kernels show them to nobody: computed again from what goes in and out.

The hidden states of a layer are its output, so that the pre-activations of all time steps are two products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

__all__ = ["gate_names", "gates"]

_LSTM = ("input_gate", "forget_gate", "cell", "output_gate")
_GRU = ("reset_gate", "update_gate", "new")


def gate_names(module: nn.Module) -> dict[str, str]:
    """The names of the gates of a recurrent layer or cell, such as ``"l0.input_gate"``, and their functions.

    Layers behind a dropout are left out: the mask isn't known.
    """
    names: dict[str, str] = {}
    for prefix in _prefixes(module):
        if isinstance(module, (nn.LSTM, nn.LSTMCell)):
            names |= {prefix + name: "tanh" if name == "cell" else "sigmoid" for name in _LSTM}
        elif isinstance(module, (nn.GRU, nn.GRUCell)):
            names |= {prefix + name: "tanh" if name == "new" else "sigmoid" for name in _GRU}
        else:
            names[prefix + "activation"] = _of_rnn(module)
    return names


def _of_rnn(module: nn.Module) -> str:
    return "relu" if "RELU" in str(getattr(module, "mode", getattr(module, "nonlinearity", ""))).upper() else "tanh"


def _prefixes(module: nn.Module) -> list[str]:
    if not isinstance(module, nn.RNNBase):
        return [""]
    ends = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{end}." for layer in range(_seen_layers(module)) for end in ends]


def _seen_layers(module: nn.RNNBase) -> int:
    return 1 if module.dropout > 0 else module.num_layers


@torch.no_grad()
def gates(module: nn.Module, args: tuple[Any, ...], output: Any) -> Iterator[tuple[str, Tensor]]:
    """The pre-activations of each gate.

    Args:
        module: a layer or a cell of torch.
        args: what it was called with.
        output: what it returned.

    Yields:
        Names as those of :func:`gate_names`, each with a tensor of shape (steps of all sequences, hidden size).
    """
    x, state = args[0], args[1] if len(args) > 1 else None
    if not isinstance(module, nn.RNNBase):
        yield from _cell_gates(module, x, state[0] if isinstance(state, tuple) else state)
        return
    if isinstance(x, PackedSequence):
        x, lengths = pad_packed_sequence(x)
        out, _ = pad_packed_sequence(output[0])
    else:
        out = output[0]
        if x.dim() == 2:
            x, out = x[:, None], out[:, None]
        elif module.batch_first:
            x, out = x.transpose(0, 1), out.transpose(0, 1)
        lengths = torch.full((x.shape[1],), len(x))
    first = state[0] if isinstance(state, tuple) else state
    directions = 2 if module.bidirectional else 1
    size = getattr(module, "proj_size", 0) or module.hidden_size
    if first is None:
        first = x.new_zeros(module.num_layers * directions, x.shape[1], size)
    elif first.dim() == 2:
        first = first[:, None]
    is_there = torch.arange(len(x))[:, None] < lengths  # (T, B)
    layers = _seen_layers(module)
    for layer in range(layers):
        here = out if layer == module.num_layers - 1 else _run(module, layer, x, state, lengths)
        for direction in range(directions):
            end = "_reverse" if direction else ""
            h = here[..., direction * size : (direction + 1) * size]
            before = _before(h, first[layer * directions + direction], lengths, reverse=bool(direction))
            weights = [getattr(module, f"{kind}_l{layer}{end}", None) for kind in _WEIGHTS]
            for name, values in _split(module, x, before, weights):
                yield f"l{layer}{end}.{name}", values[is_there.to(values.device)]
        x = here


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _before(h: Tensor, first: Tensor, lengths: Tensor, *, reverse: bool) -> Tensor:
    """The state before each step; of the reverse direction the one after it. Shape (T, B, size)."""
    if not reverse:
        return torch.cat([first[None], h[:-1]])
    following = torch.cat([h[1:], first[None]])
    is_last = torch.arange(len(h))[:, None] == lengths - 1
    return torch.where(is_last[..., None].to(h.device), first, following)


def _run(module: nn.RNNBase, layer: int, x: Tensor, state: Any, lengths: Tensor) -> Tensor:
    """The output of a layer below the last one, shape (T, B, directions * size)."""
    directions = 2 if module.bidirectional else 1
    options = {"bias": module.bias, "bidirectional": module.bidirectional, "device": x.device, "dtype": x.dtype}
    if isinstance(module, nn.LSTM):
        options["proj_size"] = module.proj_size
    elif isinstance(module, nn.RNN):
        options["nonlinearity"] = _of_rnn(module)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        single: nn.RNNBase = cast(Any, type(module))(x.shape[-1], module.hidden_size, **options)
    for name in dict(single.named_parameters()):
        setattr(single, name, getattr(module, name.replace("_l0", f"_l{layer}")))
    part = slice(layer * directions, (layer + 1) * directions)
    if state is not None:
        parts = state if isinstance(state, tuple) else (state,)
        found = tuple(each[part] if each.dim() == 3 else each[part, None] for each in parts)
        state = found if isinstance(state, tuple) else found[0]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    return pad_packed_sequence(single(packed, state)[0])[0]


def _split(module: nn.Module, x: Tensor, h: Tensor, weights: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """The pre-activations of the gates."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    of_x, of_h = F.linear(x, weight_ih, bias_ih), F.linear(h, weight_hh, bias_hh)
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        reset, update, new = zip(of_x.chunk(3, -1), of_h.chunk(3, -1), strict=True)
        yield _GRU[0], reset[0] + reset[1]
        yield _GRU[1], update[0] + update[1]
        yield _GRU[2], new[0] + torch.sigmoid(reset[0] + reset[1]) * new[1]
    elif isinstance(module, (nn.LSTM, nn.LSTMCell)):
        yield from zip(_LSTM, (of_x + of_h).chunk(4, -1), strict=True)
    else:
        yield "activation", of_x + of_h


def _cell_gates(module: nn.Module, x: Tensor, h: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    size: int = module.hidden_size  # type: ignore[assignment]
    h = x.new_zeros(*x.shape[:-1], size) if h is None else h
    yield from _split(module, x, h, [getattr(module, name, None) for name in _WEIGHTS])
