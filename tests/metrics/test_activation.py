import pickle

import numpy as np
import pytest
import torch

from lightning_noisy.metrics import ActivationStatistics


def oracle(h, f, df):
    """ρ, ρ′, saturation and sparsity of all of h at once, in float64 NumPy."""
    h = np.concatenate([part.double().numpy().ravel() for part in h])
    return {
        "rho": (f(h) ** 2).mean() / h.var(),
        "rho_prime": (df(h) ** 2).mean(),
        "saturation": (np.abs(df(h)) < 0.05).mean(),
        "sparsity": (f(h) <= 0).mean(),
    }


def tanh_update(statistics, h, site="a"):
    statistics.update(site, input=h, output=h.tanh(), slope=1 - h.tanh() ** 2)


def values(statistics):
    """The statistics of the only site."""
    return {name.split("/")[0]: value.item() for name, value in statistics.compute().items() if "/" in name}


def test_statistics_pool_unequal_batches_like_one():
    torch.manual_seed(0)
    parts = [torch.randn(32, 5) * 3, torch.randn(1, 5) + 4, torch.randn(100, 5) - 2]
    statistics = ActivationStatistics(["a"])
    for part in parts:
        tanh_update(statistics, part)
    expected = oracle(parts, np.tanh, lambda h: 1 - np.tanh(h) ** 2)
    assert values(statistics) == pytest.approx(expected, rel=1e-5)
    averaged = np.mean([oracle([part], np.tanh, lambda h: 1 - np.tanh(h) ** 2)["rho"] for part in parts])
    assert abs(averaged - expected["rho"]) > 0.1  # what averaging ratios would give


def test_statistics_of_parts_merge_like_one_process():
    torch.manual_seed(0)
    ranks = [[torch.randn(8, 3)], [torch.randn(20, 3) + 5, torch.randn(2, 3)]]
    metrics = []
    for parts in ranks:
        metrics.append(ActivationStatistics(["a"]))
        for part in parts:
            tanh_update(metrics[-1], part)
    reduced = metrics[0]._reductions["sums"](torch.stack([metric.sums for metric in metrics]))
    metrics[0].sums = reduced
    expected = oracle(ranks[0] + ranks[1], np.tanh, lambda h: 1 - np.tanh(h) ** 2)
    assert values(metrics[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_statistics_survive_a_large_mean(mean):
    h = mean + torch.randn(4, 10_000, generator=torch.Generator().manual_seed(0))
    statistics = ActivationStatistics(["identity"])
    for part in h:
        statistics.update("identity", input=part, output=part - mean, slope=torch.ones_like(part))
    assert values(statistics)["rho"] == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_are_computed_in_float32_or_better(dtype):
    h = (torch.randn(1000, 20, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    statistics = ActivationStatistics(["a"])
    statistics.update("a", input=h, output=h.relu(), slope=(h > 0).to(dtype))
    expected = oracle([h], lambda x: np.maximum(x, 0), lambda x: x > 0)
    assert values(statistics) == pytest.approx(expected, rel=1e-5)


def test_statistics_of_several_sites_stay_apart_and_the_score_sums_them():
    h = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    statistics = ActivationStatistics(["a", "never", "b"])
    tanh_update(statistics, h, "a")
    tanh_update(statistics, 3 * h, "b")
    result = {name: value.item() for name, value in statistics.compute().items()}
    assert statistics.sites == ["a", "never", "b"]
    assert np.isnan([result[f"rho/{site}"] for site in statistics.sites]).tolist() == [False, True, False]
    assert result["rho/a"] > 2 * result["rho/b"]
    gains = [result[f"{name}/{site}"] for name in ("rho", "rho_prime") for site in "ab"]
    assert result["anact_score"] == pytest.approx(np.abs(np.log(gains)).sum() / 2)


def test_statistics_of_a_constant_input_are_undefined_not_an_error():
    statistics = ActivationStatistics(["a"])
    tanh_update(statistics, torch.zeros(5, 5))
    result = values(statistics)
    assert np.isnan(result["rho"])
    assert result["rho_prime"] == 1


def test_score_of_nothing_is_undefined_not_perfect():
    statistics = ActivationStatistics(["a"])
    tanh_update(statistics, torch.ones(0))
    assert np.isnan(statistics.compute()["anact_score"].item())


def test_statistics_skip_an_empty_batch_and_start_anew_after_reset():
    statistics = ActivationStatistics(["a"])
    tanh_update(statistics, torch.ones(0, 3))
    assert not statistics.sums.any()
    tanh_update(statistics, torch.randn(9, 3))
    statistics = pickle.loads(pickle.dumps(statistics))
    assert statistics.sums[0, 0] == 27
    statistics.reset()
    assert not statistics.sums.any()


def test_statistics_need_distinct_names():
    with pytest.raises(ValueError, match="Names of sites must differ"):
        ActivationStatistics(["a", "a"])
