"""A teacher or a target network gets the activations of its original, so that averaging and loading go on working."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_noisy import activation_sites, replace_activations


class BYOL(L.LightningModule):
    """The student's last ReLU leads to a layer, the teacher's doesn't."""

    def __init__(self, is_frozen=True):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU())
        self.teacher = copy.deepcopy(self.student).requires_grad_(not is_frozen)
        self.predictor = nn.Linear(6, 6)

    def forward(self, x):
        with torch.no_grad():
            target = self.teacher(x)
        return F.mse_loss(self.predictor(self.student(x)), target)

    def average(self):
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for student, teacher in pairs:
                teacher.lerp_(student, 0.1)


class DQN(L.LightningModule):
    """Forward has one network, the step another one, and a choice that no symbolic pass follows."""

    def __init__(self, is_choosing):
        super().__init__()
        self.is_choosing = is_choosing
        self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Hardtanh(), nn.Linear(6, 2))
        self.target = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Hardtanh(), nn.Linear(6, 2))
        self.target.load_state_dict(self.net.state_dict())

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        now = self.net(batch) if batch.mean() < 0 or not self.is_choosing else -self.net(batch)
        return (now.max() - self.target(batch).max()) ** 2


def roles(model, inputs):
    return {site.name: site.role for site in activation_sites(model, inputs)}


@pytest.mark.parametrize("inputs", [torch.randn(4, 6), None])
def test_a_frozen_teacher_follows_its_student(inputs):
    model = BYOL()
    assert roles(model, inputs) == dict.fromkeys(("student.1", "student.3", "teacher.1", "teacher.3"), "hidden")
    replace_activations(model, "nsw", example_inputs=inputs)
    assert [p.requires_grad for p in model.teacher.parameters()] == [False] * 6
    model(torch.randn(4, 6)).backward()
    model.average()
    model.teacher.load_state_dict(model.student.state_dict())


def test_a_frozen_teacher_follows_after_training_too():
    model = BYOL()
    for parameter in model.student.parameters():
        nn.init.normal_(parameter)
    assert roles(model, torch.randn(4, 6)) == dict.fromkeys(
        ("student.1", "student.3", "teacher.1", "teacher.3"), "hidden"
    )


def test_a_part_that_is_trained_is_what_it_is():
    assert roles(BYOL(is_frozen=False), torch.randn(4, 6))["teacher.3"] == "output"


@pytest.mark.parametrize("inputs", [torch.randn(4, 6), None])
@pytest.mark.parametrize("is_choosing", [True, False])
def test_a_target_network_follows(inputs, is_choosing):
    model = DQN(is_choosing)
    assert set(roles(model, inputs).values()) == {"hidden"}
    replace_activations(model, "nsw", example_inputs=inputs)
    model.target.load_state_dict(model.net.state_dict())
    model.training_step(torch.randn(4, 6)).backward()


@pytest.mark.parametrize("is_choosing", [True, False])
def test_keep_last_keeps_those_of_the_copy_too(is_choosing):
    model = replace_activations(DQN(is_choosing), "nsw", example_inputs=torch.randn(4, 6), keep_last=1)
    kept = [type(net[i]).__name__ for net in (model.net, model.target) for i in (1, 3)]
    assert kept == ["NSwish", "Hardtanh"] * 2
    model.target.load_state_dict(model.net.state_dict())


class Blocks(nn.Module):
    """Clones, as ``nn.TransformerEncoder`` makes them; the first or the last is frozen, or they all are trained."""

    def __init__(self, frozen=None):
        super().__init__()
        first = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.blocks = nn.ModuleList(copy.deepcopy(first) for _ in range(2))
        if frozen is not None:
            self.blocks[frozen].requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("inputs", [torch.randn(4, 6), None])
def test_clones_in_a_row_are_what_they_are(frozen, inputs):
    assert roles(Blocks(frozen), inputs) == {"blocks.0.1": "hidden", "blocks.1.1": "output"}


def test_layers_that_only_look_alike_are_no_copies():
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)) for name in "ab"})
    model.forward = None

    class One(nn.Module):
        def __init__(self, both):
            super().__init__()
            self.both = both

        def forward(self, x):
            return self.both["a"](x)

    del model.forward
    assert roles(One(model), torch.randn(4, 6)) == {"both.a.1": "hidden", "both.b.1": "unused"}
    for layer in (model["a"][0], model["a"][2], model["b"][0], model["b"][2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert roles(One(model), torch.randn(4, 6))["both.b.1"] == "unused"  # constants are no sign of a copy
