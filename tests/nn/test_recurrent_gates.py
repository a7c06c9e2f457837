"""What the gates of recurrent layers do: values and gradients of every kind, noise in time, statistics, observers."""

import copy
import warnings

import pytest
import torch
from recurrent_layers import (
    OPTIONS,
    PAIRS,
    PROJECTED,
    assert_same,
    gates_of,
    ignore,
    normal,
    pair_of,
    results,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from lightning_noisy.functional import recurrent as loops
from lightning_noisy.functional.noisy import HARD
from lightning_noisy.nn import (
    NoisyGRU,
    NoisyLSTM,
    NoisyRNN,
    recurrent,
    registry,
)

# gate and activation: every name of each family, and different gates side by side.
GATES = ["nan(c=2)", "nah(c=2)", "nani(c=0.3)", "nanil", "nanis", "nah(num_parameters=1)", "normalized", "nsw", "silu"]
GATES += ["prelu", "hardtanh", "relu-gpn"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", ["directions", "projected"])
@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_readable_loop(gate, options, training, monkeypatch):
    """In float64 and, where the kernel has its own formulas, float32."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        torch.manual_seed(0)
        layer = NoisyLSTM(4, 5, gate=gate, activation=gate, dtype=dtype, **(OPTIONS | PROJECTED)[options])
        layer.train(training)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.startswith("weight") and gate.startswith(("na", "hard")):
                    parameter *= 3  # some gates saturate
        x = pack_sequence([normal(length, 4, seed=length, dtype=dtype) for length in (3, 7, 5)], enforce_sorted=False)
        other = copy.deepcopy(layer)  # with the same noise
        found = results(layer, x)

        def loop(of_input, state, weight_hh, weight_hr, sides, sizes, *, reverse, **_):
            with monkeypatch.context() as patch:
                patch.setattr("lightning_noisy.kernels.noisy.takes_columns", lambda x: False)
                for side in sides:
                    getattr(side, "_side", side)._line = None
                ready = recurrent._ready(sides)
                return loops.lstm(of_input, state, weight_hh, weight_hr, ready, sizes, reverse=reverse)

        with monkeypatch.context() as patch:
            patch.setattr(recurrent, "lstm_sequence", loop)
            expected = results(other, x)
        for a, b in zip(found, expected, strict=True):
            if a is None or b is None:  # p, in evaluation
                assert a is b or not (b if a is None else a).any()
            else:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate", ["sigmoid", *GATES])
def test_kernel_passes_gradcheck(gate):
    torch.manual_seed(0)
    layer = NoisyLSTM(
        2, 3, gate=gate, activation=gate if gate != "sigmoid" else "tanh", proj_size=2, dtype=torch.float64
    )
    layer.observers = (ignore,)
    state = copy.deepcopy(layer.state_dict())
    names = [name for name, _ in layer.named_parameters()]

    def run(x, h, c, *parameters):
        layer.load_state_dict(state)  # the same noise and statistics
        output, last = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, (h, c)))
        return output, *last

    inputs = [
        2 * normal(4, 2, 2),
        normal(1, 2, 2),
        normal(1, 2, 3),
        *(each.detach().clone() for each in layer.parameters()),
    ]
    assert torch.autograd.gradcheck(run, [each.requires_grad_() for each in inputs], eps=1e-7, atol=1e-5)


def test_second_derivatives_are_refused():
    layer = NoisyLSTM(2, 3)
    loss = layer(normal(4, 2, 2, dtype=torch.float32))[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, layer.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("activation", ["hardtanh", "elu", "leaky_relu"])
def test_gates_that_work_in_place_leave_what_the_backward_pass_needs(activation):
    def run(options):
        torch.manual_seed(0)
        layer = NoisyLSTM(4, 5, gate="sigmoid", activation=f"{activation}{options}", dtype=torch.float64)
        seen = {}
        layer.observers = (lambda name, gate, h, y: seen.update({name: h.clone()}),)
        return [*results(layer, 2 * normal(7, 3, 4)), *seen.values()]

    for found, expected in zip(run("(inplace=True)"), run(""), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # torch's in-place ELU rounds differently


@pytest.mark.parametrize("kind", PAIRS)
def test_without_noise_gates_are_hard(kind):
    """c = 0 and α = 1: h itself, as in a loop with clamps, but for rounding.

    The loop multiplies by ``weight.t()``, the kernel by a copy of it: some processors sum these in another order.
    """
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, activation="nanis(c=0)", **gates_of(kind, "nanis(c=0)"), dtype=torch.float64)
    hard = ours(4, 5, activation=lambda: Hard("tanh"), **gates_of(kind, lambda: Hard("sigmoid")), dtype=torch.float64)
    hard.load_state_dict(layer.state_dict(), strict=False)
    x = 4 * normal(7, 3, 4)
    torch.testing.assert_close(layer(x)[0], hard(x)[0], rtol=0, atol=1e-15)
    alike = ours(4, 5, activation="nah(c=0, alpha=1)", **gates_of(kind, "nah(c=0, alpha=1)"), dtype=torch.float64)
    alike.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(alike(x)[0], hard(x)[0], rtol=0, atol=1e-15)


class Hard(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return HARD[self.name].hard(x)


@pytest.mark.parametrize("kind", PAIRS)
def test_noise_is_new_at_each_step_and_call_and_repeats_in_a_copy(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 50, activation="nani(c=0.5)", **gates_of(kind, "nani(c=0.5)"))
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
    before = torch.get_rng_state()
    other, x = copy.deepcopy(layer), torch.zeros(6, 3, 4)
    first, second = layer(x)[0], layer(x)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first.detach().unique()) > 0.9 * first.numel()
    assert not torch.equal(first, second)
    assert torch.equal(other(x)[0], first)
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


def test_noise_goes_on_after_a_resume():
    torch.manual_seed(0)
    layer, x = NoisyLSTM(4, 5, gate="nani(c=0.5)", activation="nani(c=0.5)"), normal(6, 3, 4, dtype=torch.float32)
    layer(x)
    resumed = NoisyLSTM(4, 5, gate="nani(c=0.5)", activation="nani(c=0.5)")
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(resumed(x)[0], layer(x)[0])


def test_ranks_draw_noise_of_their_own(monkeypatch):
    layer, x = NoisyGRU(4, 5, gate="nani(c=0.5)"), normal(6, 3, 4, dtype=torch.float32)
    outputs = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        outputs.append(copy.deepcopy(layer)(x)[0])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_noise_belongs_to_a_sequence_and_a_time():
    """A packed sequence has the noise of a padded one, so that masks give the same."""
    torch.manual_seed(0)
    layer = NoisyLSTM(4, 5, gate="nah(c=3)", activation="nah(c=3)")
    other, lengths = copy.deepcopy(layer), torch.tensor([6, 4, 1])
    x = 5 * normal(6, 3, 4, dtype=torch.float32)
    padded, _ = layer(x)
    packed, _ = pad_packed_sequence(other(pack_padded_sequence(x, lengths))[0])
    for sequence, length in enumerate(lengths):
        torch.testing.assert_close(packed[:length, sequence], padded[:length, sequence])


@pytest.mark.parametrize("gate", ["nah(c=3)", "normalized"])
@pytest.mark.parametrize("kind", PAIRS)
def test_checkpointing_repeats_the_call(kind, gate):
    ours, _ = PAIRS[kind]

    def run(use):
        torch.manual_seed(0)
        layer = ours(4, 5, activation=gate, **gates_of(kind, gate))
        x = (3 * normal(6, 3, 4, dtype=torch.float32)).requires_grad_()
        for _ in range(3):  # so that the statistics differ from call to call
            output = (checkpoint(layer, x, use_reentrant=False) if use else layer(x))[0]
            output.square().sum().backward()
        return [output, x.grad, *(each.grad for each in layer.parameters()), *layer.buffers()]

    for found, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(found, expected)


def test_normalized_gates_follow_the_statistics_of_all_steps_once_a_call():
    torch.manual_seed(0)
    layer = NoisyLSTM(4, 5, gate="normalized", activation="tanh")
    seen = {}
    layer.observers = (lambda name, gate, h, y: seen.setdefault(name, (gate, h, y)),)
    layer(normal(6, 3, 4, dtype=torch.float32))
    gate, h, y = seen["l0.forget_gate"]
    assert gate is layer.l0.forget_gate
    assert h.shape == y.shape == (18, 5)
    assert int(gate.num_batches_tracked) == 1
    assert gate.running_rho.item() == pytest.approx((torch.sigmoid(h).var() / h.var()).item(), rel=1e-4)
    torch.testing.assert_close(y, torch.sigmoid(h))  # by the statistics before: none
    layer.eval()(normal(6, 3, 4, dtype=torch.float32))
    assert int(gate.num_batches_tracked) == 1


def test_observers_see_all_gates_of_all_layers():
    layer = NoisyGRU(4, 5, 2, bidirectional=True)
    names = []
    layer.observers = (lambda name, *_: names.append(name),)
    layer(normal(6, 3, 4, dtype=torch.float32))
    assert sorted(names) == sorted(layer.gate_modules())
    assert len(names) == 12


def test_compiled_models_run_the_layer_as_it_is():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), NoisyGRU(4, 5))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    expected = copy.deepcopy(model)(normal(50, 3, 4, dtype=torch.float32))[0]
    found = torch.compile(model, backend=backend)(normal(50, 3, 4, dtype=torch.float32))[0]
    torch.testing.assert_close(found, expected)
    assert sum(len(graph.graph.nodes) for graph in graphs) < 20
    torch.compiler.reset()


def test_names_of_all_families_work_everywhere():
    x = normal(3, 2, 4, dtype=torch.float32)
    for name in registry.names():
        for cls in (NoisyLSTM, NoisyGRU, NoisyRNN):
            layer = cls(4, 5, activation=name, **({} if cls is NoisyRNN else {"gate": name}))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                output = layer(x)[0]
            output.sum().backward()
            assert output.isfinite().all(), name
            assert all(each.grad is not None for each in layer.parameters()), name


@pytest.mark.parametrize("kind", PAIRS)
def test_unsorted_packed_sequences_have_the_noise_of_padded_ones(kind):
    ours, _ = PAIRS[kind]
    torch.manual_seed(0)
    layer = ours(4, 5, activation="nani(c=1)", **gates_of(kind, "nani(c=1)"))
    other, lengths = copy.deepcopy(layer), torch.tensor([1, 6, 4])
    x = normal(6, 3, 4, dtype=torch.float32)
    padded = layer(x)[0]
    packed, _ = pad_packed_sequence(other(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
    for sequence, length in enumerate(lengths):
        torch.testing.assert_close(packed[:length, sequence], padded[:length, sequence])


@pytest.mark.parametrize("kind", PAIRS)
def test_traces_and_transforms_in_evaluation_have_the_values_of_the_layer(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, activation="nah", **gates_of(kind, "nah")).eval()
    x = 3 * normal(6, 3, 4, dtype=torch.float32)
    expected = layer(x)[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x)[0], expected)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(layer(leaf)[0].sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x)[0].sum())(x), wanted)
    stacked = torch.stack([x, x / 2])
    torch.testing.assert_close(torch.vmap(lambda x: layer(x)[0])(stacked)[0], expected)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_with_hooks_are_called_at_each_step(kind):
    layer, expected = pair_of(kind)
    layer.observers = ()
    gate = next(iter(layer.gate_modules().values()))
    calls = []
    handle = gate.register_forward_hook(lambda *_: calls.append(1))
    assert_same(layer, expected, normal(7, 3, 4))
    assert len(calls) == 7
    handle.remove()
    layer(normal(7, 3, 4))
    assert len(calls) == 7
