"""Two processes under Lightning's DDP strategy (gloo, CPU)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import loader, quiet_trainer, run_processes, scalars, shared_folder

from lightning_noisy import GradientNoise
from lightning_noisy.nn import NSwish

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return shared_folder(tmp_path_factory, "ddp", lambda out: run_processes(HERE / "ddp_runs.py", 2, str(out)))


def states(out, name):
    return [torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def runs(monkeypatch):
    """The script as a module, for the same model and data in this one process."""
    monkeypatch.syspath_prepend(str(HERE))
    import ddp_runs

    return ddp_runs


def test_ranks_add_the_noise_of_one_process_whatever_their_random_state(out, runs):
    first, second = states(out, "zero")
    model = runs.zero_model()
    quiet_trainer(callbacks=[GradientNoise(eta=1.0, seed=0)]).fit(model, loader(runs.batches_of(0)))
    assert equal(first, second)
    assert equal(first, model.state_dict())
    assert first["net.weight"].count_nonzero() == 24


def test_ranks_share_a_seed_that_is_drawn(out):
    assert equal(*states(out, "unseeded"))
    seeds = [torch.load(out / f"drawn-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert seeds[0] == seeds[1]
    assert not equal(states(out, "unseeded")[0], states(out, "zero")[0])


def test_ranks_that_are_seeded_differently_add_the_same_noise(out):
    assert equal(*states(out, "ranked"))
    assert states(out, "ranked")[0]["net.weight"].any()


def test_swapped_model_has_equal_parameters_on_all_ranks(out):
    first, second = states(out, "swap")
    parameters = [name for name in first if "running" not in name and "num_" not in name]
    assert equal({name: first[name] for name in parameters}, {name: second[name] for name in parameters})
    assert first["net.1.alpha"] != 0


@pytest.mark.parametrize("name", ["branches", "seen branches"])
def test_ddp_waits_for_no_parameter_of_an_unused_place(out, name):
    first, second = states(out, name)
    assert [key for key in first if key.endswith("alpha")] == ["net.act.alpha"]
    assert first["net.act.alpha"] == second["net.act.alpha"] != 0


def test_synchronized_statistics_are_those_of_one_process_with_all_data(out, runs):
    first, second = states(out, "pooled")
    assert equal(first, second)
    torch.manual_seed(0)
    layer, expected = runs.Net().net[0], NSwish()
    for (x, _), (other, _) in zip(runs.batches_of(0), runs.batches_of(1), strict=True):
        expected(layer(torch.cat([x, other])))
    for name, value in expected.named_buffers():
        torch.testing.assert_close(first[f"net.1.{name}"], value, rtol=1e-6, atol=1e-6)


def test_monitor_pools_unequal_ranks_like_one_process(out, runs):
    h = np.concatenate([x.double().numpy().ravel() for rank in (0, 1) for x, _ in runs.batches_of(rank)])
    slope = 1 - np.tanh(h) ** 2
    expected = {
        "rho/net.0": (np.tanh(h) ** 2).mean() / h.var(),
        "rho_prime/net.0": (slope**2).mean(),
        "saturation/net.0": (slope < 0.05).mean(),
        "sparsity/net.0": (h <= 0).mean(),
    }
    logged = scalars(out / "events")
    for tag, value in expected.items():
        assert logged[tag] == [(1, pytest.approx(value, rel=1e-5))], tag
