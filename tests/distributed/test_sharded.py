"""FSDP2 and tensor parallel under Lightning's ModelParallelStrategy (gloo, CPU): the noise of one process."""

from pathlib import Path

import pytest
import torch
from helpers import loader, quiet_trainer, run_processes, shared_folder
from torch import nn

from lightning_noisy import GradientNoise, add_gradient_noise
from lightning_noisy.schedules import InverseDecay

HERE = Path(__file__).parent
OLD_TORCH = torch.__version__.startswith("2.6.")
pytestmark = pytest.mark.slow
needs_fsdp2_on_cpu = pytest.mark.skipif(OLD_TORCH, reason="torch 2.6 runs FSDP2 on accelerators alone")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What the runs wrote; those on as many processes run one after the other in the same ones."""

    def fill(folder):
        script, cases = HERE / "sharded_runs.py", [] if OLD_TORCH else ["even", "uneven", "tensor"]
        run_processes(script, 2, str(folder), "fsdp1", *cases)
        if not OLD_TORCH:
            run_processes(script, 4, str(folder), "mesh")

    return shared_folder(tmp_path_factory, "sharded", fill)


@pytest.fixture
def runs(monkeypatch):
    """The script as a module, for the same model and data in this one process."""
    monkeypatch.syspath_prepend(str(HERE))
    import sharded_runs

    return sharded_runs


def alone(runs, case, *, steps, ckpt_path=None):
    width, *_ = runs.CASES[case]
    model = runs.Sharded(width)
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=1.0, seed=0)], max_steps=steps)
    trainer.fit(model, loader(runs.DATA), ckpt_path=ckpt_path)
    return model.state_dict()


@needs_fsdp2_on_cpu
@pytest.mark.parametrize("case", ["even", "uneven", "tensor", "mesh"])
def test_shards_add_the_noise_of_one_process(out, runs, case):
    result = torch.load(out / f"{case}.pt", weights_only=True)
    expected = alone(runs, case, steps=3)
    assert result["state"].keys() == expected.keys()
    assert result["kinds"]["net.0.weight"] == "DTensor"
    for name, value in expected.items():
        assert value.count_nonzero() == value.numel(), name
        assert torch.equal(result["state"][name], value), name


def test_flat_shards_of_the_first_fsdp_add_the_noise_of_one_process(out):
    state = torch.load(out / "fsdp1.pt", weights_only=True)["state"]
    # Lightning's names begin with "net.", so the same names are given to the model in this process.
    model = nn.Sequential(nn.Linear(40, 1001), nn.ReLU(), nn.Linear(1001, 60), nn.Linear(60, 1))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    add_gradient_noise(optimizer, InverseDecay(eta=1.0), seed=0, stream="0.0", model=model)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(state[f"net.{name}"], parameter.detach()), name


@needs_fsdp2_on_cpu
@pytest.mark.filterwarnings("ignore:.*world size", "ignore:.*devices")
def test_noise_of_a_sharded_run_goes_on_in_one_process(out, runs):
    resumed = alone(runs, "uneven", steps=4, ckpt_path=out / "uneven.ckpt")
    whole = alone(runs, "uneven", steps=4)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
