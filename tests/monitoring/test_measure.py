import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_noisy.functional.scores import gains
from lightning_noisy.kernels import sums
from lightning_noisy.monitoring import measure
from lightning_noisy.monitoring.measure import Measured
from lightning_noisy.nn import NAH, NANI, NReLU, NSwish, registry
from lightning_noisy.nn.gpn import GPNActivation

ALL = ("left", "hard", "magnitude", "level")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums_of(function, h, *, unit_dim=-1, threshold=0.05):
    measured = Measured(function, threshold=threshold, wanted=ALL)
    sums = measured.before(h, unit_dim)
    return measured.after(function(h.clone()), sums, unit_dim)


def numpy_oracle(phi, dphi, largest, h, threshold=0.05):
    """The columns for units in the last dimension, in float64 NumPy."""
    h = h.double().numpy()
    y, slope = phi(h), dphi(h)
    flat = np.abs(slope) < threshold * largest
    columns = {
        "count": h.size, "x": h.sum(), "xx": (h**2).sum(), "y": y.sum(), "yy": (y**2).sum(), "slopes": (slope**2).sum(),
        "saturated": flat.sum(), "left": (flat & (h < 0)).sum(), "hard": (slope == 0).sum(), "inactive": (y <= 0).sum(),
    }  # fmt: skip
    rows = slope.reshape(-1, h.shape[-1])
    return columns, (rows != 0).any(0), np.abs(y).reshape(-1, h.shape[-1]).sum(0)


def sigmoid(h):
    return 1 / (1 + np.exp(-h))


CASES = {
    "relu": (F.relu, lambda h: np.maximum(h, 0), lambda h: (h > 0) * 1.0, 1.0),
    "tanh": (nn.Tanh(), np.tanh, lambda h: 1 / np.cosh(h) ** 2, 1.0),
    "sigmoid": (torch.sigmoid, sigmoid, lambda h: sigmoid(h) * sigmoid(-h), 0.25),
    "hardtanh": (nn.Hardtanh(), lambda h: np.clip(h, -1, 1), lambda h: (np.abs(h) < 1) * 1.0, 1.0),
    "leaky": (nn.LeakyReLU(0.2), lambda h: np.where(h > 0, h, 0.2 * h), lambda h: np.where(h > 0, 1.0, 0.2), 1.0),
    "softplus": (nn.Softplus(), lambda h: np.log1p(np.exp(h)), sigmoid, 1.0),
}


