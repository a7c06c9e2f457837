import pytest
import torch

from lightning_noisy.functional import largest_slope, slope
from lightning_noisy.metrics import SaturationRate


def rate(h, function, **options):
    metric = SaturationRate(**options)
    metric.update(input=h, slope=slope(function, h))
    return metric.compute().item()


def test_saturation_counts_both_sides_of_tanh_alike():
    h = torch.tensor([-5.0, 5.0, 0.0, 1.0])
    assert rate(h, torch.tanh) == 0.5
    assert rate(h, torch.tanh, side="left") == rate(h, torch.tanh, side="right") == 0.25


@pytest.mark.parametrize("hard", [False, True])
def test_saturation_of_the_sides_adds_up_to_the_total(hard):
    h = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    h[:10] = 0
    left, right, total = (rate(h, torch.nn.Hardtanh(), side=side, hard=hard) for side in ("left", "right", None))
    assert left + right == pytest.approx(total, abs=1e-12)
    assert left == pytest.approx((h <= -1).double().mean().item())
    assert right == pytest.approx((h >= 1).double().mean().item())


def test_saturation_takes_falling_slopes_like_rising_ones():
    h = torch.tensor([-5.0, 0.5, 5.0])
    assert rate(h, lambda x: -x.tanh()) == rate(h, torch.tanh) == pytest.approx(2 / 3)


def test_saturation_at_zero_is_right():
    h = torch.zeros(2)
    assert rate(h, torch.relu, side="right", hard=True) == 1
    assert rate(h, torch.relu, side="left", hard=True) == 0


def test_saturation_is_hard_only_where_the_slope_is_zero():
    h = torch.tensor([-5.0, 5.0])
    assert rate(h, torch.sigmoid, largest_slope=0.25) == 1
    assert rate(h, torch.sigmoid, hard=True) == 0


def test_saturation_is_relative_to_the_largest_slope():
    h = torch.tensor([-3.0, 3.0, 0.0])  # slopes of the sigmoid: 0.045, 0.045, 0.25
    assert rate(h, torch.sigmoid) == pytest.approx(2 / 3)
    assert rate(h, torch.sigmoid, largest_slope=largest_slope(torch.sigmoid).item()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold must be > 0, got 0"),
        ({"threshold": float("nan")}, "threshold must be > 0, got nan"),
        ({"largest_slope": -1.0}, "largest_slope must be > 0, got -1.0"),
        ({"side": "top"}, 'side must be "left", "right" or None, got \'top\''),
    ],
)
def test_saturation_refuses_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        SaturationRate(**options)


def test_saturation_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"input and slope must have the same shape, got .*\(2, 1\)"):
        SaturationRate().update(input=torch.ones(2), slope=torch.ones(2, 1))
