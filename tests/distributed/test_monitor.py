"""The statistics of several processes are those of one on all the data."""

import csv
import math
from pathlib import Path

import pytest
import torch
from helpers import run_processes, shared_folder

HERE = Path(__file__).parent
OLD_TORCH = torch.__version__.startswith("2.6.")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    def fill(folder):
        script = HERE / "monitor_runs.py"
        run_processes(script, 2, str(folder), "ddp", "differs", "fsdp1", *([] if OLD_TORCH else ["fsdp2", "tensor"]))
        if not OLD_TORCH:
            run_processes(script, 4, str(folder), "mesh")

    return shared_folder(tmp_path_factory, "monitor", fill)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process logs."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(HERE))
    import monitor_runs

    folder = tmp_path_factory.mktemp("alone")
    monitor_runs.run("alone", folder)
    patch.undo()
    return rows_of(folder / "alone")


def rows_of(folder):
    """step -> tag -> value."""
    with (folder / "metrics.csv").open() as file:
        return {
            row.pop("step"): {tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)
        }


@pytest.mark.parametrize(
    "case",
    [
        "ddp",
        *(
            pytest.param(case, marks=pytest.mark.skipif(OLD_TORCH, reason="torch 2.6 runs FSDP2 on accelerators alone"))
            for case in ("fsdp2", "tensor", "mesh")
        ),
    ],
)
def test_processes_log_what_one_logs_on_all_the_data(out, alone, case):
    found = rows_of(out / case)
    assert found.keys() == alone.keys() == {"0", "1"}
    for step, expected in alone.items():
        values = found[step]
        assert values.keys() == expected.keys()
        for tag, value in expected.items():
            if tag.startswith("grad_rms") and case != "tensor":
                value = 2 * value  # of a loss whose mean over two ranks is that of all the data
            assert values[tag] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True), (step, tag)


@pytest.fixture(scope="module")
def deepspeed_out(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (it is for Linux)")
    cases = ["deepspeed1", "deepspeed2", "deepspeed3"]
    script = HERE / "monitor_runs.py"
    return shared_folder(tmp_path_factory, "monitor-ds", lambda out: run_processes(script, 2, str(out), *cases))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_logs_the_activations_of_one_process(deepspeed_out, alone, stage):
    found = rows_of(deepspeed_out / f"deepspeed{stage}")
    assert found.keys() == alone.keys()
    for step, expected in alone.items():
        wanted = {tag: value for tag, value in expected.items() if not tag.startswith(("weight", "grad_v", "update"))}
        wanted = {tag: value for tag, value in wanted.items() if not tag.startswith("grad_rms")}  # of a scaled loss
        if stage == 3:
            wanted = {tag: value for tag, value in wanted.items() if not tag.endswith("/extra")}
        assert found[step].keys() >= wanted.keys()
        assert {tag: found[step][tag] for tag in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-7, nan_ok=True)


def test_ranks_that_call_different_activations_log_those_of_the_first(out):
    found = torch.load(out / "differs.pt", weights_only=True)
    assert {"rho/net.1", "rho/act"} <= found.keys()


def test_first_fsdp_has_the_activations_of_one_process(out, alone):
    found = torch.load(out / "fsdp1.pt", weights_only=True)
    for name, of in (("0.1", "net.1"), ("1", "act")):
        for statistic in ("rho", "rho_prime", "saturation", "sparsity", "dead_units", "input_std"):
            assert found[f"{statistic}/{name}"] == pytest.approx(alone["0"][f"{statistic}/{of}"], rel=1e-4)


def test_runs_show_what_they_are_to_show(alone):
    for values in alone.values():
        assert values["dead_units/net.1"] == 0.4
        assert values["dormant_units/net.1"] >= 0.4
        assert 0 < values["grad_variance/net.2.weight"] < math.inf
    assert {tag for tag in alone["0"] if "extra" in tag} >= {"rho/extra", "dead_units/extra"}


@pytest.mark.parametrize("case", ["ddp", pytest.param("mesh", marks=pytest.mark.skipif(OLD_TORCH, reason="see above"))])
def test_log_takes_one_reduction(out, case):
    assert torch.load(out / f"{case}.pt", weights_only=True)["reductions"] == 3  # the first log learns the units
