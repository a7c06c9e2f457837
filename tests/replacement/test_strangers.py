"""What people write, and what a swap made of it once: replaced losses, raised in training, left traces."""

import random

import lightning as L
import pytest
import torch
from helpers import loader, quiet_trainer
from patterns import ROWS, roles, swished
from torch import nn
from torch.nn import functional as F

from lightning_noisy import ActivationReplacement, activation_sites, replace_activations
from lightning_noisy.nn import NAH, NSwish


class Losses(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, x):
        return self.net(x)

    def hinge(self, score, y):
        return F.relu(1 - y * score).mean()

    def training_step(self, batch, index):
        score = self(batch)
        y = torch.ones_like(score)
        likely = F.binary_cross_entropy(torch.sigmoid(score), y)
        return self.hinge(score, y) - F.logsigmoid(score).mean() + likely

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("inputs", [None, ROWS])
@pytest.mark.parametrize("to", ["nsw", {"relu": "nsw", "logsigmoid": "nsw", "sigmoid": "nsw"}])
def test_losses_stay(inputs, to):
    model = Losses()
    sites = activation_sites(model, inputs)
    assert roles(sites)["net.1"] == "hidden"
    assert {site.role for site in sites if site.name != "net.1"} <= {"output", "unknown", "unused"}
    replace_activations(model, to, example_inputs=inputs)
    assert swished(model) == ["net.1"]
    score = torch.full((4, 1), 3.0)
    assert model.hinge(score, torch.ones(4, 1)) == 0


def relu(x):
    return x.clamp_min(0)


def test_hardtanh_keeps_its_limits_as_a_noisy_one():
    model = replace_activations(nn.Sequential(nn.Linear(6, 6), nn.Hardtanh(-2, 2), nn.Linear(6, 6)), "nah")
    x = torch.linspace(-4, 4, 9)
    if isinstance(model[1], NAH):
        model[1].alpha = 1.0
        model[1].c.zero_()
        assert torch.equal(model[1].eval()(x), x.clamp(-2, 2))
    else:
        assert isinstance(model[1], nn.Hardtanh)


class Examples(Losses):
    def __init__(self, array):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
        self.example_input_array = array


@pytest.mark.filterwarnings("ignore:replace_activations")
@pytest.mark.parametrize("array", [torch.randn(1, 6), [ROWS], torch.randn(2, 5)])
def test_example_inputs_of_a_module_that_do_not_suit_it_do_not_stop_a_run(array):
    model = Examples(array)
    quiet_trainer(callbacks=[ActivationReplacement("nsw")], max_steps=1).fit(model, loader([ROWS]))
    assert swished(model) == ["net.2"]


def test_keep_last_keeps_the_one_that_is_called_last():
    class Order(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.ReLU(), nn.ReLU()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.c(self.late(self.b(self.early(self.a(x)))))

    for inputs in (None, ROWS):
        assert swished(replace_activations(Order(), "nsw", keep_last=1, example_inputs=inputs)) == ["early"]


def test_a_swap_says_in_one_line_what_it_did(caplog):
    def made():
        return nn.Sequential(
            nn.Linear(6, 6),
            nn.ReLU(),
            nn.Linear(6, 6),
            nn.SiLU(),
            nn.Linear(6, 6),
            nn.Tanh(),
            nn.Linear(6, 1),
            nn.Sigmoid(),
        )

    with caplog.at_level("INFO", "lightning_noisy"):
        replace_activations(made(), "nsw")
        replace_activations(made(), {"relu": "nrelu"}, exclude="3")
        replace_activations(made(), NSwish, outputs=True, keep_last=1)
        replace_activations(replace_activations(made(), "nsw"), "nsw")
    assert [record.message for record in caplog.records] == [
        "nsw: 3 of 4 activations replaced; 1 left: 1 output",
        "{'relu': 'nrelu'}: 1 of 4 activations replaced; 3 left: 1 excluded, 1 other function, 1 output",
        "NSwish: 3 of 4 activations replaced; 1 left: 1 kept",
        "nsw: 3 of 4 activations replaced; 1 left: 1 output",
    ]


@pytest.mark.parametrize("inputs", [None, torch.randn(4, 3, 16, 16)])
def test_initialization_of_the_layers_before_normalized_activations(inputs, caplog):
    class Fire(nn.Module):
        """SqueezeNet's block."""

        def __init__(self, channels):
            super().__init__()
            self.squeeze, self.act = nn.Conv2d(channels, 16, 1), nn.ReLU(inplace=True)
            self.one, self.three = nn.Conv2d(16, 64, 1), nn.Conv2d(16, 64, 3, padding=1)

        def forward(self, x):
            x = self.act(self.squeeze(x))
            return torch.cat([self.act(self.one(x)), self.act(self.three(x))], 1)

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.ReLU(), *(Fire(64 if i == 0 else 128) for i in range(6)), nn.Conv2d(128, 10, 1)
        )
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        return model

    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    size = {}
    for initialize in (None, "xavier"):
        with caplog.at_level("INFO", "lightning_noisy"):
            model = replace_activations(made(), "nsw", example_inputs=inputs, initialize=initialize)
        size[initialize] = model(x).square().mean().item()
    # By fan_in * 2 / (fan_in + fan_out) of the first layer, of each squeeze and expansion, and twice by the last.
    expected = 2 * 27 * 2 / (27 + 576) * (64 * 2 / 80) * 0.4 * (128 * 2 / 144 * 0.4) ** 5
    assert size["xavier"] == pytest.approx(expected, rel=0.5)
    assert size[None] > 50
    assert 'initialize="xavier": 0, 2.squeeze, 2.one, 2.three,' in caplog.text
    assert torch.equal(model[-1].weight, made()[-1].weight)  # no activation follows


def test_swapping_again_after_c_changed_keeps_what_was_learned():
    model = replace_activations(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), "nah(c=0.5)")
    before, p = model[1], model[1].p.clone()
    model[1].c.fill_(0.1)
    replace_activations(model, "nah(c=0.5)")
    assert model[1] is before
    assert torch.equal(model[1].p, p)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.act, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Tanh()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(6))

    def forward(self, x, extra=None):
        if extra is not None:
            x = self.other(x)
        for layer in self.layers:
            if not (self.training and random.random() < 0.5):  # LayerDrop
                x = x + layer(x)
        return self.last(x)


@pytest.mark.parametrize("inputs", [None, ROWS])
@pytest.mark.parametrize("seed", range(3))
def test_unused_places_stay_and_dropped_layers_are_all_seen(inputs, seed):
    random.seed(seed)
    model = Branches()
    sites = activation_sites(model, inputs)
    assert roles(sites) == {"act": "unused", "other": "unused", **{f"layers.{i}.1": "hidden" for i in range(6)}}
    replace_activations(model, "nsw", example_inputs=inputs)
    assert swished(model) == [f"layers.{i}.1" for i in range(6)]
