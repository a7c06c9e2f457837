import math

import pytest
import torch

from lightning_noisy.metrics import (
    ClassActivations,
    DeadUnits,
    DormantUnits,
    EffectiveRank,
    GradientDormantUnits,
    Sparsity,
)


def test_dead_unit_that_fires_once_on_any_rank_is_alive():
    slope = torch.zeros(32, 3)
    metric, other = DeadUnits(3), DeadUnits(3)
    for _ in range(5):
        metric.update(slope=slope)
        other.update(slope=slope)
    assert metric.compute().item() == 1
    slope[7, 1] = 1
    other.update(slope=slope)
    others = iter(other.metric_state.values())
    metric = DeadUnits(
        3, dist_sync_fn=lambda state, group: [state, next(others)], distributed_available_fn=lambda: True
    )
    metric.update(slope=torch.zeros(4, 3))
    assert metric.compute().item() == pytest.approx(2 / 3)


def test_dead_units_look_many_in_a_small_window():
    # A unit with an activity of 2 % has none in a batch of 32 with probability 0.98^32 = 0.52.
    slope = (torch.rand(50, 32, 1000, generator=torch.Generator().manual_seed(0)) < 0.02).float()
    metric = DeadUnits(1000)
    assert metric(slope=slope[0]).item() == pytest.approx(0.98**32, abs=0.05)
    for part in slope[1:]:
        metric.update(slope=part)
    assert metric.compute().item() == 0


@pytest.mark.parametrize(
    ("shape", "unit_dim"),
    [
        ((6, 5), None),
        ((6, 7, 5), None),
        ((6, 5, 2, 3), None),
        ((6, 2, 3, 5), -1),
        ((6, 5, 2, 3, 4), None),
        ((5,), None),
    ],
)
def test_unit_metrics_find_the_units(shape, unit_dim):
    # Of five units, the first is silent, and the second a little active.
    strength = torch.tensor([0.0, 0.01, 1.0, 2.0, 3.0])
    dim = unit_dim if unit_dim is not None else 1 if len(shape) > 3 else -1
    output = torch.ones(shape).transpose(dim, -1).mul(strength).transpose(dim, -1)
    values = {}
    for cls, name in ((DeadUnits, "slope"), (DormantUnits, "output"), (GradientDormantUnits, "gradient")):
        metric = cls(5, unit_dim=unit_dim)
        metric.update(**{name: output})
        values[cls] = metric.compute().item()
    assert values == pytest.approx({DeadUnits: 0.2, DormantUnits: 0.4, GradientDormantUnits: 0.4})


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (DeadUnits(4), "slope"),
        (DormantUnits(4), "output"),
        (GradientDormantUnits(4), "gradient"),
        (EffectiveRank(4), "output"),
    ],
)
def test_unit_metrics_refuse_another_number_of_units(metric, name):
    message = rf"{name} must have num_units = 4 units in dimension 1, got shape \(2, 3, 4, 4\).*unit_dim"
    with pytest.raises(ValueError, match=message):
        metric.update(**{name: torch.ones(2, 3, 4, 4)})


@pytest.mark.parametrize("cls", [DeadUnits, DormantUnits, EffectiveRank, lambda units: ClassActivations(2, units)])
@pytest.mark.parametrize("num_units", [0, -1, 2.0, "4"])
def test_unit_metrics_refuse_a_number_of_units_that_is_none(cls, num_units):
    with pytest.raises(ValueError, match="num_units must be an integer >= 1, got"):
        cls(num_units)


@pytest.mark.parametrize("tau", [-0.1, 1.5, math.nan])
def test_dormant_units_refuse_a_tau_out_of_range(tau):
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\], got"):
        DormantUnits(3, tau=tau)


def test_dead_and_dormant_are_two_things():
    # Unit 0 is small but has a gradient; unit 1 is large and constant, so that it has none.
    output = torch.tensor([[0.001, 6.0, 3.0], [0.001, 6.0, 2.0]])
    slope = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    dead, dormant, learning = DeadUnits(3), DormantUnits(3), GradientDormantUnits(3)
    dead.update(slope=slope)
    dormant.update(output=output)
    learning.update(gradient=slope * torch.tensor([[5.0, 1.0, 1.0]]))
    values = [metric.compute().item() for metric in (dead, dormant, learning)]
    assert values == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert (dead.with_slope == 0).tolist() == [False, True, False]
    assert (dormant.output_magnitudes < 0.01).tolist() == [True, False, False]
    assert (learning.gradient_magnitudes == 0).tolist() == [False, True, False]


@pytest.mark.parametrize(("tau", "expected"), [(0.0, 0.25), (0.025, 0.5), (0.1, 0.75)])
def test_dormant_units_have_at_most_tau_of_the_mean(tau, expected):
    metric = DormantUnits(4, tau=tau)
    metric.update(output=torch.tensor([[0.0, -0.02, 0.09, 3.89]]))  # the mean magnitude is 1
    assert metric.compute().item() == expected


def test_dormant_units_of_a_silent_layer_are_all_and_of_a_nan_undefined():
    metric = DormantUnits(2)
    metric.update(output=torch.zeros(3, 2))
    assert metric.compute().item() == 1
    metric.update(output=torch.tensor([[math.nan, 1.0]]))
    assert metric.compute().isnan()


def test_sparsity_counts_outputs_that_are_not_positive():
    metric = Sparsity()
    metric.update(output=torch.tensor([[-0.01, 0.0], [2.0, 1e-30]]))
    assert metric.compute().item() == 0.5
