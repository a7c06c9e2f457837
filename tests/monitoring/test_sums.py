import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lightning_noisy.monitoring import sums as sums_module
from lightning_noisy.monitoring.sums import COLUMNS, SiteSums

CPU = torch.device("cpu")


def add(sums, site, h, *, dead=()):
    """A call with the identity: units are the last dimension."""
    alive = torch.ones(h.shape[-1])
    alive[list(dead)] = 0
    level = h.abs().reshape(-1, h.shape[-1]).sum(0)
    columns = {"count": h.numel(), "x": h.sum(), "xx": h.double().square().sum()}
    sums.add(site, columns, alive, level)


class Ranks:
    """Adds up what several threads pass in, as a reduction of as many processes does."""

    def __init__(self, count):
        self.barrier, self.parts, self.calls = threading.Barrier(count, timeout=20), {}, 0

    def reduce_of(self, rank):
        def reduce(flat):
            self.parts[rank] = flat
            self.barrier.wait()
            total = torch.stack(list(self.parts.values())).sum(0)
            self.barrier.wait()
            self.calls += rank == 0
            return total

        return reduce

    def pooled(self, all_sums):
        with ThreadPoolExecutor(len(all_sums)) as pool:
            waiting = [pool.submit(each.pooled, self.reduce_of(rank)) for rank, each in enumerate(all_sums)]
            results = [each.result() for each in waiting]
        for each in results[1:]:
            assert all(np.array_equal(each.columns[name], results[0].columns[name]) for name in COLUMNS)
            assert np.array_equal(each.dead, results[0].dead, equal_nan=True)
        return results[0]


def ranks_of(count, sites=1, shards=1):
    return Ranks(count), [SiteSums(sites, device=CPU, shards=shards, shard=i % shards) for i in range(count)]


def test_variances_of_one_with_means_0_and_3_pool_to_three_and_a_quarter():
    ranks, (first, second) = ranks_of(2)
    h = torch.tensor([[-1.0, 1.0]])
    add(first, 0, h)
    add(second, 0, h + 3)
    columns = ranks.pooled([first, second]).columns
    mean = columns["x"] / columns["count"]
    assert (columns["xx"] / columns["count"] - mean**2).tolist() == [3.25]


def test_unequal_ranks_pool_like_one_process():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 4, generator=generator), 5 + torch.randn(50, 4, generator=generator)]
    ranks, sums = ranks_of(2)
    for each, part in zip(sums, parts, strict=True):
        add(each, 0, part)
    whole = SiteSums(1, device=CPU)
    add(whole, 0, torch.cat(parts))
    expected, found = whole.pooled(), ranks.pooled(sums)
    for name in ("count", "x", "xx"):
        assert found.columns[name].tolist() == pytest.approx(expected.columns[name].tolist())


def test_unit_is_dead_if_it_is_in_all_calls_on_all_ranks():
    ranks, sums = ranks_of(2)
    h = torch.ones(2, 4)
    add(sums[0], 0, h, dead=[0, 1, 2])
    add(sums[0], 0, h, dead=[0, 1, 3])
    add(sums[1], 0, h, dead=[0, 2, 3])
    assert ranks.pooled(sums).dead.tolist() == [1 / 4]


def test_shards_count_units_of_their_own():
    ranks, sums = ranks_of(4, shards=2)  # two copies of a layer that is split over two ranks
    add(sums[0], 0, torch.ones(2, 3), dead=[0, 1])
    add(sums[2], 0, torch.ones(2, 3), dead=[1, 2])
    for each in (sums[1], sums[3]):
        add(each, 0, torch.ones(2, 2), dead=[0])
    assert ranks.pooled(sums).dead.tolist() == [pytest.approx(2 / 5)]


def test_site_that_one_rank_does_not_call_does_not_hang():
    ranks, sums = ranks_of(2, sites=3)
    add(sums[0], 1, torch.ones(2, 4), dead=[3])
    add(sums[1], 2, torch.ones(2, 4))
    pooled = ranks.pooled(sums)
    assert pooled.columns["count"].tolist() == [0, 8, 8]
    assert np.nan_to_num(pooled.dead, nan=-1).tolist() == [-1, 0.25, 0]


@pytest.mark.parametrize("sites", [1, 200])
def test_pooling_takes_one_reduction_and_one_more_when_a_site_is_new(sites):
    ranks, sums = ranks_of(2, sites=sites)
    calls = []
    for _ in range(3):
        for site in range(sites):
            add(sums[0], site, torch.ones(2, 3))
            add(sums[1], site, torch.ones(2, 3))
        before = ranks.calls
        ranks.pooled(sums)
        calls.append(ranks.calls - before)
        for each in sums:
            each.reset()
    assert calls == [2, 1, 1]


@pytest.mark.parametrize("widths", [((2,), (4,)), ((3, 4), (3,))])
def test_units_that_differ_between_calls_or_ranks_are_undefined(widths):
    ranks, sums = ranks_of(2)
    for each, theirs in zip(sums, widths, strict=True):
        for width in theirs:
            add(each, 0, torch.ones(1, width))
    pooled = ranks.pooled(sums)
    assert np.isnan(pooled.dead).all()
    assert pooled.columns["count"].tolist() == [sum(map(sum, widths))]


def test_dormant_units_are_below_a_share_of_the_mean():
    sums = SiteSums(1, device=CPU)
    add(sums, 0, torch.tensor([[1.0, 0.02, 3.0, 0.03]]))  # the mean is 1.0125
    assert sums.pooled(tau=0.025).dormant.tolist() == [1 / 4]


def test_other_tensors_are_added_up_beside():
    ranks, sums = ranks_of(2)

    def pooled(rank):
        return sums[rank].pooled(ranks.reduce_of(rank), {"a": torch.full((2, 3), float(rank + 1)), "b": torch.ones(1)})

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(pooled, range(2)))[1]
    assert found.extra["a"].tolist() == [[3.0] * 3] * 2
    assert found.extra["b"].tolist() == [2.0]


def test_reset_starts_anew_and_knows_the_units():
    sums = SiteSums(1, device=CPU)
    add(sums, 0, torch.ones(2, 3))
    sums.reset()
    pooled = sums.pooled()
    assert pooled.columns["count"].tolist() == [0]
    assert pooled.dead.tolist() == [1]  # of three units


def test_tensors_that_are_added_later_give_the_same_sums(monkeypatch):
    """Elsewhere than on the CPU, rows of tensors and numbers wait until they are needed, or too many."""
    monkeypatch.setattr(sums_module, "_MAX_PENDING", 5)
    now, later = SiteSums(3, device=CPU), SiteSums(3, device=CPU)
    later._adds_at_once = False
    for call in range(13):
        for sums in (now, later):
            add(sums, call % 3, torch.full((2, 4), float(call)))
            assert len(sums._pending) < 5
    assert torch.equal(now.table, later.table)
    assert now.table[:, COLUMNS.index("x")].tolist() == [8 * (0 + 3 + 6 + 9 + 12), 8 * (1 + 4 + 7 + 10), 8 * 26]
    for sums in (now, later):
        add(sums, 0, torch.ones(2, 4))
        sums.reset()
        assert not sums.table.any()
