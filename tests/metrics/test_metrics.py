"""What holds for every metric: one table of cases, and an oracle in NumPy float64 that sees all data at once."""

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import Net, batches, loader, quiet_trainer
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_noisy import metrics
from lightning_noisy.metrics._pooled import sum_dtype

UNITS, CLASSES = 4, 3


@dataclass
class Case:
    make: Callable[[], Metric]
    expected: Callable[..., object]  # of all data; for steps, of each update
    steps: bool = False


def entropy_rank(features):
    sigma = np.linalg.svd(features, compute_uv=False)
    p = sigma / sigma.sum()
    return np.prod(p**-p)


def moments_of(input, output, slope):
    return {
        "count": input.size,
        "input_mean": np.mean(input),
        "input_var": np.var(input),
        "output_mean": np.mean(output),
        "output_var": np.var(output),
        "output_power": np.mean(output**2),
        "rho_prime": np.mean(slope**2),
    }


def dormant(x, tau):
    level = np.abs(x).mean(axis=0)
    return np.mean(level <= tau * level.mean())


def classes_of(output, target):
    parts = [output[target == label] for label in range(CLASSES)]
    return {
        "median": np.stack([np.median(part, axis=0) for part in parts]),
        "std": np.stack([part.std(axis=0) for part in parts]),
        "count": np.array([len(part) for part in parts]),
    }


def flat_share(slope, where=True):
    return np.sum((np.abs(slope) < 0.1) & where) / slope.size


