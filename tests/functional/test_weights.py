import numpy as np
import pytest
import torch

from lightning_noisy.functional import gradient_variance, update_ratio, weight_mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weight_formulas_equal_numpy_in_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    old = (torch.randn(200, 300, generator=generator) - 0.5).to(dtype)
    new = (old + 0.01 * torch.randn(200, 300, generator=generator)).to(dtype)
    w, moved = old.double().numpy(), new.double().numpy()
    assert weight_mean(old).item() == pytest.approx(-w.sum() / w.size, rel=1e-12)
    assert gradient_variance(old).item() == pytest.approx(np.var(w), rel=1e-12)
    expected = np.sqrt(((moved - w) ** 2).sum() / (w**2).sum())
    assert update_ratio(old, new).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_variance_does_not_underflow_where_gradients_vanish():
    gradient = 1e-30 * torch.tensor([1.0, -1.0])
    assert gradient.var(correction=0) == 0  # in float32
    assert gradient_variance(gradient).item() == pytest.approx(1e-60, rel=1e-6)


def test_gradient_variance_survives_a_large_mean():
    gradient = 1e4 + torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert gradient_variance(gradient).item() == pytest.approx(1, abs=0.02)


def test_update_ratio_of_a_scaled_matrix_is_the_scale():
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert update_ratio(weight, 0.99 * weight).item() == pytest.approx(0.01)
    assert update_ratio(torch.zeros(2), torch.ones(2)).isinf()


def test_weight_formulas_give_no_gradient():
    weight = torch.ones(2, 2, requires_grad=True)
    results = weight_mean(weight), gradient_variance(weight), update_ratio(weight, weight)
    assert not any(result.requires_grad for result in results)
