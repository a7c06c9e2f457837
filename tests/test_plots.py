import matplotlib
import numpy as np
import pytest
import torch

from lightning_noisy.plots import plot_activation, plot_r_scores

matplotlib.use("Agg")


def test_plot_of_r_scores_shows_what_the_paper_says():
    axes = plot_r_scores(["relu", "leaky_relu", "tanh", "silu"], sigmas=[0.01, 1.0, 10.0])
    scores = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_allclose(scores["relu"], -0.38318, atol=1e-5)
    second = (1 + 0.01**2) / 2  # both E[φ²] and E[φ′²]; the mean is 0.99 / sqrt(2 pi)
    np.testing.assert_allclose(scores["leaky_relu"], np.log(1 - 0.99**2 / (2 * np.pi) / second), atol=1e-6)
    for name in ("tanh", "silu"):
        assert abs(scores[name][0]) < 1e-3
        assert (np.asarray(scores[name]) <= 0).all()


def test_plot_of_an_activation_shows_its_expectation_and_draws():
    before = torch.get_rng_state()
    curve, points = plot_activation("nah(alpha=1.0, c=2.0)", draws=200).get_lines()
    assert len(points.get_xdata()) == 200
    x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    inside = np.abs(x) <= 1
    np.testing.assert_allclose(y[inside], x[inside], atol=1e-6)
    delta = np.clip(x, -1, 1) - x
    sigma = 2 * (1 / (1 + np.exp(-delta)) - 0.5) ** 2
    expected = np.clip(x, -1, 1) - np.where(x >= 0, 1, -1) * sigma * np.sqrt(2 / np.pi)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_plot_of_a_derivative():
    (curve,) = plot_activation("tanh", derivative=True).get_lines()
    np.testing.assert_allclose(curve.get_ydata(), 1 - np.tanh(curve.get_xdata()) ** 2, atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'rellu' is not the name of an activation"):
        plot_activation("rellu")
