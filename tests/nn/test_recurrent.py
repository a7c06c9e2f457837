"""Recurrent layers are those of torch where their gates are plain, whatever path computes them."""

import copy

import pytest
import torch
from recurrent_layers import (
    CASES,
    CELLS,
    PAIRS,
    assert_same,
    flat,
    gates_of,
    normal,
    pair_of,
    results,
    states_of,
)
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lightning_noisy.functional import recurrent as loops
from lightning_noisy.kernels import lstm as kernel
from lightning_noisy.nn import (
    NoisyGRU,
    NoisyGRUCell,
    NoisyLSTM,
    NoisyLSTMCell,
    NoisyRNNCell,
    recurrent,
)


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
        try:
            wanted, wanted_last = expected(x)
        except RuntimeError as error:
            pytest.skip(f"torch's own layer can't do bfloat16 on this processor: {error}")
        found, last = layer(x)
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
        model = nn.Sequential(
            nn.Linear(4, 4), ours(4, 5, 2, bidirectional=True, activation=name, **gates_of(kind, name))
        )
        model.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(model[1].weight_hh_l1_reverse, plain[1].weight_hh_l1_reverse)
    learned = ours(4, 5, activation="nah", **gates_of(kind, "nah"))
    with pytest.raises(RuntimeError, match=r"l0\.\w+\.p"):
        learned.load_state_dict(torchs(4, 5).state_dict(), strict=True)


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
        4,
        5,
        **options,
        activation=options.get("nonlinearity", "tanh"),
        **gates_of(kind, "sigmoid"),
        dtype=torch.float64,
    )
    cell.load_state_dict(expected.state_dict(), strict=True)
    assert isinstance(cell, torchs)
    x, h = normal(*shape), normal(*shape[:-1], 5)
    for state in ((), ((h, h / 2) if kind == "lstm" else h,)):
        for found, wanted in zip(flat(cell(x, *state)), flat(expected(x, *state)), strict=True):
            torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="expected 4"):
        cell(normal(3, 5))


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


def test_kernel_without_a_compiler_gives_the_same(monkeypatch):
    layer, expected = pair_of("lstm", "directions", dtype=torch.float32)
    monkeypatch.setattr(kernel, "_load", lambda: None)
    for found, wanted in zip(
        results(layer, normal(7, 3, 4, dtype=torch.float32)), results(expected, normal(7, 3, 4, dtype=torch.float32)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_batch_of_none_passes(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, activation="nah", **gates_of(kind, "nah"))
    output, _ = layer(torch.zeros(6, 0, 4))
    output.sum().backward()
    assert output.shape == (6, 0, 5)


@pytest.mark.parametrize("kind", PAIRS)
def test_layers_on_meta_have_shapes(kind):
    ours, _ = PAIRS[kind]
    layer = ours(4, 5, 2, bidirectional=True, activation="nah", **gates_of(kind, "nah"), device="meta")
    assert layer(torch.zeros(6, 3, 4, device="meta"))[0].shape == (6, 3, 10)


def test_cells_under_autocast_take_float32():
    for cell in (NoisyLSTMCell(4, 5), NoisyGRUCell(4, 5), NoisyRNNCell(4, 5)):
        with torch.autocast("cpu", torch.bfloat16):
            flat(cell(normal(3, 4, dtype=torch.float32)))[0].float().sum().backward()
