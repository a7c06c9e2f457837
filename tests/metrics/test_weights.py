import pytest
import torch
from torchmetrics import MetricCollection

from lightning_noisy.metrics import GradientVariance, UpdateRatio, WeightMean


def test_weight_mean_averages_its_size_over_the_steps():
    metric = WeightMean()
    metric.update(torch.full((2, 2), -1.0))
    metric.update(torch.full((2, 2), 3.0))
    assert metric.compute().item() == 2


def test_gradient_variance_is_that_of_a_step_not_between_steps():
    metric = GradientVariance()
    for mean in (0.0, 100.0):
        metric.update(mean + torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
    assert metric.compute().item() == pytest.approx(1)


def test_update_ratio_follows_an_optimizer():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    metric = UpdateRatio()
    for _ in range(2):
        old = weight.detach().clone()
        weight.grad = old.clone()  # each step shrinks the weights by a tenth
        optimizer.step()
        metric.update(old, weight)
    assert metric.compute().item() == pytest.approx(0.1, rel=1e-5)


def test_update_ratio_leaves_out_a_step_from_zero_but_not_a_nan():
    metric = UpdateRatio()
    metric.update(torch.zeros(2), torch.ones(2))
    assert metric.compute().isnan()
    metric.update(torch.ones(2), 1.5 * torch.ones(2))
    assert metric.compute().item() == pytest.approx(0.5)
    metric.update(torch.ones(2), torch.tensor([1.0, torch.nan]))
    assert metric.compute().isnan()


def test_update_ratio_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"old and new must have the same shape, got .*\(2, 1\)"):
        UpdateRatio().update(torch.ones(2), torch.ones(2, 1))


def test_weight_metrics_in_a_collection_stay_apart_after_equal_values():
    collection = MetricCollection({"mean": WeightMean(), "variance": GradientVariance()})
    collection.update(weight=torch.zeros(2), gradient=torch.zeros(2))
    collection.update(weight=torch.tensor([4.0, 4.0]), gradient=torch.tensor([2.0, -2.0]))
    collection.update(weight=torch.tensor([2.0, 2.0]), gradient=torch.tensor([5.0, -5.0]))
    assert {name: value.item() for name, value in collection.compute().items()} == pytest.approx(
        {"mean": 2, "variance": 29 / 3}
    )
