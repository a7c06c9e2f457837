import numpy as np
import pytest
import torch

from lightning_noisy.metrics import EffectiveRank


def rank(x, **options):
    metric = EffectiveRank(x.shape[1], **options)
    metric.update(output=x)
    return metric.compute().item()


def test_effective_rank_counts_orthogonal_directions_of_equal_size():
    q = torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert rank(q) == pytest.approx(8)
    assert rank(q * torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])) == pytest.approx(3)


def test_effective_rank_of_many_units_that_follow_one_is_one():
    x = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert rank(x * torch.linspace(-1, 1, 300, dtype=torch.float64)) == pytest.approx(1, abs=1e-9)


def test_effective_rank_without_the_mean_is_that_of_the_covariance():
    x = torch.randn(2000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    assert rank(x) == pytest.approx(1, abs=0.01)
    sigma = np.sqrt(np.linalg.eigvalsh(np.cov(x.numpy().T)))
    p = sigma / sigma.sum()
    assert rank(x, centred=True) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_effective_rank_takes_channels_of_positions():
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert rank(x) == pytest.approx(rank(x.permute(0, 2, 3, 1).reshape(-1, 3)), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_effective_rank_of_nothing_finite_is_undefined(value):
    assert np.isnan(rank(torch.full((4, 3), value)))
    assert np.isnan(rank(torch.full((4, 3), value), centred=True))
