"""What only looks leaves the model, its attributes and every random state as they were."""

import copy
import io
import random

import numpy
import pytest
import torch
from helpers import Net
from patterns import ROWS, roles
from torch import nn
from torch.nn import functional as F

from lightning_noisy import activation_sites


class Busy(nn.Module):
    """Changes all that it can in its forward."""

    seen = 0

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("ema", torch.zeros(6))
        self.log, self.norm = [], nn.BatchNorm1d(6)

    def forward(self, x):
        self.ema = 0.9 * self.ema + 0.1 * x.mean(0)
        self.log.append(float(random.random() + numpy.random.rand() + torch.rand(())))
        self.last_input = x
        return self.last(F.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("inputs", [None, ROWS])
@pytest.mark.parametrize("training", [True, False])
def test_looking_changes_nothing(inputs, training):
    model = Busy().train(training)
    hooked = []
    model.first.register_forward_hook(lambda *_: hooked.append(1))
    attributes = {module: dict(vars(module)) for module in model.modules()}
    state, log = copy.deepcopy(model.state_dict()), list(model.log)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert roles(activation_sites(model, inputs)) == {":relu#0": "hidden"}
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert {module: dict(vars(module)) for module in model.modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.log, hooked) == (log, [])
    torch.save(model.state_dict(), io.BytesIO())


def test_no_module_of_the_user_is_run_to_find_out_what_it_is():
    class Log(nn.Module):
        def forward(self, x):
            raise AssertionError("was run")

    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(30 * x)

    model = nn.Sequential(Sine(), nn.Linear(6, 6), Log(), nn.Linear(6, 6))
    assert list(activation_sites(model)) == []
    assert roles(activation_sites(nn.Sequential(nn.Linear(6, 6), Sine(), nn.Linear(6, 6)), also=(Sine,))) == {
        "1": "hidden"
    }
    with pytest.raises(TypeError, match="also must have classes of modules, such as"):
        activation_sites(model, also=(torch.sin,))


class Writes(nn.Module):
    """Changes its parameters in its forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.codes = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(5, 6)

    def forward(self, x):
        with torch.no_grad():
            self.b.weight.copy_(F.normalize(self.b.weight))
            self.b.weight[0] = 1.0
            torch._foreach_mul_(list(self.b.parameters()), 0.9)
            torch.mul(self.c.weight, 2.0, out=self.c.weight)
        self.codes.weight.data.mul_(0.9).add_(1.0)
        self.a.weight.data = self.a.weight.data.renorm(2, 0, 1.0)
        for parameter in self.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("inputs", [None, ROWS])
def test_looking_writes_into_no_parameter(inputs):
    model = Writes()
    before = copy.deepcopy(model.state_dict())
    versions = [parameter._version for parameter in model.parameters()]
    assert set(roles(activation_sites(model, inputs)).values()) == {"hidden"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions


def test_a_forward_that_differentiates_is_looked_into():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x):
            x = x.detach().requires_grad_(True)
            energy = self.b(F.softplus(self.a(x))).sum()
            energy.backward(retain_graph=True, create_graph=True)
            return energy, torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Energy()
    assert roles(activation_sites(model, ROWS)) == {":softplus#0": "hidden"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_can_not_be_copied_is_named():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.file, self.first, self.act, self.last = open(__file__), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)  # noqa: SIM115

        def forward(self, x):
            return self.last(self.act(self.first(x)))

    model = Locked()
    sites = activation_sites(model)
    assert "can't be copied" in sites.unresolved[0]
    assert roles(sites) == {"act": "hidden"}
    model.file.close()


class Hooked(nn.Module):
    """Needs what its own hooks have kept."""

    def __init__(self, is_method):
        super().__init__()
        self.first, self.act, self.last, self.kept = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), []
        keep = self.keep if is_method else lambda *arguments: self.keep(*arguments)
        self.first.register_forward_hook(keep)

    def keep(self, _, __, output):
        self.kept.append(output)

    def forward(self, x):
        self.kept.clear()
        return self.last(self.act(self.first(x))) + self.kept[0]


@pytest.mark.parametrize("is_method", [True, False])
def test_a_model_that_needs_its_hooks_is_looked_into_or_named(is_method):
    model = Hooked(is_method)
    model(ROWS)
    kept = list(model.kept)
    sites = activation_sites(model, ROWS)
    assert [a is b for a, b in zip(kept, model.kept, strict=True)] == [True]
    assert roles(sites) == {"act": "hidden"}
    assert bool(sites.unresolved) is not is_method
    assert is_method or sites.unresolved[0].startswith(
        "Hooked: it can't run without its hooks, which may write anywhere"
    )


def test_inputs_that_do_not_suit_raise_what_the_model_raises():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        activation_sites(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(4, 5))


def test_methods_of_a_lightning_module_are_passes_of_their_own():
    model = Net(nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))  # called first in training_step and in validation_step
    assert [site.name for site in activation_sites(model)] == ["net.0"]
