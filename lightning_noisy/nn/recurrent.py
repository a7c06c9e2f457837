"""LSTM, GRU and RNN whose gates are modules: noisy, normalized, or any other activation.

Noisy activations were made for the gates of recurrent networks (Gulcehre et al., "Noisy Activation Functions", 2016),
which torch's kernels compute without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from lightning_noisy._torch_internals import has_hooks, is_transforming
from lightning_noisy.functional.recurrent import State, gru, last_rows, lstm, previous_rows, rnn
from lightning_noisy.kernels.lstm import lstm_sequence
from lightning_noisy.nn import registry
from lightning_noisy.nn.gates import Side, Watched, side_by_side

__all__ = ["NoisyGRU", "NoisyLSTM", "NoisyRNN", "NoisyRecurrent", "create_gate"]

Spec = str | Callable[[], nn.Module]
# Called with the name of a gate, such as "l0.input_gate", its module, its pre-activations and its values.
GateObserver = Callable[[str, nn.Module, Tensor, Tensor], None]


def create_gate(spec: Spec, function: str, hidden_size: int) -> nn.Module:
    """An activation for a gate; noisy ones have a p for each unit.

    Args:
        spec: a name of :func:`lightning_noisy.nn.registry.names`, with or without options, or what makes a module.
        function: ``"sigmoid"``, ``"tanh"`` or ``"relu"``, what it stands for.
        hidden_size: number of units.
    """
    if not isinstance(spec, str):
        module = spec()
        if not isinstance(module, nn.Module):
            raise TypeError(f"A gate must be a name or a function that makes an nn.Module, got {module!r}.")
        return module
    name, options = registry.parse(spec)
    if name in registry.NOISY and registry.NOISY[name].learns_scale:
        options.setdefault("num_parameters", hidden_size)
    if "instance_dims" in options:
        raise ValueError(f"Gates have no instances: instance_dims is not possible in a recurrent layer, got {spec!r}.")
    return registry.create(name, function=function, **options)


_PLAIN = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


class NoisyRecurrent(nn.RNNBase):
    """The layers, directions and sequences that the three have in common."""

    # Of each gate, in the order of the weights' rows: its name, and the function it stands for. Those with the sigmoid
    # are gates, the others activations. (torch.nn knows no such hooks: a call has one for all steps.)
    _gates: tuple[tuple[str, str], ...]
    observers: tuple[GateObserver, ...] = ()

    def set_gates(self, gate: Spec, activation: Spec) -> None:
        """Make all gates anew."""
        self.gate, self.activation = gate, activation
        weight = self._flat_weights[0]
        assert weight is not None
        for name in self._directions():
            modules = {}
            for each, function in self._gates:
                module = create_gate(gate if function == "sigmoid" else activation, function, self.hidden_size)
                modules[each] = module.to(weight.device)
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(weight.dtype)
            self.add_module(name, nn.ModuleDict(modules))

    def gate_modules(self) -> dict[str, nn.Module]:
        """The module of each gate by its name, such as ``"l0.input_gate"``."""
        return {
            f"{name}.{each}": module
            for name in self._directions()
            for each, module in cast(nn.ModuleDict, self._modules[name]).items()
        }

    def _directions(self) -> list[str]:
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def reset_parameters(self) -> None:
        """Draw the weights as torch's layers do; reset the gates."""
        weights = [each for each in self._flat_weights if each is not None]
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0.0
        for weight in weights:
            nn.init.uniform_(weight, -bound, bound)
        for name in self._directions():
            gates = self._modules.get(name)  # there are none yet while torch's constructor runs
            for module in () if gates is None else gates.children():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()

    def extra_repr(self) -> str:
        """Options as keyword arguments."""
        options = [super().extra_repr()]
        if any(function == "sigmoid" for _, function in self._gates):
            options.append(f"gate={self.gate!r}")
        return ", ".join([*options, f"activation={self.activation!r}"])

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's layer; with plain gates, by torch's kernel."""
        return super().forward(input, hx) if self._is_plain() else self._run(input, hx)

    def _is_plain(self) -> bool:
        """Whether the gates are those of torch, and nobody looks at them."""
        return not self.observers and all(
            type(module) is _PLAIN[function] and not has_hooks(module)
            for name in self._directions()
            for module, (_, function) in zip(cast(Any, self._modules[name]).values(), self._gates, strict=True)
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph would have all steps one after the other
    def _run(self, input: Any, hx: Any) -> Any:
        is_packed = isinstance(input, PackedSequence)
        sorted_indices = unsorted_indices = None
        is_batched = True
        if is_packed:
            x, batch_sizes, sorted_indices, unsorted_indices = input
            sizes, shape = batch_sizes.tolist(), None
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"{type(self).__name__}: expected a 2-D or 3-D input, got {input.dim()}-D.")
            is_batched = input.dim() == 3
            steps = input if is_batched else input.unsqueeze(1)
            if is_batched and self.batch_first:
                steps = steps.transpose(0, 1)
            shape = steps.shape[:2]
            batch_sizes, sizes, x = None, [shape[1]] * shape[0], steps.flatten(0, 1)
            if not sizes:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        states = self._initial(hx, x, sizes[0], is_batched)
        self._check(x, states, sizes[0])
        if hx is not None:
            states = tuple(_permuted(each, sorted_indices) for each in states)
        x, last = self._all_layers(x, states, sizes, sorted_indices)
        last = tuple(_permuted(each, unsorted_indices) for each in last)
        if is_packed:
            return PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices), self._unpacked(last)
        output = x.unflatten(0, cast(Any, shape))
        if not is_batched:
            output, last = output.squeeze(1), tuple(each.squeeze(1) for each in last)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, self._unpacked(last)

    def _unpacked(self, states: State) -> Any:
        return states[0] if len(states) == 1 else states

    def _initial(self, hx: Any, x: Tensor, batch: int, is_batched: bool) -> State:
        """The initial states, each of shape (layers * directions, batch, features)."""
        if hx is None:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            return tuple(x.new_zeros(rows, batch, size) for size in self._state_sizes())
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        if len(states) != len(self._state_sizes()):
            raise ValueError(f"{type(self).__name__} has {len(self._state_sizes())} states, got {len(states)}.")
        wanted = 3 if is_batched else 2
        for each in states:
            if each.dim() != wanted:
                raise RuntimeError(f"For this input, initial states must be {wanted}-D, got {each.dim()}-D.")
        return states if is_batched else tuple(each.unsqueeze(1) for each in states)

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size,)

    def _check(self, x: Tensor, states: State, batch: int) -> None:
        """Raise what torch raises for shapes that don't fit."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for each, size in zip(states, self._state_sizes(), strict=True):
            self.check_hidden_size(each, (rows, batch, size))

    def _all_layers(self, x: Tensor, states: State, sizes: list[int], order: Tensor | None) -> tuple[Tensor, State]:
        """The output of the last layer, shape (rows, directions * features), and the last states of all."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        finals: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for end in ends:
                state = tuple(each[len(finals)] for each in states)
                output, final = self._direction(f"l{layer}{end}", x, state, sizes, order, reverse=bool(end))
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(each) for each in zip(*finals, strict=True))

    def _direction(
        self, name: str, x: Tensor, state: State, sizes: list[int], order: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, State]:
        """One direction of a layer."""
        kinds = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
        weights: list[Any] = [getattr(self, f"{kind}_{name}", None) for kind in kinds]
        of_input, weight_hh, bias = self._of_input(x, *weights)
        kind = "cpu" if x.is_meta else x.device.type
        if torch.is_autocast_enabled(kind) and not self._is_cast(kind):
            of_input = of_input.to(weight_hh.dtype)
        dtype = of_input.dtype
        state = tuple(each.to(dtype) for each in state)
        gates = cast(nn.ModuleDict, self._modules[name])
        groups = [[gates[each] for each in names] for names in self._groups]
        with torch.autocast(kind, enabled=False):
            sides: list[Side] = [side_by_side(each, self.hidden_size, sizes, of_input, order) for each in groups]
            if self.observers or any(each.follows for each in sides):
                sides = [Watched(each) for each in sides]
            projection = getattr(self, f"weight_hr_{name}", None)
            output, final = self._sequence(
                of_input, state, weight_hh.to(dtype), None if bias is None else bias.to(dtype),
                None if projection is None else projection.to(dtype), sides, sizes, reverse,
            )  # fmt: skip
            for names, side in zip(self._groups, sides, strict=True):
                if isinstance(side, Watched):
                    seen = [each.split(self.hidden_size, 1) for each in side.take()]
                    for each, pre, value in zip(names, *seen, strict=True):
                        for observer in self.observers:
                            observer(f"{name}.{each}", gates[each], pre, value)
        return output, final

    def _is_cast(self, kind: str) -> bool:
        """Whether autocast applies to torch's kernel on a kind of device."""
        return kind == "cuda"

    def _of_input(
        self, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the inputs contribute, with all biases that can be added there, the recurrent weight, and the rest."""
        bias = None if bias_ih is None else bias_ih + cast(Tensor, bias_hh)
        return F.linear(x, weight_ih, bias), weight_hh, None

    # The names of the gates that are computed together.
    _groups: tuple[tuple[str, ...], ...]

    def _sequence(
        self, of_input: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: Tensor | None,
        sides: Sequence[Side], sizes: list[int], reverse: bool,
    ) -> tuple[Tensor, State]:  # fmt: skip
        raise NotImplementedError


def _permuted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


def _ready(sides: Sequence[Side]) -> list[Callable[[Tensor, slice], Tensor]]:
    """Functions of pre-activations and rows."""

    def ready(side: Side) -> Callable[[Tensor, slice], Tensor]:
        prepared = side.prepare(*side.tensors)
        return lambda x, rows: side.value(x, rows, prepared)

    return [ready(each) for each in sides]


class NoisyLSTM(NoisyRecurrent, nn.LSTM):
    r"""An ``nn.LSTM`` whose gates are modules.

    Arguments, names of parameters, initial values, inputs and outputs are those of ``nn.LSTM``, whose ``state_dict`` it
    loads where its gates have no parameters. Each gate of each layer and direction is a module of its own:
    ``l0.input_gate``, ``l0.forget_gate``, ``l0.cell`` (of the candidate g), ``l0.output_gate``, ``l0.output`` (of the
    cell state), ``l0_reverse.input_gate``, ...; noisy ones learn a p for each unit.

    Noise is drawn anew for each element at each step, at once for a call, and belongs to a sequence and a time: a
    packed sequence has the noise of a padded one. A recomputation by activation checkpointing repeats it. Normalized
    gates are normalized by the statistics of the calls before; afterwards these follow those of this one, pooled over
    its steps. Under ``torch.compile`` the layer runs as it is. Second derivatives raise an error.

    Args:
        args: those of ``nn.LSTM``.
        gate: what i, f and o use in place of the sigmoid: a name of :func:`lightning_noisy.nn.registry.names`, with or
            without options, such as ``"nah(c=30)"``, or a function that makes a module.
        activation: the same in place of tanh, of the candidate and of the cell state.
        kwargs: those of ``nn.LSTM``.

    Raises:
        ValueError: if an argument is out of range or a name unknown.

    >>> lstm = NoisyLSTM(8, 16, gate="nah", activation="tanh")
    >>> output, (h, c) = lstm(torch.randn(5, 3, 8))
    >>> output.shape
    torch.Size([5, 3, 16])
    """

    _gates = (
        ("input_gate", "sigmoid"), ("forget_gate", "sigmoid"), ("cell", "tanh"), ("output_gate", "sigmoid"),
        ("output", "tanh"),
    )  # fmt: skip
    _groups = (("input_gate", "forget_gate", "output_gate"), ("cell",), ("output",))

    def __init__(self, *args: Any, gate: Spec = "nah", activation: Spec = "nah", **kwargs: Any) -> None:
        nn.LSTM.__init__(self, *args, **kwargs)
        self.set_gates(gate, activation)

    def _state_sizes(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size

    def _is_cast(self, kind: str) -> bool:
        return True

    def _of_input(
        self, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        bias = None if bias_ih is None else bias_ih + cast(Tensor, bias_hh)
        # Rows of i, f, g, o become i, f, o, g: the three gates are one block.
        weight_ih, weight_hh = (_gates_first(each) for each in (weight_ih, weight_hh))
        return F.linear(x, weight_ih, None if bias is None else _gates_first(bias)), weight_hh, None

    def _sequence(
        self, of_input: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: Tensor | None,
        sides: Sequence[Side], sizes: list[int], reverse: bool,
    ) -> tuple[Tensor, State]:  # fmt: skip
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transforming()
        if all(each.is_pure for each in sides) and not traced:
            previous = None
            if reverse or sizes[-1] != sizes[0]:
                previous = previous_rows(sizes, reverse=reverse).to(of_input.device)
            return lstm_sequence(
                of_input, cast(Any, state), weight_hh, weight_hr, cast(Any, tuple(sides)), sizes,
                previous=previous, last=last_rows(sizes).to(of_input.device), reverse=reverse,
            )  # fmt: skip
        return lstm(of_input, state, weight_hh, weight_hr, cast(Any, tuple(_ready(sides))), sizes, reverse=reverse)


def _gates_first(weight: Tensor) -> Tensor:
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, f, o, g])


class NoisyGRU(NoisyRecurrent, nn.GRU):
    """An ``nn.GRU`` whose gates are modules: ``l0.reset_gate``, ``l0.update_gate`` and ``l0.new``.

    See :class:`NoisyLSTM`.

    Args:
        args: those of ``nn.GRU``.
        gate: what the reset and the update gate use in place of the sigmoid.
        activation: what the new state uses in place of tanh.
        kwargs: those of ``nn.GRU``.
    """

    _gates = (("reset_gate", "sigmoid"), ("update_gate", "sigmoid"), ("new", "tanh"))
    _groups = (("reset_gate", "update_gate"), ("new",))

    def __init__(self, *args: Any, gate: Spec = "nah", activation: Spec = "nah", **kwargs: Any) -> None:
        nn.GRU.__init__(self, *args, **kwargs)
        self.set_gates(gate, activation)

    def _of_input(
        self, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return F.linear(x, weight_ih, bias_ih), weight_hh, bias_hh

    def _sequence(
        self, of_input: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: Tensor | None,
        sides: Sequence[Side], sizes: list[int], reverse: bool,
    ) -> tuple[Tensor, State]:  # fmt: skip
        return gru(of_input, state, weight_hh, bias_hh, cast(Any, tuple(_ready(sides))), sizes, reverse=reverse)


class NoisyRNN(NoisyRecurrent, nn.RNN):
    """An ``nn.RNN`` whose activation is a module, ``l0.activation``; see :class:`NoisyLSTM`.

    Args:
        args: those of ``nn.RNN``; ``nonlinearity`` is the function whose hard version a noisy one has.
        activation: what is used in its place.
        kwargs: those of ``nn.RNN``.
    """

    _groups = (("activation",),)

    def __init__(self, *args: Any, activation: Spec = "nah", **kwargs: Any) -> None:
        nn.RNN.__init__(self, *args, **kwargs)
        self._gates = (("activation", "relu" if self.mode == "RNN_RELU" else "tanh"),)
        self.set_gates("sigmoid", activation)

    def _is_cast(self, kind: str) -> bool:
        return True

    def _sequence(
        self, of_input: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None, weight_hr: Tensor | None,
        sides: Sequence[Side], sizes: list[int], reverse: bool,
    ) -> tuple[Tensor, State]:  # fmt: skip
        return rnn(of_input, state, weight_hh, cast(Any, tuple(_ready(sides))), sizes, reverse=reverse)
