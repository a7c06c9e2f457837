import math

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Net, loader, quiet_trainer
from torch import nn
from torch.nn import functional as F

from lightning_noisy import ActivationMonitor, signal_report
from lightning_noisy.monitoring.diagnosis import Finding, Findings, Site, Thresholds, diagnose

RELU, TANH = Site("net.1", "relu", "hidden"), Site("net.3", "tanh", "hidden")


def history(**tags):
    """One logged step every 100, from the values of each tag; `__` stands for the slash."""
    count = len(next(iter(tags.values())))
    return [(100 * i, {tag.replace("__", "/"): values[i] for tag, values in tags.items()}) for i in range(count)]


def of(tag, values, name="net.1"):
    return history(**{f"{tag}__{name}": values})


def kinds(found):
    return [each.kind for each in found]


def test_dead_units_are_dated_from_the_start_of_the_last_stretch():
    (found,) = diagnose(of("dead_units", [0, 0.5, 0.1, 0.41, 0.45, 0.41]), [RELU])
    assert (found.kind, found.where, found.since, found.value) == ("dead_units", ("net.1",), 300, 0.41)
    assert found.message == "41 % of the units of net.1 (relu) have been dead since step 300."
    assert "nrelu" in found.advice


@pytest.mark.parametrize(
    ("values", "is_found"),
    [
        ([0, 0.39, 0.39], False),
        ([0, 0.4, 0.4], True),
        ([0, 0, 0.9], False),  # once
        ([0.5, 0.5, 0.5], False),  # from the first look on
        ([0.3, 0.59, 0.59], False),  # not doubled
        ([0.3, 0.6, 0.6], True),
        ([math.nan, 0.5, 0.5], False),
        ([0.7, 0.7, 0.7], True),
        ([0.9], True),  # a single look
        ([0, math.nan, math.nan], False),
    ],
)
def test_dead_units_are_found_from_the_threshold_on(values, is_found):
    assert kinds(diagnose(of("dead_units", values), [RELU])) == ["dead_units"] * is_found


@pytest.mark.parametrize("role", ["output", "gate", "formula", "unknown", "recurrent", "unused"])
def test_sites_that_are_not_hidden_have_no_findings(role):
    tags = {"dead_units__net.1": [1.0] * 3, "saturation__net.1": [1.0] * 3, "input_std__net.1": [0.0] * 3}
    assert diagnose(history(**tags), [Site("net.1", "sigmoid", role)]) == []


def test_saturation_counts_for_functions_that_are_flat_on_both_sides():
    values = [0.6, 0.6]
    assert diagnose(of("saturation", values), [RELU]) == []
    (found,) = diagnose(of("saturation", values, "net.3"), [TANH])
    assert found.kind == "saturation"
    assert '{"tanh": "nah"}' in found.advice


@pytest.mark.parametrize(
    ("first", "last", "kind"),
    [
        (0.5, 0.0049, "vanishing_signal"),
        (0.5, 0.0051, None),
        (2.0, 0.0099, "vanishing_signal"),  # what is near 1 hasn't vanished
        (2.0, 0.0101, None),
        (1e4, 1.0, None),  # inputs that aren't scaled, before a normalization
        (1e-4, 1.0, None),
        (2.0, 1999.0, None),
        (2.0, 2001.0, "exploding_signal"),
        (0.1, 999.0, None),
        (0.1, 1001.0, "exploding_signal"),
    ],
)
def test_signal_that_vanishes_or_explodes_is_found_by_its_size(first, last, kind):
    tags = {"input_std__net.1": [first] * 2, "input_std__net.3": [last] * 2}
    assert kinds(diagnose(history(**tags), [RELU, TANH])) == [kind] * (kind is not None)


def gradients(*sizes):
    """Findings where these are the root mean squares from the first site to the last."""
    sites = [Site(f"net.{i}", "relu", "hidden") for i in range(len(sizes))]
    return diagnose(history(**{f"grad_rms__net.{i}": [size] * 2 for i, size in enumerate(sizes)}), sites)


def test_gradient_that_changes_in_one_step_is_no_trend():
    assert gradients(1e-3, 1e-3, 1e-3, 1.0) == []  # a mean over 1,000 positions
    assert gradients(0.0099 * 1e-3, 1e-3 * 0.1, 1e-3, 1.0)[0].kind == "vanishing_gradient"
    assert gradients(0.0101 * 1e-3, 1e-3 * 0.1, 1e-3, 1.0) == []
    assert gradients(1e6, 1e6, 1.0) == []
    assert gradients(1001e3, 1e3 * 10, 1e3, 1.0)[0].kind == "exploding_gradient"
    assert gradients(999e3, 1e3 * 10, 1e3, 1.0) == []
    assert gradients(1.0) == []


