"""Norms of gradient and noise, and noise relative to the gradient."""

import contextlib

import pytest
import torch
from helpers import SpySGD, zero_gradient_sgd
from torch import nn

from lightning_noisy import add_gradient_noise
from lightning_noisy.schedules import Constant


def test_relative_noise_has_a_fixed_ratio_to_the_gradient():
    (a, b), optimizer = zero_gradient_sgd(30_000, (200, 300))
    handle = add_gradient_noise(optimizer, Constant(0.5), relative=True)
    for size in (0.01, 100.0):
        for p in (a, b):
            p.grad = torch.full_like(p, size)
        optimizer.step()
        for p in (a, b):
            assert p.grad.std().item() == pytest.approx(0.5 * size, rel=0.02)
        assert handle.last_step.std == pytest.approx(0.5 * size, rel=1e-5)
    a.grad = torch.full_like(a, float("inf"))
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert b.grad.unique().tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_gradients_are_computed_in_float32(dtype):
    w = nn.Parameter(torch.zeros(100_000, dtype=dtype))
    w.grad = torch.full_like(w, 300.0)
    optimizer = torch.optim.SGD([w], lr=0.0)
    handle = add_gradient_noise(optimizer, Constant(0.1), relative=True)
    optimizer.step()
    assert handle.last_step.grad_norm.item() == pytest.approx(300 * 100_000**0.5, rel=2e-4)
    assert w.grad.float().std().item() == pytest.approx(30, rel=0.02)


def test_norms_are_measured_before_the_noise_when_asked_for():
    parameters, optimizer = zero_gradient_sgd(3, (200, 200))
    embedding = nn.Embedding(9, 4, sparse=True)
    optimizer.add_param_group({"params": list(embedding.parameters())})
    handle = add_gradient_noise(optimizer, Constant(2.0))
    embedding(torch.tensor([1, 1, 3])).sum().backward()  # rows (2, 2, 2, 2) and (1, 1, 1, 1)
    for parameter in parameters:
        parameter.grad.fill_(0.5)
    optimizer.step()
    assert handle.last_step.grad_norm is None
    handle.measuring = True
    for parameter in parameters:
        parameter.grad.fill_(0.5)
    embedding.weight.grad = None
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    assert handle.last_step.grad_norm.item() == pytest.approx((40_003 / 4 + 20) ** 0.5)
    assert handle.last_step.noise_norm == pytest.approx(2.0 * (40_003 + 8) ** 0.5)  # two rows of the table


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.5), (2.0, 0.0), (1.0, 0.5)])
def test_relative_noise_has_the_scale_of_its_group(scales):
    parameters = [nn.Parameter(torch.zeros(20_000)) for _ in scales]
    groups = [{"params": [p], "noise_scale": scale} for p, scale in zip(parameters, scales, strict=True)]
    optimizer = SpySGD(groups)
    handle = add_gradient_noise(optimizer, Constant(0.1), relative=True)
    for size, parameter in zip((1.0, 7.0), parameters, strict=True):
        parameter.grad = torch.full((20_000,), size)
    optimizer.step()
    rms = 1.0 if not scales[1] else 5.0  # sqrt((1 + 49) / 2); a group without noise doesn't count
    assert handle.last_step.std == pytest.approx(0.1 * rms)
    for gradient, scale in zip(optimizer.seen[0], scales, strict=True):
        assert gradient.std().item() == pytest.approx(0.1 * rms * scale, rel=0.02)


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_every_noise_of_an_optimizer_is_relative_to_the_gradient_without_any(closure):
    weight = nn.Parameter(torch.zeros(10_000))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    loud = add_gradient_noise(optimizer, Constant(1.0), stream=0)
    relative = add_gradient_noise(optimizer, Constant(1.0), stream=1, relative=True)
    relative.measuring = loud.measuring = True
    weight.grad = torch.full_like(weight, 0.001)
    optimizer.step(closure)
    assert relative.last_step.std == pytest.approx(0.001, rel=1e-5)
    assert relative.last_step.grad_norm.item() == loud.last_step.grad_norm.item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-24, 1e-12, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_relative_noise_of_tiny_and_huge_gradients(magnitude, dtype):
    w = nn.Parameter(torch.zeros(10_000, dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(2.0), relative=True)
    w.grad = torch.full_like(w, magnitude)
    given = w.grad.double().clone()
    optimizer.step()
    noise = (w.grad.double() - given) / given
    assert noise.std().item() == pytest.approx(2.0, rel=0.03)
    assert handle.last_step.std == pytest.approx(2 * given[0].item(), rel=1e-5)


def test_relative_noise_that_float32_can_not_hold_is_refused():
    w = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=1.0)
    add_gradient_noise(optimizer, Constant(2.0), relative=True)
    w.grad = torch.full_like(w, 1e200)
    with pytest.raises(ValueError, match="a finite float32, got 2.0.*e[+]200 at step 0"):
        optimizer.step()


def test_relative_noise_of_gradients_without_elements_or_values():
    v, w = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([v, w], lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(2.0), relative=True)
    for parameter in (v, w):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (handle.step, handle.last_step.std, w.count_nonzero()) == (1, 0, 0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_relative_noise_leaves_a_gradient_that_is_not_finite(bad):
    (w,), optimizer = zero_gradient_sgd(10)
    add_gradient_noise(optimizer, Constant(2.0), relative=True)
    w.grad[3] = bad
    expected = w.grad.clone()
    optimizer.step()
    torch.testing.assert_close(w.grad, expected, equal_nan=True)


def test_last_step_is_that_of_the_gradient_that_was_used():
    class Fails(torch.optim.SGD):
        broken = True

        @torch.no_grad()
        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("broken")
            return super().step()

    w = torch.nn.Parameter(torch.zeros(100))
    optimizer = Fails([w], lr=0.1)
    handle = add_gradient_noise(optimizer, Constant(0.0))
    handle.measuring = True
    for value, broken in ((1.0, True), (2.0, False)):  # another gradient at the same t
        w.grad = torch.full_like(w, value)
        optimizer.broken = broken
        with contextlib.suppress(RuntimeError):
            optimizer.step()
    assert (handle.step, handle.last_step.t) == (1, 0)
    assert handle.last_step.grad_norm.item() == pytest.approx(20)
    handle.load_state_dict({"seed": 0, "stream": 0, "step": 0})
    assert handle.last_step is None
