import math

import pytest

from lightning_noisy.monitoring.diagnosis import diagnose


def history(**tags):
    """One logged step every 100, from the values of each tag; `__` stands for the slash."""
    count = len(next(iter(tags.values())))
    return [(100 * i, {tag.replace("__", "/"): values[i] for tag, values in tags.items()}) for i in range(count)]


def test_most_weights_that_drift_are_found():
    tags = {f"weight_mean__{name}": [0.01, 0.1, 0.1] for name in "ab"} | {"weight_mean__c": [0.3, 0.3, 0.3]}
    (found,) = diagnose(history(**tags), [])
    assert (found.kind, set(found.where), found.since) == ("weight_mean", {"a", "b"}, 100)


@pytest.mark.parametrize(
    "means",
    [
        {"a": [0.01, 0.2, 0.2]},  # a single matrix, or one of two: small ones drift by chance
        {"a": [0.01, 0.2, 0.2], "b": [0.01, 0.01, 0.01]},
        {"a": [0.01, 0.09, 0.09], "b": [0.01, 0.09, 0.09]},  # small
        {"a": [0.05, 0.2, 0.2], "b": [0.05, 0.2, 0.2]},  # fourfold
        {"a": [math.nan, 0.2, 0.2], "b": [math.nan, 0.2, 0.2]},  # as at the first look
    ],
)
def test_weights_whose_means_are_small_or_grow_by_chance_are_no_finding(means):
    assert diagnose(history(**{f"weight_mean__{name}": values for name, values in means.items()}), []) == []


def test_steps_that_are_too_large_are_found():
    (found,) = diagnose(history(update_ratio__w=[0.1, 0.5, 0.4, 0.5, 0.5, 0.3]), [])
    assert (found.kind, found.where, found.since) == ("update_ratio", ("w",), 100)


@pytest.mark.parametrize(
    "values",
    [
        [0.29] * 6,
        [math.nan, *(1 / k for k in range(1, 8))],  # weights that start at zero
        [math.nan, 1.0, 0.5],
        [0.0] * 6,  # frozen
        [1e-3, *[1e-9] * 5],  # at the end of a schedule
        [1.1e-7] * 6,
        [1e-9] * 4,
    ],
)
def test_steps_of_a_usual_size_are_no_finding(values):
    assert diagnose(history(update_ratio__w=values), []) == []


def test_weights_that_never_moved_are_found_slowest_first():
    (found,) = diagnose(history(update_ratio__w=[1e-9] * 5, update_ratio__v=[1e-3] * 5, update_ratio__a=[1e-8] * 5), [])
    assert (found.kind, found.where, found.since) == ("update_ratio_least", ("w", "a"), 0)