@pytest.mark.parametrize("shape", [(40,), (8, 5), (2, 3, 7), (3000, 2, 100)])  # the last one in several parts
@pytest.mark.parametrize("name", CASES)
def test_sums_equal_those_of_numpy(name, shape):
    function, phi, dphi, largest = CASES[name]
    h = 2 * normal(*shape) + 0.3
    sums = sums_of(function, h)
    expected, alive, level = numpy_oracle(phi, dphi, largest, h)
    if name in ("tanh", "sigmoid"):  # whose slopes round to 0 in float32
        del expected["hard"]
    # An element or two are at the threshold.
    assert {key: sums[key] for key in expected} == pytest.approx(expected, rel=5e-5, abs=1e-3)
    assert (sums.alive > 0).tolist() == alive.tolist()
    assert sums.levels.numpy() == pytest.approx(level, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", sorted(set(registry.PLAIN) - {"rrelu", "prelu"}))
def test_gains_of_normal_input_match_quadrature(name, sigma):
    function = registry.create(name)
    sums = sums_of(function, sigma * normal(2000, 100))
    expected, count = gains(function, sigma), sums["count"]
    var = sums["xx"] / count - (sums["x"] / count) ** 2
    var_y = sums["yy"] / count - (sums["y"] / count) ** 2
    # Four standard errors of a mean of 200,000 squares with a kurtosis of up to 15.
    assert sums["yy"] / count / var == pytest.approx(expected.rho, rel=0.035)
    assert sums["slopes"] / count == pytest.approx(expected.rho_prime, rel=0.035, abs=1e-9)
    r_score = math.log(var_y / (var * sums["slopes"] / count))
    assert r_score == pytest.approx(expected.r_score, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_of_other_dtypes_are_those_of_their_values(dtype):
    h = (300 * normal(100, 20)).to(dtype)
    expected, _, _ = numpy_oracle(lambda h: np.maximum(h, 0), lambda h: (h > 0) * 1.0, 1.0, h)
    sums = sums_of(F.relu, h)
    assert {key: sums[key] for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (0.0, 1e-20), (1.0, 1e-3), (0.0, 1e25)])
def test_variance_survives_any_scale(mean, deviation):
    h = mean + deviation * normal(1000, 50)
    sums = sums_of(nn.Identity(), h)
    count = sums["count"]
    variance = sums["xx"] / count - (sums["x"] / count) ** 2
    assert variance == pytest.approx(h.double().numpy().var(), rel=1e-3)


def test_sums_do_not_depend_on_the_device_path(monkeypatch):
    """Elsewhere than on the CPU nothing waits for values: the same by tensors, in one part."""
    h = normal(500, 30) + 1
    expected = sums_of(nn.Tanh(), h)
    monkeypatch.setattr(measure, "scalar", lambda x: x.double())
    monkeypatch.setattr(sums, "scalar", lambda x: x.double())
    monkeypatch.setattr(sums, "_FAR", 0.0)
    monkeypatch.setattr(measure, "element_sums", sums.reference_sums)
    found = sums_of(nn.Tanh(), h)
    assert all(isinstance(found[key], torch.Tensor) for key in ("x", "yy", "saturated", "left", "inactive"))
    assert {key: float(value) for key, value in found.items()} == pytest.approx(dict(expected), rel=1e-5)


def test_unit_that_fires_once_is_alive():
    h = torch.full((50, 4), -1.0)
    h[7, 2] = 1.0
    assert sums_of(nn.ReLU(), h).alive.tolist() == [0, 0, 1, 0]


def test_units_are_channels_of_images():
    h = torch.full((5, 3, 4, 4), -1.0)
    h[:, 1, 0, 0] = 2.0
    for images in (h, h.to(memory_format=torch.channels_last)):
        found = sums_of(nn.ReLU(), images, unit_dim=1)
        assert found.alive.tolist() == [0, 1, 0]
        assert found.levels.tolist() == [0, 10, 0]


def test_unit_that_leaks_is_not_dead():
    h = torch.full((50, 4), -1.0)
    assert sums_of(nn.LeakyReLU(), h).alive.gt(0).all()
    assert sums_of(nn.Hardtanh(), 5 * h).alive.eq(0).all()


@pytest.mark.parametrize("make", [NReLU, NSwish, lambda: GPNActivation(nn.Tanh())])
def test_normalized_activation_is_measured_with_its_factor_and_judged_without(make):
    module = make()
    plain = module.function
    h = normal(500, 20)
    module(h)  # sets the running statistics
    module.eval()
    sums, inside = sums_of(module, h), sums_of(plain, h)
    scale = float(torch.as_tensor(module.scale).detach())
    assert sums["slopes"] == pytest.approx(scale**2 * inside["slopes"], rel=1e-5)
    y = module(h).detach().double().numpy()
    assert (sums["y"], sums["yy"]) == pytest.approx((y.sum(), (y**2).sum()), rel=1e-5, abs=1e-2)
    assert [sums[key] for key in ("saturated", "hard", "inactive")] == [
        inside[key] for key in ("saturated", "hard", "inactive")
    ]


def test_noisy_activation_is_measured_without_another_draw():
    module = NAH("tanh", c=1.0)
    measured = Measured(module, threshold=0.05, wanted=ALL)
    h = 3 * normal(400, 50)
    before = module.noise_state.clone()
    sums = measured.before(h, -1)
    assert torch.equal(module.noise_state, before)
    x = h.double().numpy()
    assert sums["saturated"] == (np.abs(x) > 1).sum()
    assert sums["magnitude"] == pytest.approx((np.abs(x) - 1).clip(0).sum(), rel=1e-5)
    y = module(h).detach()
    measured.after(y, sums, -1)
    assert sums["yy"] == pytest.approx((y.double().numpy() ** 2).sum(), rel=1e-5)


def test_slope_of_a_noisy_activation_is_that_of_its_expectation():
    module = NANI("tanh", c=0.5)
    measured = Measured(module, threshold=0.05)
    h = torch.linspace(-3.003, 2.997, 601)  # beside the bounds, where autograd takes the slope of |x| at 0
    mean = module.eval()(h.double()).detach().numpy()
    module.train()
    slopes = measured.before(h, -1)["slopes"]
    assert slopes == pytest.approx((np.gradient(mean, 0.01) ** 2).sum(), rel=1e-3)


def test_module_of_a_user_is_measured_on_a_copy():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return torch.rand(()) * 0 + 2 * x

    module = Counts()
    state = torch.get_rng_state()
    sums = Measured(module, threshold=0.05).before(normal(10, 3), -1)
    assert (module.calls, module.seen.item()) == (0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert sums["slopes"] == 4 * 30
