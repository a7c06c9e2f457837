import numpy as np
import pytest
import torch

from lightning_noisy.metrics import ClassActivations


def drawn(samples, units, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples,), generator=generator)
    scale = 10 ** (4 * torch.rand(classes, units, generator=generator) - 2)
    output = torch.randn(samples, units, generator=generator) * scale[target] + scale[target]
    return output, target


@pytest.mark.parametrize("error", [0.01, 0.1])
def test_class_medians_are_as_exact_as_they_say(error):
    output, target = drawn(3000, 20, 4)
    metric = ClassActivations(4, 20, relative_error=error)
    for part in torch.arange(3000).split(700):
        metric.update(output=output[part], target=target[part])
    found = metric.compute()
    for label in range(4):
        of_class = output[target == label].double().numpy()
        np.testing.assert_allclose(found["median"][label], np.median(of_class, axis=0), rtol=error * 1.001)
        np.testing.assert_allclose(found["std"][label], of_class.std(axis=0), rtol=1e-6)
        assert found["count"][label] == len(of_class)


def test_class_median_of_an_even_number_is_between_the_two_in_the_middle():
    metric = ClassActivations(1, 1)
    metric.update(output=torch.tensor([[-9.0], [1.0], [3.0], [100.0]]), target=torch.zeros(4, dtype=torch.long))
    assert metric.compute()["median"].item() == pytest.approx(2, rel=0.01)


def test_class_median_of_a_unit_that_is_mostly_off_is_zero():
    metric = ClassActivations(1, 2)
    metric.update(output=torch.tensor([[0.0, 0.0], [0.0, 5.0], [7.0, 5.0]]), target=torch.zeros(3, dtype=torch.long))
    median = metric.compute()["median"][0].tolist()
    assert median[0] == 0
    assert median[1] == pytest.approx(5, rel=0.01)


def test_class_median_out_of_the_range_of_magnitudes_is_its_end():
    metric = ClassActivations(1, 4, magnitudes=(0.1, 10.0))
    metric.update(output=torch.tensor([[-1e6, 1e6, 1e-6, -1e-6]]), target=torch.tensor([0]))
    assert metric.compute()["median"][0].tolist() == pytest.approx([-10, 10, 0.1, -0.1], rel=0.011)
    assert metric.compute()["std"][0].tolist() == [0, 0, 0, 0]


def test_class_std_survives_a_large_mean():
    h = 1e4 + torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    metric = ClassActivations(1, 1, magnitudes=(1.0, 1e5))
    metric.update(output=h, target=torch.zeros(20_000, dtype=torch.long))
    assert metric.compute()["std"].item() == pytest.approx(1, abs=0.02)


def test_classes_leave_out_other_targets_and_have_nan_without_samples():
    metric = ClassActivations(2, 1)
    metric.update(output=torch.tensor([[1.0], [50.0], [60.0]]), target=torch.tensor([0, -100, 2]))
    found = metric.compute()
    assert found["count"].tolist() == [1, 0]
    assert found["median"][0].item() == pytest.approx(1, rel=0.01)
    assert found["median"][1].isnan().all()
    assert found["std"][1].isnan().all()


def test_classes_ignore_a_nan_of_a_sample_that_is_left_out_and_show_others():
    metric = ClassActivations(1, 2)
    metric.update(output=torch.tensor([[torch.nan, torch.nan], [2.0, torch.nan]]), target=torch.tensor([-1, 0]))
    median = metric.compute()["median"][0]
    assert median[0].item() == pytest.approx(2, rel=0.01)
    assert median[1].isnan()


def test_classes_of_images_count_positions():
    output = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    of_image = torch.tensor([0, 1, 1, 0, 1, 0])
    of_pixel = of_image[:, None, None].expand(6, 4, 5)
    results = []
    for target in (of_image, of_pixel):
        metric = ClassActivations(2, 3)
        metric.update(output=output, target=target)
        results.append(metric.compute())
    assert results[0]["count"].tolist() == [60, 60]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    expected = np.median(output[of_image == 1].numpy(), axis=(0, 2, 3))
    np.testing.assert_allclose(results[0]["median"][1], expected, rtol=0.0101)


@pytest.mark.parametrize(
    "target", [torch.zeros(5, dtype=torch.long), torch.zeros(4), torch.zeros(4, 3, dtype=torch.long)]
)
def test_classes_refuse_targets_that_do_not_fit(target):
    message = r"target must be integers of shape \(4,\) or \(4,\) for output of shape \(4, 3\), got"
    with pytest.raises(ValueError, match=message):
        ClassActivations(2, 3).update(output=torch.zeros(4, 3), target=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ({"relative_error": 1.0}, r"relative_error must be in \(0, 1\), got 1.0"),
        ({"magnitudes": (1.0, 0.5)}, r"magnitudes must be 0 < smallest < largest, got \(1.0, 0.5\)"),
    ],
)
def test_classes_refuse_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        ClassActivations(**{"num_classes": 2, "num_units": 3, **options})


def test_classes_take_as_much_memory_as_they_say():
    metric = ClassActivations(10, 512)
    assert metric.num_bins == 1383
    assert metric.histogram.nbytes == 8 * 10 * 512 * 1383 == pytest.approx(57e6, rel=0.01)


def test_classes_are_drawn_as_rows_and_units_as_columns():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = ClassActivations(2, 5)
    metric.update(output=torch.ones(3, 5), target=torch.tensor([0, 1, 1]))
    figure, axes = metric.plot()
    assert axes.images[0].get_array().shape == (2, 5)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("unit", "class")
    assert len(figure.axes) == 2  # the other one is the colour bar
    pyplot.close(figure)
    figure, axes = pyplot.subplots()
    assert metric.plot(metric.compute(), ax=axes) == (None, axes)
    pyplot.close(figure)
