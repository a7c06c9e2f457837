"""Cells of LSTM, GRU and RNN whose gates are modules."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_noisy.nn.recurrent import NoisyGRU, NoisyLSTM, NoisyRNN, Spec, create_gate

__all__ = ["NoisyCell", "NoisyGRUCell", "NoisyLSTMCell", "NoisyRNNCell", "has_drop_in", "take_weights", "with_gates"]


class NoisyCell(nn.RNNCellBase):
    """What the three have in common."""

    def set_gates(self, gate: Spec, activation: Spec) -> None:
        """Make all gates anew."""
        for name, function in self._functions().items():
            spec = gate if function == "sigmoid" else activation
            module = create_gate(spec, function, self.hidden_size).to(self.weight_hh.device)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(self.weight_hh.dtype)
            self.add_module(name, module)

    def gate_modules(self) -> dict[str, nn.Module]:
        """The module of each gate by its name, such as ``"input_gate"``."""
        return {name: self.get_submodule(name) for name in self._functions()}

    def _functions(self) -> dict[str, str]:
        """Of each gate, the function that it stands for."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the weights as torch's cells do; reset the gates."""
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0.0
        for weight in self._parameters.values():
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)
        for module in self.children():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def _batched(self, input: Tensor, *states: Tensor | None) -> list[Tensor]:
        """Input and states with a dimension of the batch."""
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: expected a 1-D or 2-D input, got {input.dim()}-D.")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}")
        x = input if input.dim() == 2 else input[None]
        found = [x]
        for each in states:
            if each is None:
                each = x.new_zeros(len(x), self.hidden_size)
            elif each.dim() != input.dim():
                raise ValueError(f"{type(self).__name__}: a state must be {input.dim()}-D, got {each.dim()}-D.")
            each = each if each.dim() == 2 else each[None]
            if each.shape != (len(x), self.hidden_size):
                raise RuntimeError(f"hidden has shape {tuple(each.shape)}, expected {(len(x), self.hidden_size)}")
            found.append(each)
        return found


class NoisyLSTMCell(NoisyCell, nn.LSTMCell):
    """An ``nn.LSTMCell`` whose gates are modules.

    They are ``input_gate``, ``forget_gate``, ``cell`` (of the candidate), ``output_gate`` and ``output`` (of the cell
    state). In training each call draws new noise. Normalized gates follow the statistics of each call.

    Args:
        args: those of ``nn.LSTMCell``.
        gate: see :class:`~lightning_noisy.nn.NoisyLSTM`.
        activation: see there.
        kwargs: those of ``nn.LSTMCell``.
    """

    input_gate: nn.Module
    forget_gate: nn.Module
    cell: nn.Module
    output_gate: nn.Module
    output: nn.Module

    def __init__(self, *args: Any, gate: Spec = "nah", activation: Spec = "nah", **kwargs: Any) -> None:
        nn.LSTMCell.__init__(self, *args, **kwargs)
        self.set_gates(gate, activation)

    def _functions(self) -> dict[str, str]:
        names = "input_gate", "forget_gate", "cell", "output_gate", "output"
        return {name: "sigmoid" if name.endswith("gate") else "tanh" for name in names}

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step; returns h and c."""
        x, h, c = self._batched(input, *(hx or (None, None)))
        z = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = z.chunk(4, 1)
        c = self.forget_gate(f) * c + self.input_gate(i) * self.cell(g)
        h = self.output_gate(o) * self.output(c)
        return (h, c) if input.dim() == 2 else (h[0], c[0])


class NoisyGRUCell(NoisyCell, nn.GRUCell):
    """An ``nn.GRUCell`` whose gates are modules: ``reset_gate``, ``update_gate`` and ``new``.

    Args:
        args: those of ``nn.GRUCell``.
        gate: see :class:`~lightning_noisy.nn.NoisyLSTM`.
        activation: see there.
        kwargs: those of ``nn.GRUCell``.
    """

    reset_gate: nn.Module
    update_gate: nn.Module
    new: nn.Module

    def __init__(self, *args: Any, gate: Spec = "nah", activation: Spec = "nah", **kwargs: Any) -> None:
        nn.GRUCell.__init__(self, *args, **kwargs)
        self.set_gates(gate, activation)

    def _functions(self) -> dict[str, str]:
        return {"reset_gate": "sigmoid", "update_gate": "sigmoid", "new": "tanh"}

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; returns h."""
        x, h = self._batched(input, hx)
        of_x, of_h = F.linear(x, self.weight_ih, self.bias_ih), F.linear(h, self.weight_hh, self.bias_hh)
        (r, u, n), (r_h, u_h, n_h) = of_x.chunk(3, 1), of_h.chunk(3, 1)
        new: Tensor = self.new(torch.addcmul(n, self.reset_gate(r + r_h), n_h))
        after: Tensor = new + self.update_gate(u + u_h) * (h - new)
        return after if input.dim() == 2 else after[0]


