"""Recurrent layers of torch become those of this package, with the same parameters, and back."""

import copy

import lightning as L
import pytest
import torch
from helpers import batches, loader, quiet_trainer
from torch import nn
from torch.nn.utils import prune

from lightning_noisy import (
    ActivationMonitor,
    ActivationReplacement,
    activation_sites,
    replace_activations,
    restore_activations,
)
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.nn import NAH, NANI, NoisyGRUCell, NoisyLSTM, NoisyRNN
from lightning_noisy.schedules import Linear


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.cell, self.rnn = nn.GRUCell(12, 5), nn.RNN(5, 4, nonlinearity="relu")
        self.act, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        states, _ = self.lstm(x.unflatten(1, (2, 4)).repeat(1, 3, 2))
        output, _ = self.rnn(self.cell(states[:, -1])[None])
        return self.head(self.act(output[0]))


def made(seed=0):
    torch.manual_seed(seed)
    return Recurrent()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_noisy_names_take_recurrent_layers_and_restoring_brings_them_back():
    model = made().eval()
    expected, parameters, old = model(X), list(model.parameters()), model.lstm
    replace_activations(model, "nah", example_inputs=X)
    assert [type(each) for each in (model.lstm, model.cell, model.rnn)] == [NoisyLSTM, NoisyGRUCell, NoisyRNN]
    assert all(any(each is own for own in model.parameters()) for each in parameters)
    assert model.lstm.dropout == 0.1
    assert not model.lstm.training
    assert model.rnn.l0.activation.function_name == "relu"
    assert sum(isinstance(each, NAH) for each in model.modules()) == 4 * 5 + 3 + 1 + 1
    again = model.lstm
    replace_activations(model, "nah", example_inputs=X)
    assert model.lstm is again
    model.train()(X).sum().backward()
    assert all(each.grad is not None for each in model.lstm.parameters())
    restore_activations(model)
    assert model.lstm is old
    assert torch.equal(model.eval()(X), expected)


@pytest.mark.parametrize("to", ["nsw", "relu-gpn", nn.SiLU])
def test_other_names_leave_recurrent_layers_unless_gates_are_asked_for(to):
    assert type(replace_activations(made(), to).lstm) is nn.LSTM
    model = replace_activations(made(), to, gates=True)
    assert type(model.lstm) is NoisyLSTM
    assert model(X).isfinite().all()


def test_mapping_says_what_gates_and_activations_become():
    model = replace_activations(made(), {"sigmoid": "nah(c=3)", "tanh": "nani"})
    assert model.lstm.l1_reverse.forget_gate.c == 3
    assert isinstance(model.lstm.l0.cell, NANI)
    assert type(model.rnn) is nn.RNN  # a ReLU
    model = replace_activations(made(), {"sigmoid": "nah"})
    assert type(model.lstm.l0.cell) is nn.Tanh
    assert type(replace_activations(made(), {"relu": "nrelu"}).lstm) is nn.LSTM


def test_rules_choose_recurrent_layers():
    model = replace_activations(made(), "nah", exclude="lstm")
    assert [type(each) for each in (model.lstm, model.cell)] == [nn.LSTM, NoisyGRUCell]
    model = replace_activations(made(), "nah", include="lstm")
    assert [type(each) for each in (model.lstm, model.cell)] == [NoisyLSTM, nn.GRUCell]