def test_advice_between_normalized_activations_is_about_the_weights():
    sites = [Site(f"net.{number}", "tanh", "hidden", "NormalizedActivation") for number in range(6)]
    values = {f"grad_rms/{site.name}": 0.1 ** (6 - number) for number, site in enumerate(sites)}
    (found,) = diagnose([(0, values)], sites)
    assert found.kind == "vanishing_gradient"
    assert "are normalized already" in found.advice
    assert 'initialize="xavier"' in found.advice
    (found,) = diagnose([(0, values)], [Site(site.name, "tanh", "hidden", "Tanh") for site in sites])
    assert "are normalized already" not in found.advice


def test_branches_that_begin_at_zero_have_gradients_that_do_not_vanish():
    assert gradients(0.0, 1.0, 0.0, 1.0) == []
    assert gradients(math.nan, 1.0, 1.0) == []


@pytest.mark.parametrize(("steps", "until"), [(1, None), (2, 100), (3, 200)])
def test_signal_that_vanished_at_first_is_found_after_it_has_recovered(steps, until):
    last = [1e-4] * steps + [1.0] * (20 - steps)
    found = diagnose(history(**{"input_std__net.1": [1.0] * 20, "input_std__net.3": last}), [RELU, TANH])
    assert kinds(found) == ["vanishing_signal"] * (until is not None)
    if until is not None:
        assert f"The signal vanished until step {until}: " in found[0].message
        assert (found[0].since, found[0].value) == (0, 1e-4)


def test_gains_of_one_half_are_no_finding_but_sizes_of_gradients_are():
    sites = [Site(f"net.{i}", "relu", "hidden") for i in range(40)]
    tags = {f"{tag}__{site.name}": [0.5] * 2 for site in sites for tag in ("rho", "rho_prime")}
    assert diagnose(history(**tags), sites) == []
    tags |= {f"grad_rms__{site.name}": [10.0 ** (i - 40)] * 2 for i, site in enumerate(sites)}
    (found,) = diagnose(history(**tags), sites)
    assert (found.kind, found.where) == ("vanishing_gradient", ("net.0",))
    assert found.value == pytest.approx(1e-39)


def sigmoids(count, role="hidden", **statistics):
    sites = [Site(f"net.{i}", "sigmoid", role) for i in range(count)]
    return {f"{tag}__{site.name}": [value] * 2 for site in sites for tag, value in statistics.items()}, sites


def test_gradient_that_was_not_measured_is_estimated_through_sigmoids():
    # Xavier's: 0.25 = Var[h] = Var[W] fan_in E[φ²], of which each layer leaves sqrt(ρ′ / ρ) = 1/4.
    tags, sites = sigmoids(6, rho=1.0, rho_prime=1 / 16, input_std=0.5)
    (found,) = diagnose(history(**tags), sites)
    assert (found.kind, found.where) == ("vanishing_gradient", ("net.0",))
    assert found.value == pytest.approx(4.0**-5)
    assert "from net.5 (sigmoid) to net.0 (sigmoid)" in found.message
    assert diagnose(history(**tags), sites[:4]) == []  # 1/64
    measured = {f"grad_rms__{site.name}": [1.0] * 2 for site in sites}
    assert diagnose(history(**tags, **measured), sites) == []


@pytest.mark.parametrize(
    "case",
    [
        sigmoids(9, rho=0.29, rho_prime=0.045, input_std=1.0),  # normalized
        sigmoids(9, role="residual", rho=1.0, rho_prime=1 / 16, input_std=0.5),
        sigmoids(9, rho=math.nan, rho_prime=1 / 16, input_std=0.5),
        sigmoids(9, rho=0.0, rho_prime=1 / 16, input_std=0.5),
        sigmoids(9, rho_prime=1 / 16),
    ],
)
def test_gradient_is_not_estimated_where_that_is_not_clear(case):
    tags, sites = case
    assert diagnose(history(**tags), sites) == []


def test_outputs_off_centre_frozen_lambda_and_drifting_weights_are_found():
    tags = {"mean__net.1": [-0.61, -0.61], "std__net.1": [0.2, 0.2], "rejected__net.1": [100, 200]}
    tags |= {f"weight_mean__{name}.weight": [0.01, 0.2, 0.3] for name in "ab"}
    tags |= {"weight_mean__c.weight": [0.3, 0.3, 0.3]}
    tags = {tag: (values * 2)[-3:] if len(values) == 2 else values for tag, values in tags.items()}
    found = diagnose(history(**tags), [RELU])
    assert kinds(found) == ["rejected", "off_centre", "weight_mean"]
    assert "200 batches in a row" in found[0].message
    assert sorted(found[2].where) == ["a.weight", "b.weight"]
    assert [each.since for each in found] == [0, 0, 100]


