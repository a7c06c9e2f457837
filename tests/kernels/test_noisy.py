"""The compiled noise on the output, and the step of the LSTM's backward pass, against torch's operations in float64."""

import pytest
import torch
from helpers import HAS_COMPILER

from lightning_noisy.functional import noisy as formulas
from lightning_noisy.kernels import lstm, noisy
from lightning_noisy.kernels.noisy import Line

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 37, 3000])  # the last one in two threads
@pytest.mark.parametrize("alpha", [0.9, 1.0, 1.15])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", sorted(formulas.HARD))
def test_values_slopes_and_derivatives_are_those_of_the_formulas(name, half, alpha, rows):
    h, columns = formulas.HARD[name], 201
    wide, blocks = 4 * normal(rows, 2 * columns), normal(3, rows + 5, columns // 3, seed=1)[:, 5:]
    x, noise = wide[:, :columns], blocks.transpose(0, 1).reshape(rows, columns)
    p, c, gradient = normal(columns, seed=2), normal(columns, seed=3).abs(), normal(rows, columns, seed=4)
    line = Line(h.slope, h.offset, *h.bounds, alpha, 0.0, half)
    slope = torch.empty(rows, columns)
    value = noisy.output_noise(x, blocks, p, c, line, slope=slope)
    assert torch.equal(noisy.output_noise(x, blocks, p, c, line), value)
    sums = noisy.derivative_by_p(x, blocks, p, c, line, gradient)

    leaf, weight = x.double().requires_grad_(), p.double().requires_grad_()
    epsilon = noise.double().abs() if half else noise.double()
    expected = formulas.output_noise(leaf, epsilon, weight, c.double(), function=h, alpha=alpha)
    (of_x,) = torch.autograd.grad(expected.sum(), leaf, retain_graph=True)
    (of_p,) = torch.autograd.grad(expected, weight, gradient.double())
    torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(slope.double(), of_x, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(sums.double(), of_p, rtol=1e-4, atol=1e-5 * rows**0.5)


def test_level_stands_for_the_noise():
    x, one = 3 * normal(5, 7), torch.ones(7)
    line = Line(1, 0, -1, 1, 1.15, 0.8)
    expected = noisy.output_noise(x, torch.full((1, 5, 7), 0.8), one, one, line._replace(level=0.0))
    assert torch.equal(noisy.output_noise(x, None, one, one, line), expected)


def test_extreme_inputs_stay_finite_and_nan_is_kept():
    x = torch.tensor([[1e30, -1e30, 0.0, float("nan")]])
    slope = torch.empty(1, 4)
    options = torch.full((4,), 1.0), torch.full((4,), 30.0), Line(1, 0, -1, 1, 1.0)
    value = noisy.output_noise(x, torch.ones(1, 1, 4), *options, slope=slope)
    assert value[0, :3].tolist() == pytest.approx([1 - 30 / 4, -1 + 30 / 4, 0.0])  # towards 0, as α is 1
    assert value[0, 3].isnan()
    assert slope[0, :3].tolist() == [0, 0, 1]


def test_step_of_the_backward_pass_is_that_of_torch():
    rows, hidden = 5, 19
    h, c, o, g, cell = (normal(rows, hidden, seed=seed) for seed in range(5))
    gates, f = normal(rows, 2, hidden, seed=6), normal(rows, 3 * hidden, seed=7)[:, hidden : 2 * hidden]
    found, expected = [], []
    for step, results in ((lstm._step_of(h), found), (lstm._backward_step, expected)):
        after, z = c.clone(), torch.empty(rows, 4 * hidden)
        step(h, after, gates, o, g, cell, f, z)
        kept = torch.empty(2, rows, hidden)
        step(h, other := c.clone(), gates, o, g, cell, f, z, *kept)
        assert torch.equal(other, after)
        results += [after, z, kept]
    assert lstm._step_of(h) is not lstm._backward_step
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