def test_subclasses_and_computed_weights_are_left():
    class Own(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    model = nn.ModuleDict(
        {"own": Own(3, 4), "normed": nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")}
    )
    with pytest.warns(UserWarning, match="replaced nothing.*own.*normed"):
        replace_activations(model, "nah")


def test_checkpoints_of_replaced_models_load_and_others_are_refused():
    model = replace_activations(made(), "nah")
    replace_activations(made(1), "nah").load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="replaced with other ones"):
        replace_activations(made(1), "nan").load_state_dict(model.state_dict())


def test_frozen_layers_stay_frozen_and_move():
    model = made().double()
    model.lstm.requires_grad_(False)
    replace_activations(model, "nah")
    assert not any(each.requires_grad for each in model.lstm.parameters())
    assert model.lstm.l0.input_gate.p.dtype == torch.float64
    assert model(X.double()).dtype == torch.float64


def test_sites_stay_one_per_layer():
    before = [(site.name, site.kind) for site in activation_sites(made(), X)]
    assert [(site.name, site.kind) for site in activation_sites(replace_activations(made(), "nah"), X)] == before


def test_recorder_sees_each_gate():
    model = replace_activations(made(), "nah")
    recorder, other = ActivationRecorder(model), ActivationRecorder(model)
    with recorder:
        other.attach()
        model(X)
        copy.deepcopy(model)(X)  # is not recorded
        other.detach()
    assert recorder.sums.table[:, 0].tolist() == other.sums.table[:, 0].tolist()
    counts = dict(zip([site.name for site in recorder.sites], recorder.sums.table[:, 0].tolist(), strict=True))
    assert counts["lstm.l1_reverse.output"] == counts["lstm.l0.input_gate"] == 5 * 6 * 6
    assert counts["cell.update_gate"] == 5 * 5
    assert counts["rnn.l0.activation"] == 5 * 4
    assert len(counts) == 20 + 3 + 1 + 1
    assert model.lstm.observers == ()
    before = recorder.sums.table.clone()
    model(X)
    assert torch.equal(recorder.sums.table, before)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = made()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_callbacks_swap_anneal_and_watch_gates():
    swap = ActivationReplacement("nah", noise=Linear(30.0, 0.5, steps=3))
    trainer = quiet_trainer(callbacks=[swap, ActivationMonitor(every_n_steps=1)])
    model = Module()
    trainer.fit(model, loader(batches(4, 8)))
    assert {each.c.item() for each in model.modules() if isinstance(each, NAH)} == {0.5}
    assert 0 <= trainer.callback_metrics["saturation/net.lstm.l0.input_gate"] <= 1
    assert "rho/net.rnn.l0.activation" in trainer.callback_metrics


@pytest.mark.slow
def test_processes_train_together():
    torch.manual_seed(0)
    model = Module()
    replace_activations(model, "nah")
    before = copy.deepcopy(model.state_dict())
    trainer = quiet_trainer(strategy="ddp_fork", devices=2, max_steps=3)
    trainer.fit(model, loader(batches(8, 8)))
    assert not torch.equal(model.net.lstm.weight_hh_l0, before["net.lstm.weight_hh_l0"])
    assert all(each.isfinite().all() for each in model.parameters())


def test_evaluation_exports():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), NoisyLSTM(4, 5, gate="nah", activation="nah")).eval()
    x = torch.randn(6, 2, 4)
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x)[0], model(x)[0])


@pytest.mark.parametrize("is_alone", [False, True])
def test_optimizer_made_before_the_swap_is_warned_of(is_alone):
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4)} | ({} if is_alone else {"head": nn.Linear(4, 1)}))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    replace_activations(model, "nah")
    output = model["lstm"](torch.randn(5, 2, 3))[0]
    (output if is_alone else model["head"](output)).sum().backward()
    with pytest.warns(UserWarning, match=r"SGD trains ModuleDict, but not lstm\.l0\.input_gate\.p"):
        optimizer.step()
    optimizer.step()


def test_weights_and_options_that_changed_after_the_swap_are_kept_by_restoring():
    model = made()
    model.lstm.note = "mine"
    replace_activations(model, "nah")
    assert model.lstm.note == "mine"
    new = {name: torch.full_like(each, 0.25) for name, each in model.state_dict().items() if "noise_state" not in name}
    model.load_state_dict(new | {k: v for k, v in model.state_dict().items() if "noise_state" in k}, assign=True)
    model.lstm.dropout = 0.7
    restore_activations(model)
    assert type(model.lstm) is nn.LSTM
    assert (model.lstm.weight_hh_l1_reverse == 0.25).all()
    assert model.lstm.dropout == 0.7
    model.eval()(X)


def test_models_on_meta_are_swapped_and_restored():
    with torch.device("meta"):
        model = Recurrent()
    replace_activations(model, "nah")
    model.to_empty(device="cpu")
    restore_activations(model)
    assert {each.device.type for each in model.parameters()} == {"cpu"}


def test_pruned_layers_are_left_and_are_not_restored():
    model = made()
    prune.l1_unstructured(model.lstm, "bias_ih_l0", 0.5)
    prune.l1_unstructured(model.cell, "bias_hh", 0.5)
    replace_activations(model, "nah")
    assert [type(each) for each in (model.lstm, model.cell, model.rnn)] == [nn.LSTM, nn.GRUCell, NoisyRNN]
    prune.l1_unstructured(model.rnn, "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match="weights of rnn are computed"):
        restore_activations(model)
    prune.remove(model.rnn, "weight_hh_l0")
    restore_activations(model)
    model.eval()(X)