def test_lambda_and_centre_just_below_the_threshold_are_no_finding():
    tags = {"mean__net.1": [0.59, 0.59], "std__net.1": [0.2, 0.2], "rejected__net.1": [49, 49]}
    assert diagnose(history(**tags), [RELU]) == []
    assert kinds(diagnose(of("rejected", [50, 50]), [RELU])) == ["rejected"]


def test_dormant_units_and_constant_inputs_are_found():
    assert kinds(diagnose(of("dormant_units", [0.8, 0.8]), [RELU])) == ["dormant_units"]
    assert diagnose(of("dormant_units", [0.79, 0.79]), [RELU]) == []
    assert kinds(diagnose(of("input_std", [0.0, 0.0]), [RELU])) == ["constant_input"]


def test_inputs_that_are_constant_behind_dead_units_are_no_finding_of_their_own():
    tags = {"dead_units__net.1": [1.0] * 2, "dead_units__net.3": [1.0] * 2}
    tags |= {"input_std__net.1": [1.0] * 2, "input_std__net.3": [0.0] * 2}
    (found,) = diagnose(history(**tags), [RELU, Site("net.3", "relu", "hidden")])
    assert (found.kind, set(found.where)) == ("dead_units", {"net.1", "net.3"})
    tags["dead_units__net.1"] = [0.2] * 2
    assert "constant_input" in kinds(diagnose(history(**tags), [RELU, TANH]))


@pytest.mark.parametrize(("values", "since"), [([math.nan] * 3, 0), ([1.0, math.nan, math.nan], 100)])
def test_what_is_not_finite_is_dated_from_its_first_step(values, since):
    tags = {"input_std__net.1": values, "saturation__net.1": [0.4] * 3}
    assert [each.since for each in diagnose(history(**tags), [RELU])] == [since]


def test_first_site_that_is_not_finite_is_named():
    tags = {f"input_std__{name}": [1.0, 1.0, math.nan] for name in ("net.1", "net.3")}
    tags |= {f"saturation__{name}": [0.4, 0.4, 0.0] for name in ("net.1", "net.3")}
    (found,) = diagnose(history(**tags), [RELU, TANH])
    assert found.message == "The input of net.1 (relu) isn't finite since step 200."
    assert diagnose(history(**{tag: values[:2] for tag, values in tags.items()}), [RELU, TANH]) == []


def test_site_that_was_not_called_is_no_finding():
    tags = {f"{name}__net.1": [0.5, math.nan, math.nan] for name in ("input_std", "saturation", "dead_units", "mean")}
    assert diagnose(history(**tags), [RELU]) == []


def test_several_sites_make_one_finding_with_the_worst_first():
    sites = [Site(f"net.{i}", "relu", "hidden") for i in range(5)]
    tags = {f"dead_units__{site.name}": [0.0, 0.5 + i / 10, 0.5 + i / 10] for i, site in enumerate(sites)}
    (found,) = diagnose(history(**tags), sites)
    assert found.where == ("net.4", "net.3", "net.2", "net.1", "net.0")
    assert "net.4 (relu) and 4 more (net.3 (relu), net.2 (relu), ...)" in found.message


def test_findings_are_text_dicts_and_markdown_worst_first():
    tags = {"dead_units__net.1": [0.0, 0.9, 0.9], "input_std__net.3": [0.0] * 3}
    found = diagnose(history(**tags), [RELU, TANH])
    assert kinds(found) == ["constant_input", "dead_units"]
    assert str(found).startswith("1. The input of net.3")
    assert found.as_dicts()[1]["where"] == ("net.1",)
    assert found.as_markdown().splitlines()[1].startswith("2. **90 % of the units of net.1 (relu)")
    assert str(Findings()) == "No findings."
    assert isinstance(found[0], Finding)
    assert diagnose([], [RELU]) == []


@pytest.mark.parametrize(
    ("name", "value"), [("dead_units", 0), ("saturation", 1.1), ("exploding", 0.5), ("rejected", -1)]
)
def test_thresholds_refuse_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Thresholds(**{name: value})


# --- Networks -----------------------------------------------------------------------------------------------


