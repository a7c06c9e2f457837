import numpy as np
import pytest
import torch

from lightning_noisy.functional import dormant_scores, effective_rank
from lightning_noisy.functional.log_bins import LogBins
from lightning_noisy.functional.units import over_samples, unit_dim_of


@pytest.mark.parametrize(
    ("shape", "unit_dim", "expected"),
    [
        ((), None, 0),
        ((), -1, 0),
        ((5,), None, 0),
        ((8, 5), None, 1),
        ((8, 7, 5), None, 2),
        ((8, 5, 3, 3), None, 1),
        ((8, 5, 3, 3, 3), None, 1),
        ((8, 3, 3, 5), -1, 3),
        ((8, 5, 7), 1, 1),
    ],
)
def test_unit_dim_of_is_channels_of_images_and_the_last_dimension_else(shape, unit_dim, expected):
    x = torch.ones(shape)
    dim = unit_dim_of(x.dim(), unit_dim)
    assert dim == expected
    over = over_samples(x, dim)
    assert (x.sum(over) if over else x).numel() == (5 if shape else 1)


def test_unit_dim_of_refuses_a_dimension_that_is_not_there():
    with pytest.raises(ValueError, match=r"unit_dim must be in \[-2, 1\] for 2 dimensions, got 2"):
        unit_dim_of(2, 2)


@pytest.mark.parametrize("unit_dim", [2, -2])
def test_over_samples_leaves_only_the_units(unit_dim):
    x = torch.zeros(2, 3, 4, 5)
    assert x.sum(over_samples(x, unit_dim)).shape == (4,)


def test_dormant_scores_are_relative_to_the_mean_unit_and_do_not_change_with_scale():
    magnitude = torch.tensor([0.0, 1e-6, 2.0, 6.0], dtype=torch.float64)
    scores = dormant_scores(magnitude)
    assert scores.tolist() == pytest.approx([0, 5e-7, 1, 3], rel=1e-5)
    torch.testing.assert_close(dormant_scores(1e-30 * magnitude), scores)
    assert dormant_scores(torch.zeros(3)).tolist() == [0, 0, 0]


def test_effective_rank_of_equal_singular_values_is_their_number():
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])).item() == pytest.approx(3)
    assert effective_rank(torch.tensor([7.0])).item() == 1
    assert 1 < effective_rank(torch.tensor([1.0, 0.01])).item() < 1.1
    assert effective_rank(torch.zeros(3)).isnan()


def test_effective_rank_of_two_unequal_values_is_the_closed_form():
    # p = 1/4 and 3/4: exp(H) = 4 / 3^(3/4).
    assert effective_rank(torch.tensor([1.0, 3.0], dtype=torch.float64)).item() == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("error", [0.01, 0.2])
def test_log_bins_are_as_exact_as_they_say(error, dtype):
    bins = LogBins(error, 1e-3, 1e3)
    x = torch.logspace(-2.99, 2.99, 5001, dtype=torch.float64).to(dtype)
    x = torch.cat([-x, x])
    found, exact = bins.values()[bins.index(x)].double(), x.double()
    off = ((found - exact) / exact).abs().max().item()
    assert off <= error * (1 + 1e-3)
    assert off > error * 0.9  # no more bins than it takes


def test_log_bins_keep_zero_apart_and_clamp_what_is_too_small_or_too_large():
    bins = LogBins(0.01, 1e-3, 1e3)
    x = torch.tensor([-torch.inf, -1e30, -1e-30, -0.0, 0.0, 1e-30, 1e30, torch.inf, torch.nan])
    found = bins.values()[bins.index(x)]
    expected = [-1e3, -1e3, -1e-3, 0, 0, 1e-3, 1e3, 1e3, 0]
    np.testing.assert_allclose(found, expected, rtol=0.011)


def test_log_bins_are_in_ascending_order_and_as_many_as_their_number():
    bins = LogBins(0.05, 0.1, 10.0)
    assert len(bins.values()) == len(bins) == 2 * bins.per_sign + 1
    assert (bins.values().diff() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1e-3, 1e3), r"relative_error must be in \(0, 1\), got 0.0"),
        ((1.0, 1e-3, 1e3), r"relative_error must be in \(0, 1\), got 1.0"),
        ((0.1, 0.0, 1.0), r"magnitudes must be 0 < smallest < largest, got \(0.0, 1.0\)"),
        ((0.1, 2.0, 1.0), r"magnitudes must be 0 < smallest < largest, got \(2.0, 1.0\)"),
    ],
)
def test_log_bins_refuse_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogBins(*arguments)
