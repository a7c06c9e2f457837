import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Net, all_equal, batches, loader
from torch import nn
from torch.nn import functional as F

from lightning_noisy import replace_activations, signal_report
from lightning_noisy.monitoring.diagnosis import Thresholds


def stack(depth, activation, initialize, width=64):
    torch.manual_seed(0)
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        initialize(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_report_has_the_gains_and_gradients_of_a_pass_by_hand():
    model, x, y = stack(3, nn.Tanh, nn.init.xavier_normal_), normal(50, 64), torch.arange(50) % 10
    report = signal_report(model, (x, y), F.cross_entropy)
    weights = [layer.weight.detach().double().numpy() for layer in model if isinstance(layer, nn.Linear)]
    bias = model[-1].bias.detach().double().numpy()
    h, inputs, outputs = x.double().numpy(), [], []
    for weight in weights[:-1]:
        inputs.append(h)
        outputs.append(h @ weight.T)
        h = np.tanh(outputs[-1])
    logits = h @ weights[-1].T + bias
    exp = np.exp(logits - logits.max(1, keepdims=True))
    gradient = (exp / exp.sum(1, keepdims=True) - np.eye(10)[y.numpy()]) / 50
    grads = {"6.weight": (gradient.T @ h).var()}
    for number in (2, 1, 0):
        gradient = gradient @ weights[number + 1]
        assert report.sites[number]["grad_rms"] == pytest.approx(np.sqrt((gradient**2).mean()), rel=1e-4)
        gradient = gradient / np.cosh(outputs[number]) ** 2
        grads[f"{2 * number}.weight"] = (gradient.T @ inputs[number]).var()
    assert {each["name"]: each["grad_variance"] for each in report.weights} == pytest.approx(grads, rel=1e-4)
    rho = [(np.tanh(h) ** 2).mean() / h.var() for h in outputs]
    slopes = [(np.cosh(h) ** -4.0).mean() for h in outputs]
    for number, site in enumerate(report.sites):
        assert site["name"] == str(2 * number + 1)
        assert site["rho"] == pytest.approx(rho[number], rel=1e-4)
        assert site["rho_product"] == pytest.approx(np.prod(rho[: number + 1]), rel=1e-4)
        assert site["rho_prime_product"] == pytest.approx(np.prod(slopes[number:]), rel=1e-4)
        assert site["input_std"] == pytest.approx(outputs[number].std(), rel=1e-4)


class Busy(Net):
    """Logs, draws and counts in its training step."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.RReLU(), nn.Dropout(), nn.Linear(16, 3))
        )
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        random.random()
        return {"loss": loss}


def test_report_leaves_the_model_and_every_random_state_as_they_were():
    model = Busy()
    model.net[0].weight.grad = torch.ones(16, 8)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate()
    (batch,) = batches(1, 20)
    report = signal_report(model, batch)
    assert [site["name"] for site in report.sites] == ["net.2"]
    assert all_equal(list(before.values()), list(model.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.steps == 0
    assert model.net[0].weight.grad.eq(1).all()
    assert model.net[4].weight.grad is None
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert str(report) == str(signal_report(model, batch))


@pytest.mark.parametrize("batch", [normal(9, 64), (normal(9, 64),), {"input": normal(9, 64)}])
def test_report_without_a_loss_takes_inputs_as_they_are_passed(batch):
    report = signal_report(stack(2, nn.ReLU, nn.init.kaiming_normal_), batch)
    assert len(report.sites) == 2
    assert all(site["grad_rms"] > 0 for site in report.sites)


def test_report_takes_the_loss_of_an_output_that_has_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = stack(1, nn.ReLU, nn.init.kaiming_normal_)

        def forward(self, x, labels):
            return SimpleNamespace(loss=0 * F.cross_entropy(self.net(x), labels), logits=self.net(x))

    report = signal_report(Model(), {"x": normal(5, 64), "labels": torch.zeros(5, dtype=torch.long)})
    assert report.sites[0]["grad_rms"] == 0


def test_report_of_what_has_no_activation_says_so():
    with pytest.raises(ValueError, match="No activation of Linear was called"):
        signal_report(nn.Linear(2, 2), normal(3, 2))


def test_report_of_an_output_without_gradient_asks_for_a_loss():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = stack(1, nn.ReLU, nn.init.kaiming_normal_)

        def forward(self, x):
            return self.net(x).argmax(1)

    with pytest.raises(ValueError, match="The output of Model has no gradient: pass a loss"):
        signal_report(Model(), normal(5, 64))


def test_report_prints_a_table_and_the_findings():
    report = signal_report(stack(8, nn.Sigmoid, nn.init.xavier_normal_), normal(100, 64))
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["site", "function", "role", "ρ", "ρ′"]
    assert lines[1].split()[:3] == ["1", "sigmoid", "hidden"]
    assert [finding.kind for finding in report.findings] == ["vanishing_gradient", "off_centre"]
    assert str(report).endswith(str(report.findings))


def test_report_takes_thresholds():
    model, x = stack(3, nn.Tanh, nn.init.xavier_normal_), normal(100, 64)
    assert signal_report(model, x).findings == []
    assert signal_report(model, x, thresholds=Thresholds(saturation=1e-3)).findings[0].kind == "saturation"


def test_report_of_replaced_activations_has_lambda_and_mu():
    model = replace_activations(stack(2, nn.ReLU, nn.init.xavier_normal_), "nrelu")
    report = signal_report(model, normal(100, 64))
    assert report.sites[0]["lambda"] == pytest.approx(1.57, abs=0.1)
    assert model[1].num_batches_tracked == 0


def test_report_plots_the_scales_of_signal_and_gradient():
    figure = signal_report(stack(6, nn.ReLU, nn.init.kaiming_normal_), normal(50, 64)).plot()
    (axes, *_) = figure.axes
    assert [len(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 6] == [6, 6]


def test_report_does_not_touch_the_batch_nor_gradients_of_a_step_that_writes_them():
    class Writes(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x.sub_(1)
            self.net[0].weight.detach().numpy()[:] *= 2
            loss = F.cross_entropy(self.net(x), y)
            loss.backward(retain_graph=True)
            return loss

    model, (batch,) = Writes(), batches(1)
    x, weight = batch[0].clone(), model.net[0].weight.detach().clone()
    signal_report(model, batch)
    assert torch.equal(batch[0], x)
    assert torch.equal(model.net[0].weight, weight)
    assert model.net[0].weight.grad is None


def test_report_takes_a_step_without_the_number_of_the_batch():
    class Short(Net):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    assert len(signal_report(Short(), batches(1)[0]).sites) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "automatic_optimization", False), "optimizes manually: pass a loss"),
        (lambda model: setattr(model, "training_step", lambda *_: None), "must be one number.*got NoneType"),
        (
            lambda model: setattr(model, "training_step", lambda b, i: model.net(b[0])),
            r"must be one number.*got \(4, 3\)",
        ),
    ],
)
def test_report_says_what_loss_it_needs(change, message):
    model = Net()
    change(model)
    with pytest.raises(ValueError, match=message):
        signal_report(model, batches(1)[0])


def test_report_of_a_pair_without_a_loss_asks_for_one():
    with pytest.raises(ValueError, match=r"If the batch has targets, pass a loss"):
        signal_report(stack(1, nn.ReLU, nn.init.kaiming_normal_), (normal(5, 64), torch.zeros(5)))


def test_report_says_what_to_pass_instead():
    with pytest.raises(ValueError, match="Leave out loss"):
        signal_report(Net(), (torch.randn(4, 8), torch.zeros(4, dtype=torch.long)), nn.functional.cross_entropy)
    with pytest.raises(TypeError, match=r"next\(iter\(loader\)\)"):
        signal_report(Net(), loader([(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))]))