def perceptron(depth, activation, initialize, width=64):
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        initialize(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def he(weight):
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def lecun(weight):
    nn.init.kaiming_normal_(weight, nonlinearity="linear")


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.norms[1](self.second(self.act(self.norms[0](self.first(x)))))
        return F.relu(x + y)


def convolutional():
    blocks = [Residual(16) for _ in range(4)]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def transformer():
    layers = [
        nn.TransformerEncoderLayer(32, 4, 64, 0.1, nn.GELU(), batch_first=True, norm_first=True) for _ in range(4)
    ]
    return nn.Sequential(nn.Unflatten(1, (2, 32)), *layers, nn.Flatten(), nn.Linear(64, 10))


HEALTHY = {
    "he 5": lambda: perceptron(5, nn.ReLU, he),
    "he 30": lambda: perceptron(30, nn.ReLU, he),
    "torch's own": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "xavier tanh 10": lambda: perceptron(10, nn.Tanh, nn.init.xavier_normal_),
    "xavier tanh 30": lambda: perceptron(30, nn.Tanh, nn.init.xavier_normal_),
    "lecun selu 20": lambda: perceptron(20, nn.SELU, lecun),
    "he gelu 8": lambda: perceptron(8, nn.GELU, he),
    "residual": convolutional,
    "transformer": transformer,
    "outputs": lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10), nn.Sigmoid()),
}


def data(count=1):
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(64, 10, generator=generator)
    xs = [torch.randn(64, 64, generator=generator) for _ in range(count)]
    return [(x, (x @ truth).argmax(1)) for x in xs]


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_network_has_no_findings_at_first_and_while_it_learns(name):
    torch.manual_seed(0)
    model = HEALTHY[name]()
    report = signal_report(model, data()[0], F.cross_entropy)
    assert report.findings == [], name
    monitor = ActivationMonitor(statistics="all", every_n_steps=5)
    fit = Net(model, lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    quiet_trainer(callbacks=[monitor]).fit(fit, loader(data(60)))
    assert len(monitor.report.sites) == len(report.sites)
    assert monitor.report.findings == [], name


SICK = {
    "xavier relu 20": (lambda: perceptron(20, nn.ReLU, nn.init.xavier_normal_), "vanishing_signal"),
    "small weights": (lambda: perceptron(10, nn.ReLU, lambda w: nn.init.normal_(w, std=0.01)), "vanishing_signal"),
    "large weights": (lambda: perceptron(10, nn.ReLU, lambda w: nn.init.normal_(w, std=1.0)), "exploding_signal"),
    "sigmoid 10": (lambda: perceptron(10, nn.Sigmoid, nn.init.xavier_normal_), "vanishing_gradient"),
    "saturated tanh": (lambda: perceptron(6, nn.Tanh, lambda w: nn.init.normal_(w, std=1.0)), "saturation"),
    "zeros": (lambda: perceptron(5, nn.ReLU, nn.init.zeros_), "constant_input"),
}


@pytest.mark.parametrize("name", SICK)
def test_sick_network_has_its_finding_at_the_top(name):
    torch.manual_seed(0)
    make, kind = SICK[name]
    assert signal_report(make(), data()[0], F.cross_entropy).findings[0].kind == kind


def test_units_that_die_in_training_are_found_and_dated():
    class Dies(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 10:
                self.net[0].bias.data[:40] = -30.0

    torch.manual_seed(0)
    monitor = ActivationMonitor(every_n_steps=1, warn=True)
    model = Dies(perceptron(3, nn.ReLU, he), lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    with pytest.warns(
        UserWarning, match=r"6\d % of the units of net.1 \(relu\) have been dead since step 10"
    ) as record:
        quiet_trainer(callbacks=[monitor]).fit(model, loader(data(20)))
    assert len([each for each in record if "dead" in str(each.message)]) == 1  # once
    (found,) = monitor.report.findings
    assert (found.kind, found.where, found.since) == ("dead_units", ("net.1",), 10)
    assert np.isclose(found.value, 40 / 64, atol=0.05)


def test_report_before_the_first_log_says_that_there_is_none():
    with pytest.raises(RuntimeError, match=r"has logged nothing of a training yet.*log_every_n_steps"):
        _ = ActivationMonitor().report


def test_findings_are_said_at_the_end_and_the_first_batch_is_reported_on_request(caplog):
    torch.manual_seed(0)
    with caplog.at_level("INFO", "lightning_noisy"):
        monitor = ActivationMonitor(every_n_steps=2, signal_report=True)
        model = Net(perceptron(6, nn.Tanh, lambda w: nn.init.normal_(w, std=1.0)))
        L.seed_everything(0, verbose=False)
        quiet_trainer(callbacks=[monitor]).fit(model, loader(data(8)))
    first, last = (
        next(r.message for r in caplog.records if start in r.message) for start in ("The first batch", "found, in")
    )
    assert "net.11  tanh" in first
    assert "saturation" not in last
    assert "flat parts" in last
