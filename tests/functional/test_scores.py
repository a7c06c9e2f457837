import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_noisy.functional import anact_score, largest_slope, normalization_factor, r_score, rho, rho_prime, slope
from lightning_noisy.functional.scores import gains, gpn_constants
from lightning_noisy.nn.registry import PLAIN


def test_rho_and_rho_prime_of_relu_on_normal_input_are_one_half():
    h = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = h.relu()
    assert rho(h.var(), y.mean(), y.var()).item() == pytest.approx(0.5, abs=0.003)
    assert rho_prime(slope(torch.relu, h)).item() == pytest.approx(0.5, abs=0.002)


def test_normalization_factor_of_relu_at_standard_normal_is_the_closed_form():
    # Var[relu(x)] = 1/2 - 1/(2 pi) and P(x > 0) = 1/2.
    factor = normalization_factor(torch.tensor(0.5 - 0.5 / math.pi).double(), torch.tensor(0.5).double())
    assert factor.item() == pytest.approx(1.5707, abs=5e-5)
    assert factor.item() == pytest.approx(math.sqrt((1 - 0.5 / math.pi) / (0.5 - 0.5 / math.pi)), rel=1e-6)


def test_anact_score_is_zero_only_at_unit_gains():
    one = torch.ones(3)
    assert anact_score(one, one).item() == 0
    assert anact_score(one, torch.tensor([1.0, math.e, 1.0])).item() == pytest.approx(0.5)
    assert anact_score(torch.tensor([math.e**-2]), torch.tensor([1.0])).item() == pytest.approx(1.0)
    assert anact_score(one, torch.tensor([1.0, 0.0, 1.0])).item() == math.inf


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"rrelu"}))
def test_slope_equals_a_central_difference(name):
    function = PLAIN[name]().double()
    x = torch.tensor([-7.3, -2.6, -1.2, -0.41, -0.2, 0.13, 0.77, 1.4, 2.7, 5.1], dtype=torch.float64)
    difference = (function(x + 1e-6) - function(x - 1e-6)) / 2e-6
    torch.testing.assert_close(slope(function, x), difference.detach(), rtol=1e-6, atol=1e-8)


def test_slope_of_swish_is_not_the_misprint_of_the_paper():
    x = torch.tensor([2.0], dtype=torch.float64)
    s, y = torch.sigmoid(x), x * torch.sigmoid(x)
    torch.testing.assert_close(slope(torch.nn.functional.silu, x), y + s * (1 - y))
    assert not torch.allclose(slope(torch.nn.functional.silu, x), y + y * (1 - y))


@pytest.mark.parametrize("inplace", [False, True])
def test_slope_changes_neither_input_nor_random_state(inplace):
    x = torch.tensor([-1.0, -0.5, 2.0])
    before = torch.get_rng_state()
    for function in (
        torch.nn.RReLU(inplace=inplace),
        torch.nn.ELU(inplace=inplace),
        torch.nn.ReLU(inplace=inplace),
    ):
        result = slope(function, x)
        assert not result.requires_grad
        assert result[2] == 1
    assert x.tolist() == [-1.0, -0.5, 2.0]
    assert torch.equal(torch.get_rng_state(), before)


def test_slope_reads_the_options_of_a_module():
    assert slope(torch.nn.LeakyReLU(0.3), torch.tensor([-1.0])).item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(torch.tanh, 1.0), (torch.sigmoid, 0.25), (torch.relu, 1.0), (torch.nn.SELU(), 1.0507 * 1.6733)],
)
def test_largest_slope_equals_the_closed_form(function, expected):
    assert largest_slope(function).item() == pytest.approx(expected, rel=0.01)


GPN = {  # Lu et al. 2020, in the corrected form of the constants: a, and b as the upper root
    "tanh": (nn.Tanh(), 1.4674, 0.3885),
    "relu": (nn.ReLU(), 1.4142, 0.0),
    "elu": (nn.ELU(), 1.2234, 0.0742),
    "selu": (nn.SELU(), 0.9660, 0.2585),
    "leaky_relu": (nn.LeakyReLU(), 1.4141, None),
    "gelu": (nn.GELU(), 1.4811, 0.0739),
}


@pytest.mark.parametrize("name", GPN)
def test_gpn_constants_are_the_published_ones(name):
    function, scale, shift = GPN[name]
    a, b = gpn_constants(function)
    assert a == pytest.approx(scale, abs=5e-5)
    if shift is not None:
        assert b == pytest.approx(shift, abs=6e-5)


def test_gpn_constants_of_a_flat_function_are_refused():
    with pytest.raises(ValueError, match="has no gradient"):
        gpn_constants(lambda x: 0 * x)


def test_gains_of_relu_are_the_closed_forms():
    pi = math.pi
    for sigma in (0.01, 1.0, 30.0):
        at = gains(torch.relu, sigma)
        assert at.mean == pytest.approx(sigma / math.sqrt(2 * pi), rel=1e-9)
        assert at.rho == pytest.approx(0.5, rel=1e-9)
        assert at.centred_rho == pytest.approx((pi - 1) / (2 * pi), rel=1e-9)
        assert at.rho_prime == pytest.approx(0.5, rel=1e-9)
        assert at.r_score == pytest.approx(-0.38318, abs=5e-6)
        assert at.factor == pytest.approx(1.5707, abs=5e-5)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", ["gelu", "tanh", "silu", "hardtanh", "selu", "mish", "hardswish"])
def test_gains_equal_a_sum_on_a_fine_grid(name, sigma):
    function = getattr(nn.functional, name)
    h = np.linspace(-10, 10, 400_001)
    weights = np.exp(-(h**2) / 2) / np.sqrt(2 * np.pi) * (h[1] - h[0])
    x = torch.tensor(h * sigma, requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    values = y.detach().numpy()
    mean = (weights * values).sum()
    at = gains(function, sigma)
    assert at.mean == pytest.approx(mean, rel=1e-6, abs=1e-8)
    assert at.rho == pytest.approx((weights * values**2).sum() / sigma**2, rel=1e-5)
    assert at.centred_rho == pytest.approx((weights * (values - mean) ** 2).sum() / sigma**2, rel=1e-5)
    assert at.rho_prime == pytest.approx((weights * slope.numpy() ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("function", [torch.tanh, nn.functional.silu])
def test_r_score_of_smooth_functions_goes_to_zero_with_sigma(function):
    scores = [abs(gains(function, sigma).r_score) for sigma in (1.0, 0.1, 0.01)]
    assert scores[0] > 10 * scores[1] > 100 * scores[2]


def test_gains_take_modules_with_parameters_and_leave_them():
    prelu = nn.PReLU(init=0.2)
    assert gains(prelu).rho_prime == pytest.approx((1 + 0.2**2) / 2, rel=1e-6)
    assert prelu.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="sigma must be > 0, got 0"):
        gains(prelu, 0)


def test_r_score_of_observed_moments_is_the_closed_form_of_a_uniform_input():
    # h uniform in [-1, 1]: Var[h] = 1/3; ReLU: Var = 1/6 - 1/16, E[slope²] = 1/2; so the ratio is 5/8.
    score = r_score(*(torch.tensor(number, dtype=torch.float64) for number in (1 / 3, 1 / 6 - 1 / 16, 1 / 2)))
    assert score.item() == pytest.approx(math.log(5 / 8))
