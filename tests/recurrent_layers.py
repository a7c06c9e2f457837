"""Recurrent layers of this package beside those of torch, for several tests."""

import copy

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from lightning_noisy.nn import (
    NoisyGRU,
    NoisyGRUCell,
    NoisyLSTM,
    NoisyLSTMCell,
    NoisyRNN,
    NoisyRNNCell,
)

PAIRS = {"lstm": (NoisyLSTM, nn.LSTM), "gru": (NoisyGRU, nn.GRU), "rnn": (NoisyRNN, nn.RNN)}
CELLS = {"lstm": (NoisyLSTMCell, nn.LSTMCell), "gru": (NoisyGRUCell, nn.GRUCell), "rnn": (NoisyRNNCell, nn.RNNCell)}
OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 3},
    "directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True, "bidirectional": True},
    "no bias": {"bias": False, "num_layers": 2},
    "dropout": {"num_layers": 3, "dropout": 0.4, "bidirectional": True},
}
PROJECTED = {
    "projected": {"proj_size": 3},
    "projected layers": {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False},
}
CASES = [(kind, options) for kind in PAIRS for options in OPTIONS] + [("lstm", options) for options in PROJECTED]
CASES += [("relu", options) for options in OPTIONS]


def ignore(*_):
    """An observer: plain gates are then computed by this package, not by torch's kernel."""


def pair_of(kind, options=(), dtype=torch.float64, **more):
    """A layer with plain gates and torch's, with the same weights."""
    ours, torchs = PAIRS["rnn" if kind == "relu" else kind]
    options = {**(OPTIONS | PROJECTED).get(options, {}), **({"nonlinearity": "relu"} if kind == "relu" else {}), **more}
    torch.manual_seed(0)
    expected = torchs(4, 5, **options, dtype=dtype)
    gates = {"activation": "relu" if kind == "relu" else "tanh"} | (
        {"gate": "sigmoid"} if kind in ("lstm", "gru") else {}
    )
    layer = ours(4, 5, **options, **gates, dtype=dtype)
    assert layer.load_state_dict(expected.state_dict(), strict=True)
    layer.observers = (ignore,)
    return layer, expected


def flat(states):
    return states if isinstance(states, tuple) else (states,)


def results(layer, x, *state):
    """Output, states and all gradients."""
    layer.zero_grad()
    x = copy.deepcopy(x)
    data = x.data if isinstance(x, PackedSequence) else x
    data.requires_grad_()
    state = copy.deepcopy(state)
    for each in state:
        for part in flat(each):
            part.requires_grad_()
    torch.manual_seed(1)  # of dropout
    output, last = layer(x, *state)
    values = output.data if isinstance(output, PackedSequence) else output
    weight = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view(values.shape)
    loss = (values * weight).sum() + sum((part**3).sum() for part in flat(last))
    loss.backward()
    gradients = [data.grad, *(part.grad for each in state for part in flat(each))]
    return [values, *flat(last), *gradients, *(each.grad for each in layer.parameters())]


def assert_same(layer, expected, *inputs):
    for found, wanted in zip(results(layer, *inputs), results(expected, *inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def states_of(layer, batch=(3,)):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    generator = torch.Generator().manual_seed(2)
    sizes = layer._state_sizes() if hasattr(layer, "_state_sizes") else ()
    found = tuple(torch.randn(rows, *batch, size, dtype=torch.float64, generator=generator) for size in sizes)
    return found if len(found) > 1 else found[0]


def normal(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gates_of(kind, name):
    return {} if kind == "rnn" else {"gate": name}
