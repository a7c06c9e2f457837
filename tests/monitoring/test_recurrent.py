import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.monitoring.recurrent import gate_names, gates

LENGTHS = [5, 2, 4]


def by_hand(module, x, lengths, state):
    """The pre-activations of all steps by torch's cells, one sequence and one step after the other."""
    found = {}
    directions = 2 if module.bidirectional else 1
    first = state[0] if isinstance(state, tuple) else state
    cells = state[1] if isinstance(state, tuple) else None
    for row, length in enumerate(lengths):
        sequence = list(x[:length, row])
        for layer in range(module.num_layers):
            outputs = []
            for direction in range(directions):
                end = "_reverse" if direction else ""
                w = {n: getattr(module, f"{n}_l{layer}{end}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
                project = getattr(module, f"weight_hr_l{layer}{end}", None)
                h = first[layer * directions + direction, row]
                c = None if cells is None else cells[layer * directions + direction, row]
                steps = []
                for value in reversed(sequence) if direction else sequence:
                    a = w["weight_ih"] @ value + w["bias_ih"]
                    b = w["weight_hh"] @ h + w["bias_hh"]
                    if isinstance(module, nn.LSTM):
                        parts = dict(
                            zip(("input_gate", "forget_gate", "cell", "output_gate"), (a + b).chunk(4), strict=True)
                        )
                        i, f, g, o = parts.values()
                        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                        h = o.sigmoid() * c.tanh()
                        h = h if project is None else project @ h
                    elif isinstance(module, nn.GRU):
                        (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
                        parts = {"reset_gate": ar + br, "update_gate": az + bz, "new": an + (ar + br).sigmoid() * bn}
                        z = parts["update_gate"].sigmoid()
                        h = (1 - z) * parts["new"].tanh() + z * h
                    else:
                        parts = {"activation": a + b}
                        h = (a + b).relu() if module.nonlinearity == "relu" else (a + b).tanh()
                    for name, part in parts.items():
                        found.setdefault(f"l{layer}{end}.{name}", []).append(part)
                    steps.append(h)
                outputs.append(steps[::-1] if direction else steps)
            sequence = [torch.cat(each) for each in zip(*outputs, strict=True)]
    return {name: torch.stack(values) for name, values in found.items()}


def rows_sorted(values):
    return values[values[:, 0].argsort()]


@pytest.mark.parametrize("layout", ["plain", "batch_first", "unbatched", "packed"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"proj_size": 3}),
        (nn.GRU, {}),
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.RNN, {"nonlinearity": "tanh"}),
    ],
)
@torch.no_grad()
def test_gates_are_those_of_a_loop_over_steps(cls, options, bidirectional, with_state, layout):
    torch.manual_seed(0)
    module = cls(4, 6, 2, bidirectional=bidirectional, batch_first=layout == "batch_first", **options).double()
    lengths = LENGTHS if layout == "packed" else [5] if layout == "unbatched" else [5, 5, 5]
    x = torch.randn(5, len(lengths), 4, dtype=torch.float64)
    directions, size = 2 if bidirectional else 1, options.get("proj_size", 6)
    h = torch.randn(2 * directions, len(lengths), size, dtype=torch.float64) * with_state
    c = torch.randn(2 * directions, len(lengths), 6, dtype=torch.float64) * with_state
    expected = by_hand(module, x, lengths, (h, c) if cls is nn.LSTM else h)
    if layout == "unbatched":
        given, h, c = x[:, 0], h[:, 0], c[:, 0]
    elif layout == "packed":
        given = pack_padded_sequence(x, lengths, enforce_sorted=False)
    else:
        given = x.transpose(0, 1) if layout == "batch_first" else x
    state = (h, c) if cls is nn.LSTM else h
    args = (given, state) if with_state else (given,)
    found = dict(gates(module, args, module(*args)))
    assert found.keys() == expected.keys() == gate_names(module).keys()
    for name, values in expected.items():
        assert torch.allclose(rows_sorted(found[name]), rows_sorted(values), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_gates_of_a_cell_lead_to_its_output(cls):
    torch.manual_seed(0)
    cell, x, h = cls(3, 5), torch.randn(7, 3), torch.randn(7, 5)
    c = torch.randn(7, 5)
    args = (x, (h, c)) if cls is nn.LSTMCell else (x, h)
    output = cell(*args)
    found = dict(gates(cell, args, output))
    if cls is nn.LSTMCell:
        i, f, g, o = found.values()
        expected = o.sigmoid() * (f.sigmoid() * c + i.sigmoid() * g.tanh()).tanh()
        output = output[0]
    elif cls is nn.GRUCell:
        _, z, n = found.values()
        expected = (1 - z.sigmoid()) * n.tanh() + z.sigmoid() * h
    else:
        expected = found["activation"].tanh()
    assert torch.allclose(output, expected, atol=1e-6)


def test_recorder_has_a_site_for_each_gate():
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][-1])

    model, x = Reader(), torch.randn(5, 3, 4)
    recorder = ActivationRecorder(model)
    expected = model(x)
    with recorder:
        assert torch.equal(model(x), expected)
    values = recorder.compute()
    assert {tag.partition("/")[2] for tag in values} == {
        f"lstm.l0.{name}" for name in ("input_gate", "forget_gate", "cell", "output_gate")
    }
    h = dict(gates(model.lstm, (x,), model.lstm(x)))["l0.cell"].double().numpy()
    assert values["rho/lstm.l0.cell"] == pytest.approx((torch.tensor(h).tanh().numpy() ** 2).mean() / h.var(), rel=1e-5)
    assert "anact_score" not in values


def test_layers_behind_a_dropout_are_named_as_unseen():
    recorder = ActivationRecorder(nn.Sequential(nn.GRU(4, 6, 3, dropout=0.1)))
    assert [site.name for site in recorder.sites] == ["0.l0.reset_gate", "0.l0.update_gate", "0.l0.new"]
    assert list(recorder.unseen) == ["0"]
