import math

import numpy as np
import pytest
import torch

from lightning_noisy.functional import noisy
from lightning_noisy.functional.noisy import HARD, HardFunction

X = np.linspace(-6, 6, 49)


def numpy_hard(name, x):
    u = 0.25 * x + 0.5 if name == "sigmoid" else x
    return {"tanh": np.clip(u, -1, 1), "sigmoid": np.clip(u, 0, 1), "relu": np.maximum(u, 0)}[name], u


def numpy_output(name, x, epsilon, p, c, alpha):
    """Algorithm 1 of the paper, line by line."""
    h, u = numpy_hard(name, x)
    delta = h - u
    sgn = np.where(x >= 0, 1, -1)
    d = -sgn * (1 if 1 - alpha >= 0 else -1)
    sigma = c * (1 / (1 + np.exp(-p * delta)) - 0.5) ** 2
    return alpha * h + (1 - alpha) * u + d * sigma * epsilon


@pytest.mark.parametrize("name", HARD)
def test_hard_functions_are_the_papers(name):
    h, u = numpy_hard(name, X)
    np.testing.assert_array_equal(HARD[name].hard(torch.tensor(X)).numpy(), h)
    np.testing.assert_array_equal(HARD[name].linear(torch.tensor(X)).numpy(), u)


def test_the_hard_sigmoid_has_the_sigmoids_slope_and_is_not_torchs():
    x = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    assert HARD["sigmoid"].hard(x).tolist() == [0.0, 0.5, 1.0]
    assert torch.nn.functional.hardsigmoid(x).tolist() != [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("alpha", [0.9, 1.0, 1.15])
@pytest.mark.parametrize("p", [-0.7, 0.0, 1.3])
def test_output_noise_equals_the_papers_algorithm(name, alpha, p):
    epsilon = np.random.default_rng(0).normal(size=X.shape)
    x, noise, slope = (torch.tensor(values, dtype=torch.float64) for values in (X, epsilon, [p]))
    y = noisy.output_noise(x, noise, slope, 2.0, function=HARD[name], alpha=alpha)
    np.testing.assert_allclose(y.numpy(), numpy_output(name, X, epsilon, p, 2.0, alpha), rtol=1e-12, atol=1e-12)


def test_noise_at_zero_and_alpha_one_goes_down():  # sgn(0) = 1: d = -sgn(x)
    function = HardFunction(lambda x: 0 * x, lambda x: x - 1)
    y = noisy.output_noise(torch.zeros(1), torch.ones(1), torch.ones(1), 4.0, function=function, alpha=1.0)
    assert y.item() == pytest.approx(-4 * (1 / (1 + math.exp(-1)) - 0.5) ** 2)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("half_normal", [False, True])
def test_expected_output_noise_is_the_mean(name, half_normal):
    x, p = torch.tensor(X), torch.tensor([1.3], dtype=torch.float64)
    options = {"function": HARD[name], "alpha": 1.15, "half_normal": half_normal}
    expected = noisy.expected_output_noise(x, p, 2.0, **options)
    mean = math.sqrt(2 / math.pi) if half_normal else 0.0
    np.testing.assert_allclose(expected.numpy(), numpy_output(name, X, mean, 1.3, 2.0, 1.15), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("sigma", [0.0, 0.05, 1.0, 7.0])
def test_expected_input_noise_is_the_integral(name, sigma):
    nodes = np.linspace(-10, 10, 400_001)
    weights = np.exp(-(nodes**2) / 2) / np.sqrt(2 * np.pi) * (nodes[1] - nodes[0])
    x = X[::6]
    integral = [(numpy_hard(name, at + sigma * nodes)[0] * weights).sum() for at in x]
    expected = noisy.expected_input_noise(torch.tensor(x), sigma, function=HARD[name])
    np.testing.assert_allclose(expected.numpy(), integral, atol=1e-8)
    # Another pair of functions has no closed form: its quadrature is close.
    own = HardFunction(HARD[name].hard, HARD[name].linear)
    near = noisy.expected_input_noise(torch.tensor(x), sigma, function=own)
    np.testing.assert_allclose(near.numpy(), integral, atol=0.02 * max(1, sigma))


def test_expected_input_noise_survives_float32_without_noise():
    x = torch.tensor([-1e6, -1.0, -0.5, 0.0, 0.5, 1.0, 1e6])
    assert torch.equal(noisy.expected_input_noise(x, 0.0, function=HARD["tanh"]), x.clamp(-1, 1))


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("alpha", [0.9, 1.15])
def test_gradients_of_output_noise(name, alpha):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4, 5, dtype=torch.float64, generator=generator)
    epsilon = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    p = torch.tensor([0.3, -0.8, 0.0, 1.0, 0.5], dtype=torch.float64)

    def run(x, p, c):
        return noisy.output_noise(x, epsilon, p, c, function=HARD[name], alpha=alpha)

    inputs = (x.requires_grad_(), p.requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", HARD)
def test_gradients_of_input_noise(name):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(20, dtype=torch.float64, generator=generator)).requires_grad_()
    xi = torch.randn(20, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: noisy.input_noise(x, xi, 0.3, function=HARD[name]), (x,))
    assert torch.autograd.gradcheck(lambda x: noisy.expected_input_noise(x, 0.3, function=HARD[name]), (x,))