CASES = {
    "moments": Case(metrics.ActivationMoments, moments_of),
    "r_score": Case(
        metrics.RScore, lambda input, output, slope: np.log(output.var() / input.var()) - np.log((slope**2).mean())
    ),
    "anact_score": Case(
        metrics.AnactScore,
        lambda input, output, slope: (
            abs(np.log((output**2).mean() / input.var())) / 2 + abs(np.log((slope**2).mean())) / 2
        ),
    ),
    "saturation": Case(lambda: metrics.SaturationRate(threshold=0.1), lambda input, slope: flat_share(slope)),
    "saturation_left": Case(
        lambda: metrics.SaturationRate(threshold=0.2, largest_slope=0.5, side="left"),
        lambda input, slope: flat_share(slope, input < 0),
    ),
    "saturation_hard_right": Case(
        lambda: metrics.SaturationRate(side="right", hard=True),
        lambda input, slope: np.mean((slope == 0) & (input >= 0)),
    ),
    "sparsity": Case(metrics.Sparsity, lambda output: (output <= 0).mean(axis=0).mean()),
    "dead": Case(lambda: metrics.DeadUnits(UNITS), lambda slope: np.mean([not unit.any() for unit in slope.T])),
    "dormant": Case(lambda: metrics.DormantUnits(UNITS, tau=0.5), lambda output: dormant(output, 0.5)),
    "gradient_dormant": Case(
        lambda: metrics.GradientDormantUnits(UNITS, tau=0.3), lambda gradient: dormant(gradient, 0.3)
    ),
    "classes": Case(lambda: metrics.ClassActivations(CLASSES, UNITS), classes_of),
    "rank": Case(lambda: metrics.EffectiveRank(UNITS), entropy_rank),
    "centred_rank": Case(
        lambda: metrics.EffectiveRank(UNITS, centred=True), lambda output: entropy_rank(output - output.mean(axis=0))
    ),
    "weight_mean": Case(metrics.WeightMean, lambda weight: abs(np.mean(weight)), steps=True),
    "gradient_variance": Case(metrics.GradientVariance, np.var, steps=True),
    "update_ratio": Case(
        metrics.UpdateRatio, lambda old, new: np.sqrt(((new - old) ** 2).sum() / (old**2).sum()), steps=True
    ),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def data(samples, *, shift=0.0, seed=0, dtype=torch.float32):
    """A batch of ReLU6-like activations: unit 0 is dead, unit 1 saturates on both sides."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(samples, UNITS, generator=generator) * torch.tensor([1.0, 9.0, 1.0, 3.0])
    h = h + shift * torch.tensor([0.0, 0.0, 1.0, 0.1])
    h[:, 0] = -h[:, 0].abs() - 0.1
    h = h.to(dtype)
    output = h.clamp(0, 6)
    slope = ((h > 0) & (h < 6)).to(dtype)
    target = torch.randint(CLASSES, (samples,), generator=generator)
    gradient = (torch.randn(samples, UNITS, generator=generator) * torch.tensor([1e-3, 1.0, 0.1, 1.0])).to(dtype)
    return {
        **{"input": h, "output": output, "slope": slope, "target": target, "gradient": gradient},
        **{"weight": h, "old": h, "new": h + 0.125 * gradient},
    }


def update(metric, batch):
    metric.update(**{name: batch[name] for name in inspect.signature(metric.update).parameters})


def oracle(case, parts):
    arrays = []
    for part in parts:
        names = inspect.signature(case.make().update).parameters
        arrays.append([(part[name] if name == "target" else part[name].double()).numpy() for name in names])
    if case.steps:
        return np.mean([case.expected(*each) for each in arrays])
    return case.expected(*(np.concatenate(each) for each in zip(*arrays, strict=True)))


def assert_equal(result, expected, rtol=1e-5):
    pairs = [(result[key], expected[key], key) for key in expected] if isinstance(expected, dict) else []
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
    for found, wanted, key in pairs or [(result, expected, "")]:
        tolerance = 0.0101 if key == "median" else rtol
        np.testing.assert_allclose(found.double(), wanted, rtol=tolerance, atol=1e-7, err_msg=key)


def is_nan(result):
    values = [value for key, value in result.items() if key != "count"] if isinstance(result, dict) else [result]
    return all(bool(value.isnan().all()) for value in values)


PARTS = [data(32), data(1, shift=4, seed=1), data(100, shift=-2, seed=2)]


@EVERY
def test_metric_pools_unequal_batches_like_one(case):
    metric = case.make()
    for part in PARTS:
        update(metric, part)
    assert_equal(metric.compute(), oracle(case, PARTS))


def test_oracles_tell_pooled_from_averaged():
    for name in ("r_score", "anact_score", "saturation", "sparsity", "rank", "centred_rank"):
        case, parts = CASES[name], PARTS[::2]
        averaged = np.mean([oracle(case, [part]) for part in parts])
        assert abs(averaged / oracle(case, parts) - 1) > 0.001, name


@EVERY
def test_metric_reduced_over_two_processes_equals_one(case):
    other = case.make()
    update(other, PARTS[2])
    metric = case.make()
    others = iter(other.metric_state.values())
    metric.dist_sync_fn = lambda state, group: [state, next(others)]
    metric.distributed_available_fn = lambda: True
    for part in PARTS[:2]:
        update(metric, part)
    assert_equal(metric.compute(), oracle(case, PARTS))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_metric_takes_other_dtypes_and_stays_exact(case, dtype):
    parts = [data(32, dtype=dtype), data(7, shift=3, seed=1, dtype=dtype)]
    metric = case.make()
    before = {name: state.dtype for name, state in metric.metric_state.items()}
    for part in parts:
        update(metric, part)
    assert_equal(metric.compute(), oracle(case, parts))
    assert {name: state.dtype for name, state in metric.metric_state.items()} == before


@EVERY
def test_metric_in_a_model_that_is_cast_keeps_its_sums(case):
    model = nn.ModuleDict({"metric": case.make()})
    update(model["metric"], PARTS[0])
    model.to(torch.bfloat16)
    model.half()
    for part in PARTS[1:]:
        update(model["metric"], part)
    assert_equal(model["metric"].compute(), oracle(case, PARTS))
    assert {state.dtype for state in model["metric"].metric_state.values()} <= {torch.float64, torch.int64}


def test_sums_are_float32_only_where_there_is_no_float64():
    dtypes = {name: sum_dtype(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert dtypes == {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}


@EVERY
def test_metric_without_data_is_undefined_and_an_empty_batch_changes_nothing(case):
    metric = case.make()
    update(metric, {name: value[:0] for name, value in PARTS[0].items()})
    assert is_nan(metric.compute())
    update(metric, PARTS[0])
    before = {name: state.clone() for name, state in metric.metric_state.items()}
    update(metric, {name: value[:0] for name, value in PARTS[0].items()})
    assert all(torch.equal(before[name], state) for name, state in metric.metric_state.items())


@EVERY
def test_metric_resets_pickles_and_copies(case):
    metric = case.make()
    update(metric, PARTS[1])
    metric.reset()
    update(metric, PARTS[0])
    metric = copy.deepcopy(pickle.loads(pickle.dumps(metric)))
    update(metric, PARTS[2])
    assert_equal(metric.compute(), oracle(case, [PARTS[0], PARTS[2]]))


@EVERY
def test_metric_gives_each_batch_and_all_by_forward(case):
    metric = case.make()
    for part in PARTS[::2]:
        names = inspect.signature(metric.update).parameters
        assert_equal(metric(**{name: part[name] for name in names}), oracle(case, [part]))
    assert_equal(metric.compute(), oracle(case, PARTS[::2]))


@EVERY
def test_metric_keeps_no_graph_and_changes_no_input(case):
    metric = case.make()
    part = {name: value.clone() for name, value in PARTS[0].items()}
    for value in part.values():
        value.requires_grad_(value.is_floating_point())
    with torch.enable_grad():
        metric(**{name: part[name] for name in inspect.signature(metric.update).parameters})
    assert not any(state.requires_grad for state in metric.metric_state.values())
    assert all(torch.equal(part[name], PARTS[0][name]) for name in part)


@EVERY
def test_metric_updated_in_inference_mode_goes_on_outside(case):
    metric = case.make()
    with torch.inference_mode():
        metric.reset()
        update(metric, PARTS[0])
    update(metric, PARTS[1])
    with torch.inference_mode():
        update(metric, PARTS[2])
    assert_equal(metric.compute(), oracle(case, PARTS))


@EVERY
def test_metric_is_exact_under_autocast(case):
    metric = case.make()
    with torch.autocast("cpu", torch.bfloat16):
        for part in PARTS:
            update(metric, part)
        assert_equal(metric.compute(), oracle(case, PARTS))


@EVERY
def test_metric_does_not_wait_for_values_in_update(case):
    with torch.device("meta"):  # whose tensors have no values to wait for
        metric = case.make()
    update(metric, {name: value.to("meta") for name, value in PARTS[0].items()})
    assert {state.device.type for state in metric.metric_state.values()} == {"meta"}


@EVERY
def test_metric_plots_now_and_over_time(case):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = case.make()
    update(metric, PARTS[0])
    figure, axes = metric.plot()
    assert axes.lines or axes.images
    pyplot.close(figure)
    figure, axes = pyplot.subplots()
    assert metric.plot(ax=axes)[1] is axes
    if not axes.images:
        assert metric.plot([metric.compute(), metric.compute()], axes)[1] is axes
    pyplot.close(figure)


def test_every_public_metric_has_a_case():
    assert {type(case.make()).__name__ for case in CASES.values()} == set(metrics.__all__)


@pytest.mark.parametrize("compute_groups", [True, False])
def test_collection_of_all_gives_each_what_it_needs(compute_groups):
    # The first batch is too small to show the differences of some: they must not share a state.
    parts = [data(1, seed=3), *PARTS]
    collection = MetricCollection({name: case.make() for name, case in CASES.items()}, compute_groups=compute_groups)
    for part in parts:
        collection.update(**part)
    for name, metric in collection.items(keep_base=True):
        assert_equal(metric.compute(), oracle(CASES[name], parts))


def test_collection_keeps_different_thresholds_apart_and_shares_what_is_the_same():
    collection = MetricCollection(
        {
            "low": metrics.SaturationRate(threshold=0.05),
            "high": metrics.SaturationRate(threshold=0.5),
            "high_left": metrics.SaturationRate(threshold=0.5, side="left"),
            "r": metrics.RScore(),
            "anact": metrics.AnactScore(),
        }
    )
    start, later = torch.zeros(4), torch.tensor([-1.0, 1.0, -3.0, 0.0])
    for h in (start, later):  # nothing is saturated in the first batch
        collection.update(input=h, output=h.tanh(), slope=1 - h.tanh() ** 2)
    result = {name: value.item() for name, value in collection.compute().items()}
    assert [result[name] for name in ("low", "high", "high_left")] == [1 / 8, 3 / 8, 2 / 8]
    assert sorted(map(sorted, collection.compute_groups.values())) == [["anact", "r"], ["high", "high_left"], ["low"]]


class Watched(Net):
    """Logs metrics of its ReLU in validation."""

    def __init__(self):
        super().__init__()
        self.dead = metrics.DeadUnits(16)
        self.collection = MetricCollection({"rank": metrics.EffectiveRank(16), "sparsity": metrics.Sparsity()})
        self.seen = []

    def validation_step(self, batch, batch_idx):
        h = self.net[0](batch[0])
        y = h.relu()
        self.seen.append(y)
        self.dead(slope=(h > 0).float())
        self.log("dead", self.dead)
        self.collection.update(output=y)
        self.log_dict(self.collection)


def test_metrics_log_the_value_of_the_whole_epoch():
    torch.manual_seed(0)
    model = Watched()
    trainer = quiet_trainer(limit_train_batches=1, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(model, loader(batches(1)), loader([*batches(2, 3), *batches(1, 5, seed=1)]))
    y = torch.cat(model.seen[-3:]).numpy()  # of the last epoch
    assert len(y) == 11
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found["sparsity"] == pytest.approx((y <= 0).mean())
    assert found["dead"] == pytest.approx((y <= 0).all(0).mean())
    assert found["rank"] == pytest.approx(entropy_rank(y), rel=1e-5)
