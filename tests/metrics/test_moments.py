import math

import pytest
import torch

from lightning_noisy.functional import slope
from lightning_noisy.metrics import ActivationMoments, AnactScore, RScore

METRICS = (ActivationMoments, RScore, AnactScore)


def add(metric, function, h):
    metric.update(input=h, output=function(h), slope=slope(function, h))


def test_moments_survive_a_large_mean():
    metric = ActivationMoments()
    for part in 1e4 + torch.randn(4, 10_000, generator=torch.Generator().manual_seed(0)):
        add(metric, torch.nn.Identity(), part)
    found = metric.compute()
    assert found["input_var"].item() == pytest.approx(1, abs=0.02)
    assert found["output_mean"].item() == pytest.approx(1e4, abs=0.1)


def test_moments_pool_the_variance_of_the_means():
    metric = ActivationMoments()
    for h in (torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 4.0])):  # variances 1 and 1, means 0 and 3
        add(metric, torch.nn.Identity(), h)
    assert metric.compute()["input_var"].item() == 3.25


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
def test_scores_of_a_constant_input_are_undefined_not_an_error(value):
    moments, r, anact = (cls() for cls in METRICS)
    for size in (7, 3):
        for metric in (moments, r, anact):
            add(metric, torch.tanh, torch.full((size,), value))
    assert moments.compute()["input_var"] == 0
    assert r.compute().isnan()
    assert anact.compute().isnan()


def test_moments_of_constants_have_no_variance_from_rounding():
    for value in torch.linspace(0.1, 10, 60).tolist():
        metric = ActivationMoments()
        for size in (1999, 731, 64):
            add(metric, torch.nn.Identity(), torch.full((size,), value))
        assert metric.compute()["input_var"] == 0


def test_moments_of_small_deviations_are_not_taken_for_rounding():
    metric = ActivationMoments()
    add(metric, torch.nn.Identity(), 1 + 1e-6 * torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert metric.compute()["input_var"].item() == pytest.approx(1e-12, rel=1e-3)


def test_scores_of_a_linear_function_know_its_gain():
    h = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = h - h.mean()
    r, anact = RScore(), AnactScore()
    for metric in (r, anact):
        metric.update(input=h, output=3 * h, slope=torch.full_like(h, 3.0))
    assert r.compute().item() == pytest.approx(0, abs=1e-9)
    assert anact.compute().item() == pytest.approx(math.log(9))


def test_scores_of_a_dead_layer_are_undefined_and_infinite():
    h = torch.tensor([-1.0, -2.0])
    r, anact = RScore(), AnactScore()
    for metric in (r, anact):
        add(metric, torch.relu, h)
    assert r.compute().isnan()
    assert anact.compute().item() == math.inf


def test_moments_are_undefined_from_a_nan_until_the_reset():
    metric = ActivationMoments()
    add(metric, torch.relu, torch.tensor([1.0, math.nan]))
    add(metric, torch.relu, torch.tensor([1.0, 2.0]))
    assert metric.compute()["input_var"].isnan()
    metric.reset()
    add(metric, torch.relu, torch.tensor([1.0, 3.0]))
    assert metric.compute()["input_var"].item() == 1


@pytest.mark.parametrize("cls", METRICS)
def test_moments_refuse_shapes_that_differ(cls):
    h = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"must have the same shape, got .*'slope': \(2,\)"):
        cls().update(input=h, output=h, slope=torch.ones(2))


def test_moments_plot_all_but_the_count():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = ActivationMoments()
    add(metric, torch.relu, torch.tensor([1.0, -2.0]))
    values = [metric.compute(), metric.compute()]
    for shown in (None, values[0], values):
        figure, axes = metric.plot(shown)
        labels = [line.get_label() for line in axes.lines]
        assert "count" not in labels
        assert {"input_var", "rho_prime"} <= set(labels)
        pyplot.close(figure)
    assert "count" in values[0]
