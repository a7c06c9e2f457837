"""DeepSpeed under Lightning's strategy (gloo, two CPU processes): the noise of one process."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import loader, quiet_trainer, run_processes, shared_folder
from torch import nn

from lightning_noisy import add_gradient_noise
from lightning_noisy.gradient_noise.deepspeed import base_optimizer, fragments
from lightning_noisy.gradient_noise.gradients import Fragment
from lightning_noisy.schedules import FollowLR

HERE = Path(__file__).parent
CASES = [
    *("stage0", "stage0-bf16", "stage1", "stage1-bf16"),
    *("stage2", "stage2-accumulated", "stage2-offloaded", "stage2-fp16", "stage2-resumed"),
    *("stage3", "stage3-accumulated", "stage3-subgroups", "stage3-resumed"),
]


@pytest.fixture(scope="module")
def runs():
    """The script as a module, for the same model and data in this one process."""
    with pytest.MonkeyPatch.context() as patch:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (it is for Linux)")
        patch.syspath_prepend(str(HERE))
        import deepspeed_runs
    return deepspeed_runs


@pytest.fixture(scope="module")
def results(runs, tmp_path_factory):
    """What each case gave, run one after the other in the same processes; None if DeepSpeed refuses its dtype here."""
    accelerator = runs.deepspeed.accelerator.get_accelerator()
    refused = {"fp16"} if not accelerator.is_fp16_supported() else set()
    refused |= {"bf16"} if not accelerator.is_bf16_supported() else set()
    cases = [case for case in CASES if case.rpartition("-")[2] not in refused]
    script = HERE / "deepspeed_runs.py"
    out = shared_folder(tmp_path_factory, "deepspeed", lambda out: run_processes(script, 2, str(out), *cases))
    return {case: torch.load(out / f"{case}.pt", weights_only=True) if case in cases else None for case in CASES}


@pytest.fixture(scope="module")
def expected(runs):
    model = runs.Flat()
    quiet_trainer(callbacks=[runs.noise(model)], max_steps=3).fit(model, loader(runs.DATA))
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_adds_the_noise_of_one_process_once_a_step(results, expected, case):
    result = results[case]
    if result is None:
        pytest.skip(f"DeepSpeed says that this machine doesn't support the dtype of {case}")
    assert result["steps"] == [3]
    assert result["state"].keys() == expected.keys()
    for name, value in expected.items():
        assert value.count_nonzero() == (value.numel() if name in ("scale", "net.0.weight") else 0), name
        found = result["state"][name]
        assert torch.equal(found, value.to(found.dtype)), name


class Zero:
    """The outside of ZeRO 1 on one rank: two groups, of which the optimizer sees one after the other."""

    __module__ = "deepspeed.stand_in"

    def __init__(self, model):
        self.bit16_groups = [[model[0].weight, model[0].bias], [model[1].weight, model[1].bias]]
        self.single_partition_of_fp32_groups = []
        for group in self.bit16_groups:
            offset = 0
            for parameter in group:
                inside, outside = (SimpleNamespace(start=i, numel=parameter.numel()) for i in (offset, 0))
                parameter._hp_mapping = SimpleNamespace(hp_fragment_address=inside, lp_fragment_address=outside)
                offset += parameter.numel()
            self.single_partition_of_fp32_groups.append(torch.zeros(offset + 3, requires_grad=True))  # and padding
        self.optimizer = torch.optim.SGD([{"params": [flat]} for flat in self.single_partition_of_fp32_groups], lr=1.0)

    def step(self, groups=(0, 1)):
        every = self.optimizer.param_groups
        for i in groups:
            self.optimizer.param_groups = [every[i]]
            flat = self.single_partition_of_fp32_groups[i]
            flat.grad = torch.zeros_like(flat)
            self.optimizer.step()
            self.optimizer.param_groups = every


def small_model():
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))


def test_calls_for_all_vectors_are_one_step():
    zero = Zero(model := small_model())
    handle = add_gradient_noise(zero, lambda t: 10.0**t, seed=3, model=model)
    other = small_model()
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    add_gradient_noise(optimizer, lambda t: 10.0**t, seed=3, model=other)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    for steps in (1, 2):
        zero.step()
        assert handle.step == steps
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    for flat, layer in zip(zero.single_partition_of_fp32_groups, other, strict=True):
        expected = torch.cat([layer.weight.flatten(), layer.bias, torch.zeros(3)])
        assert torch.equal(flat, expected)
    zero.step(groups=[0])
    assert handle.step == 2  # the step is still under way


def test_a_step_that_ended_early_is_not_added_to_the_next():
    zero = Zero(model := small_model())
    handle = add_gradient_noise(zero, lambda t: 1.0, model=model)
    zero.step(groups=[0])
    zero.step()
    assert handle.step == 2
    zero.step()
    assert handle.step == 3


def test_a_restored_step_begins_anew():
    zero = Zero(model := small_model())
    handle = add_gradient_noise(zero, lambda t: 1.0, model=model)
    zero.step()
    state = handle.state_dict()
    zero.step(groups=[0])
    handle.load_state_dict(state)
    zero.step()
    assert handle.step == 2


def test_std_is_that_of_the_first_group():
    zero = Zero(model := small_model())
    for group, lr in zip(zero.optimizer.param_groups, (2.0, 5.0), strict=True):
        group["lr"] = lr
    handle = add_gradient_noise(zero, FollowLR(1.0), model=model)
    zero.step()
    assert handle.last_step.std == 2.0


def test_a_filter_that_chooses_none_warns_and_no_step_counts():
    zero = Zero(model := small_model())
    handle = add_gradient_noise(zero, lambda t: 1.0, model=model, params=lambda name, parameter: False)
    with pytest.warns(UserWarning, match="chooses none of the optimizer's 4 parameters"):
        zero.step()
    zero.step()
    assert (handle.step, handle.last_step) == (0, None)
    assert all(flat.count_nonzero() == 0 for flat in zero.single_partition_of_fp32_groups)


def test_a_parameter_with_a_vector_of_its_own_keeps_its_strides():
    parameter = nn.Parameter(torch.zeros(3, 4))
    vector = torch.zeros(4, 3).t().requires_grad_()
    optimizer = SimpleNamespace(fp16_groups=[[parameter]], fp32_groups=[[vector]])
    ((_, fragment),) = fragments(optimizer)[vector]
    vector.grad = torch.zeros(4, 3).t()
    assert fragment.grad is vector.grad


def test_add_gradient_noise_takes_the_engine_for_the_model():
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    flats = []
    for wrap in (lambda module: module, DeepSpeedEngine):
        zero = Zero(model := small_model())
        add_gradient_noise(zero, lambda t: 1.0, model=wrap(model))
        zero.step()
        flats.append(zero.single_partition_of_fp32_groups)
    assert all(torch.equal(a, b) for a, b in zip(*flats, strict=True))


def test_fragment_is_a_view_of_the_vectors_gradient():
    flat = torch.zeros(10, requires_grad=True)
    fragment = Fragment(flat, 3, 4, 0)
    assert fragment.grad is None
    flat.grad = torch.arange(10.0)
    assert fragment.grad.tolist() == [3, 4, 5, 6]
    assert fragment.grad.data_ptr() == flat.grad.data_ptr() + 12


def test_what_noise_does_not_reach_under_deepspeed_is_refused():
    zero = Zero(model := small_model())
    with pytest.raises(ValueError, match="relative=True needs the norm of the whole gradient"):
        add_gradient_noise(zero, lambda t: 1.0, model=model, relative=True)
    with pytest.raises(ValueError, match="pass model=engine.module"):
        add_gradient_noise(zero, lambda t: 1.0)
    add_gradient_noise(zero, lambda t: 1.0, model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model has not all of the parameters"):
        zero.step()
    zero.zenflow = True
    with pytest.raises(TypeError, match="without ZenFlow"):
        add_gradient_noise(zero, lambda t: 1.0, model=model)
    del zero.single_partition_of_fp32_groups
    with pytest.raises(TypeError, match="can't find the parameters in DeepSpeed's Zero"):
        add_gradient_noise(zero, lambda t: 1.0, model=model)
    assert base_optimizer(torch.optim.SGD(model.parameters(), lr=1.0)) is None
    assert base_optimizer(object()) is None
