"""Recurrent layers with gates of modules: those of torch where the gates are plain, whatever path computes them."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from lightning_noisy.functional import recurrent as loops
from lightning_noisy.functional.noisy import HARD
from lightning_noisy.kernels import lstm as kernel
from lightning_noisy.nn import (
    NoisyGRU,
    NoisyGRUCell,
    NoisyLSTM,
    NoisyLSTMCell,
    NoisyRNN,
    NoisyRNNCell,
    recurrent,
    registry,
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


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_plain_gates_are_those_of_torch(kind, options, state):
    layer, expected = pair_of(kind, options)
    assert_same(
        layer, expected, normal(7, 3, 4), *([states_of(layer, (7 if layer.batch_first else 3,))] if state else [])
    )


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_packed_sequences_are_those_of_torch(kind, options, enforce_sorted, state):
    layer, expected = pair_of(kind, options)
    lengths = (7, 5, 5, 1) if enforce_sorted else (3, 7, 1, 5, 7)
    x = pack_sequence([normal(length, 4, seed=length) for length in lengths], enforce_sorted=enforce_sorted)
    assert_same(layer, expected, x, *([states_of(layer, (len(lengths),))] if state else []))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_unbatched_input_is_that_of_torch(kind, options, state):
    layer, expected = pair_of(kind, options)
    assert_same(layer, expected, normal(6, 4), *([states_of(layer, ())] if state else []))


@pytest.mark.parametrize("kind", PAIRS)
def test_readable_loop_is_the_kernel(kind, monkeypatch):
    """The loop, differentiated by autograd, is what the kernels are to be."""
    layer, expected = pair_of(kind, "directions")

    def loop(of_input, state, weight_hh, weight_hr, sides, sizes, *, reverse, **_):
        return loops.lstm(of_input, state, weight_hh, weight_hr, recurrent._ready(sides), sizes, reverse=reverse)

    monkeypatch.setattr(recurrent, "lstm_sequence", loop)
    assert_same(layer, expected, normal(7, 3, 4))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(kind, dtype):
    layer, expected = pair_of(kind, "directions", dtype=dtype)
    x = normal(7, 3, 4, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for found, wanted in zip((layer(x)[0], *flat(layer(x)[1])), (expected(x)[0], *flat(expected(x)[1])), strict=True):
        assert found.dtype == wanted.dtype == dtype
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("kind", PAIRS)
def test_autocast_gives_the_dtypes_of_torch(kind):
    layer, expected = pair_of(kind, "layers", dtype=torch.float32)
    x = normal(7, 3, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (found, last), (wanted, wanted_last) = layer(x), expected(x)
    assert found.dtype == wanted.dtype
    assert [each.dtype for each in flat(last)] == [each.dtype for each in flat(wanted_last)]
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.03)
    found.float().sum().backward()
    assert all(each.grad.isfinite().all() for each in layer.parameters())


@pytest.mark.parametrize("kind", PAIRS)
def test_initial_values_are_those_of_torch(kind):
    ours, torchs = PAIRS[kind]
    torch.manual_seed(5)
    expected = torchs(4, 5, 2)
    torch.manual_seed(5)
    layer = ours(4, 5, 2)
    assert isinstance(layer, torchs)
    for name, parameter in expected.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter)
    before = {name: each.clone() for name, each in layer.named_parameters()}
    torch.manual_seed(5)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        if name in dict(expected.named_parameters()):
            assert torch.equal(parameter, before[name])
        else:
            assert -1 <= parameter.min() < parameter.max() <= 1  # p


@pytest.mark.parametrize("kind", PAIRS)
def test_nested_layers_load_the_weights_of_torch_strictly(kind):
    ours, torchs = PAIRS[kind]
    plain = nn.Sequential(nn.Linear(4, 4), torchs(4, 5, 2, bidirectional=True))
    for name in ("nani", "nanis"):  # which have no parameters
        model = nn.Sequential(nn.Linear(4, 4), ours(4, 5, 2, bidirectional=True, activation=name, **_gate(kind, name)))
        model.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(model[1].weight_hh_l1_reverse, plain[1].weight_hh_l1_reverse)
    learned = ours(4, 5, activation="nah", **_gate(kind, "nah"))
    with pytest.raises(RuntimeError, match=r"l0\.\w+\.p"):
        learned.load_state_dict(torchs(4, 5).state_dict(), strict=True)


def _gate(kind, name):
    return {} if kind == "rnn" else {"gate": name}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("shape", "error", "match"),
    [
        ((2, 3, 7, 4), ValueError, "2-D or 3-D"),
        ((7, 3, 5), RuntimeError, "Expected 4, got 5"),
        ((0, 3, 4), RuntimeError, "0"),
    ],
)
def test_wrong_inputs_are_refused(kind, shape, error, match):
    layer, _ = pair_of(kind)
    with pytest.raises(error, match=match):
        layer(normal(*shape))


@pytest.mark.parametrize("kind", PAIRS)
def test_wrong_states_are_refused(kind):
    layer, _ = pair_of(kind)
    with pytest.raises(RuntimeError, match="size"):
        layer(normal(7, 3, 4), states_of(layer, (2,)))
    with pytest.raises(RuntimeError, match="3-D"):
        layer(normal(7, 3, 4), states_of(layer, ()))


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'nah'"):
        NoisyLSTM(4, 5, gate="nahh")
    with pytest.raises(ValueError, match="instance_dims"):
        NoisyGRU(4, 5, activation="normalized(instance_dims=(1,))")
    with pytest.raises(TypeError, match="makes an nn.Module"):
        NoisyLSTM(4, 5, gate=lambda: 3)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"nonlinearity": "relu"}])
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_cells_are_those_of_torch(kind, options, shape):
    if "nonlinearity" in options and kind != "rnn":
        options = {}
    ours, torchs = CELLS[kind]
    expected = torchs(4, 5, **options, dtype=torch.float64)
    cell = ours(
        4, 5, **options, activation=options.get("nonlinearity", "tanh"), **_gate(kind, "sigmoid"), dtype=torch.float64
    )
    cell.load_state_dict(expected.state_dict(), strict=True)
    assert isinstance(cell, torchs)
    x, h = normal(*shape), normal(*shape[:-1], 5)
    for state in ((), ((h, h / 2) if kind == "lstm" else h,)):
        for found, wanted in zip(flat(cell(x, *state)), flat(expected(x, *state)), strict=True):
            torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="expected 4"):
        cell(normal(3, 5))


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
                patch.setattr("lightning_noisy.kernels.noisy.takes", lambda x: False)
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
    (gradient,) = torch.autograd.grad(
        layer(normal(4, 2, 2, dtype=torch.float32))[0].sum(), layer.weight_hh_l0, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", PAIRS)
def test_without_noise_gates_are_hard(kind):
    """c = 0 and α = 1: h itself, bit for bit that of a loop with clamps."""
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, activation="nanis(c=0)", **_gate(kind, "nanis(c=0)"), dtype=torch.float64)
    hard = ours(4, 5, activation=lambda: Hard("tanh"), **_gate(kind, lambda: Hard("sigmoid")), dtype=torch.float64)
    hard.load_state_dict(layer.state_dict(), strict=False)
    x = 4 * normal(7, 3, 4)
    assert torch.equal(layer(x)[0], hard(x)[0])
    alike = ours(4, 5, activation="nah(c=0, alpha=1)", **_gate(kind, "nah(c=0, alpha=1)"), dtype=torch.float64)
    alike.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(alike(x)[0], hard(x)[0])


class Hard(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return HARD[self.name].hard(x)


@pytest.mark.parametrize("kind", PAIRS)
def test_noise_is_new_at_each_step_and_call_and_repeats_in_a_copy(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 50, activation="nani(c=0.5)", **_gate(kind, "nani(c=0.5)"))
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
        layer = ours(4, 5, activation=gate, **_gate(kind, gate))
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


def test_layers_copy_pickle_and_move(tmp_path):
    layer = NoisyLSTM(4, 5, 2, gate="nah", activation="nsw")
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    x = normal(6, 3, 4, dtype=torch.float32)
    expected = copy.deepcopy(layer)(x)[0]
    assert torch.equal(loaded(x)[0], expected)
    layer.flatten_parameters()
    half = layer.to(torch.bfloat16)
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    assert half.l0.input_gate.c.dtype == torch.float32


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


def test_kernel_without_a_compiler_gives_the_same(monkeypatch):
    layer, expected = pair_of("lstm", "directions", dtype=torch.float32)
    monkeypatch.setattr(kernel, "_load", lambda: None)
    for found, wanted in zip(
        results(layer, normal(7, 3, 4, dtype=torch.float32)), results(expected, normal(7, 3, 4, dtype=torch.float32)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_unsorted_packed_sequences_have_the_noise_of_padded_ones(kind):
    ours, _ = PAIRS[kind]
    torch.manual_seed(0)
    layer = ours(4, 5, activation="nani(c=1)", **_gate(kind, "nani(c=1)"))
    other, lengths = copy.deepcopy(layer), torch.tensor([1, 6, 4])
    x = normal(6, 3, 4, dtype=torch.float32)
    padded = layer(x)[0]
    packed, _ = pad_packed_sequence(other(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
    for sequence, length in enumerate(lengths):
        torch.testing.assert_close(packed[:length, sequence], padded[:length, sequence])


@pytest.mark.parametrize("kind", PAIRS)
def test_a_batch_of_none_passes(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, activation="nah", **_gate(kind, "nah"))
    output, _ = layer(torch.zeros(6, 0, 4))
    output.sum().backward()
    assert output.shape == (6, 0, 5)


@pytest.mark.parametrize("kind", PAIRS)
def test_traces_and_transforms_in_evaluation_have_the_values_of_the_layer(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, activation="nah", **_gate(kind, "nah")).eval()
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


@pytest.mark.parametrize("kind", PAIRS)
def test_layers_on_meta_have_shapes(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, 2, bidirectional=True, activation="nah", **_gate(kind, "nah"), device="meta")
    assert layer(torch.zeros(6, 3, 4, device="meta"))[0].shape == (6, 3, 10)


def test_cells_under_autocast_take_float32():
    for cell in (NoisyLSTMCell(4, 5), NoisyGRUCell(4, 5), NoisyRNNCell(4, 5)):
        with torch.autocast("cpu", torch.bfloat16):
            flat(cell(normal(3, 4, dtype=torch.float32)))[0].float().sum().backward()


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