class NoisyRNNCell(NoisyCell, nn.RNNCell):
    """An ``nn.RNNCell`` whose activation is a module, ``activation``.

    Args:
        args: those of ``nn.RNNCell``; ``nonlinearity`` is the function whose hard version a noisy one has.
        activation: what is used in its place; see :class:`~lightning_noisy.nn.NoisyLSTM`.
        kwargs: those of ``nn.RNNCell``.
    """

    activation: nn.Module

    def __init__(self, *args: Any, activation: Spec = "nah", **kwargs: Any) -> None:
        nn.RNNCell.__init__(self, *args, **kwargs)
        self.set_gates("sigmoid", activation)

    def _functions(self) -> dict[str, str]:
        return {"activation": self.nonlinearity}

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; returns h."""
        x, h = self._batched(input, hx)
        z = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        new: Tensor = self.activation(z)
        return new if input.dim() == 2 else new[0]


_DROP_INS: dict[type[nn.Module], Any] = {
    nn.LSTM: NoisyLSTM,
    nn.GRU: NoisyGRU,
    nn.RNN: NoisyRNN,
    nn.LSTMCell: NoisyLSTMCell,
    nn.GRUCell: NoisyGRUCell,
    nn.RNNCell: NoisyRNNCell,
}


def has_drop_in(module: nn.Module) -> bool:
    """Whether :func:`with_gates` takes a module: a layer or cell of torch or of this package, with its own weights."""
    if not any(isinstance(module, each) and type(module) in (each, _DROP_INS[each]) for each in _DROP_INS):
        return False
    weights = [name for name in dir(module) if name.startswith(("weight_", "bias_"))]
    own = dict(module.named_parameters(recurse=False))  # others are computed, as by weight_norm and pruning
    return all(name in own or getattr(module, name) is None for name in weights)


def take_weights(module: nn.Module, other: nn.Module) -> None:
    """Give a layer or cell the parameters and attributes of another one of its kind, which it shares."""
    own = [name for name in vars(other) if not name.startswith("_") and name not in ("gate", "activation", "observers")]
    for name, parameter in other.named_parameters(recurse=False):
        setattr(module, name, parameter)
    for name in own:
        module.__dict__[name] = vars(other)[name]


def with_gates(old: nn.Module, gate: Spec, activation: Spec) -> nn.Module:
    """A layer or cell with other gates, and the parameters of the old one, which it shares.

    Args:
        old: one that :func:`has_drop_in`.
        gate: see :class:`~lightning_noisy.nn.NoisyLSTM`.
        activation: see there.
    """
    module: Any = old
    base = next(cls for cls in _DROP_INS if isinstance(old, cls))
    names = ["input_size", "hidden_size", "bias"]
    if isinstance(old, nn.RNNBase):
        names += ["num_layers", "batch_first", "dropout", "bidirectional"]
        names += ["proj_size"] if base is nn.LSTM else []
    options = {name: getattr(module, name) for name in names}
    if base is nn.RNN:
        options["nonlinearity"] = "relu" if module.mode == "RNN_RELU" else "tanh"
    elif base is nn.RNNCell:
        options["nonlinearity"] = module.nonlinearity
    plain = {"activation": options.get("nonlinearity", "tanh")}
    if base not in (nn.RNN, nn.RNNCell):
        plain["gate"] = "sigmoid"
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dropout with one layer, which the old one has said
        new = _DROP_INS[base](**options, **plain)
    take_weights(new, old)
    new.set_gates(gate, activation)
    if not any(each.requires_grad for each in old.parameters(recurse=False)):
        for gate_or_layer in new.children():
            gate_or_layer.requires_grad_(False)
    return new.train(old.training)  # type: ignore[no-any-return]
