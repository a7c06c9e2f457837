"""Which elements the statistics of a normalized activation are of: instances, and all that the ranks saw in a step."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_noisy import fold_normalization, replace_activations
from lightning_noisy.functional.moments import moments, pooled, sums
from lightning_noisy.nn import NormalizedActivation, NReLU, NSwish
from lightning_noisy.nn.synchronize import synchronize_statistics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(x, axes):
    """Swish, normalized over axes in float64, and its derivative's factor."""
    x = x.double().numpy()
    s = 1 / (1 + np.exp(-x))
    y, slope = x * s, s * (1 + x * (1 - s))
    options = {"axis": axes, "keepdims": True}
    rho, rho_prime = y.var(**options) / x.var(**options), (slope**2).mean(**options)
    factor = np.sqrt((rho + rho_prime) / (2 * rho * rho_prime))
    return factor * (y - y.mean(**options)), factor * slope


@pytest.mark.parametrize(("dims", "axes"), [(1, (1,)), ((-1,), (2,)), ((1, 2), (1, 2)), ([0, -1], (0, 2))])
@pytest.mark.parametrize("training", [True, False])
def test_instances_are_normalized_by_their_own_statistics(dims, axes, training):
    x = (normal(5, 7, 11) * torch.tensor([0.5, 1, 2, 4, 8])[:, None, None] + 1).requires_grad_()
    y = NSwish(instance_dims=dims).train(training)(x)
    y.sum().backward()
    expected, slope = oracle(x.detach(), axes)
    np.testing.assert_allclose(y.detach(), expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(x.grad, slope, atol=2e-5, rtol=2e-5)  # the statistics are constants


def test_instance_without_gains_passes_as_it_is():
    x = normal(4, 50)
    x[1], x[2] = 3.0, -1.0  # constant, inactive
    x[3, 0] = torch.nan
    module = NReLU(instance_dims=1)
    y = module(x)
    assert torch.equal(y[1], torch.full((50,), 3.0))
    assert torch.equal(y[2], torch.zeros(50))
    assert y[3, 0].isnan()
    assert y[3, 1:].isfinite().all()
    torch.testing.assert_close(y[0], NReLU()(x[0]))
    np.testing.assert_allclose(module.running_mean, F.relu(x[0]).mean(), rtol=1e-6)  # of the instances with gains
    assert all(buffer.isfinite().all() for buffer in module.buffers())
    module(torch.full((2, 3), torch.nan))
    assert module.num_batches_tracked == 1
    assert module(torch.empty(0, 50)).shape == (0, 50)


@pytest.mark.parametrize("dims", [(1, 1), (3,), (1, -2), -4])
def test_instance_dims_must_be_dimensions_of_the_input(dims):
    with pytest.raises(ValueError, match=r"instance_dims=.* are not dimensions of an input of shape \(2, 3, 4\)"):
        NSwish(instance_dims=dims)(normal(2, 3, 4))


@pytest.mark.parametrize(
    "options", [{"instance_dims": ()}, {"instance_dims": 1, "stride": 2}, {"instance_dims": 1, "synchronized": True}]
)
def test_instance_dims_refuse_options_that_contradict_them(options):
    with pytest.raises(ValueError, match="instance_dims"):
        NSwish(**options)


def test_instances_are_not_folded():
    model = nn.Sequential(NSwish(instance_dims=1), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="each instance has its own statistics"):
        fold_normalization(model, normal(3, 4))
    assert type(model[0]) is NSwish


def test_instances_by_name():
    model = replace_activations(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "nsw(instance_dims=(1,))")
    assert "instance_dims=(1,)" in repr(model)
    torch.testing.assert_close(model(normal(3, 4))[:1], model(normal(3, 4)[:1]))


def test_pooled_moments_are_those_of_all_elements_also_far_from_zero():
    parts = [normal(n, seed=n) * (1 + n) + 300 for n in (1, 20, 300)]
    added = sum(sums(len(x), moments(x.double(), x.double() ** 2, 2 * x.double()), dtype=torch.float64) for x in parts)
    found, x = pooled(added), torch.cat(parts).double().numpy()
    expected = x.mean(), x.var(), (x**2).mean(), (x**2).var(), (4 * x**2).mean()
    np.testing.assert_allclose(torch.stack(found), expected, rtol=1e-9)
    assert pooled(torch.zeros(6, dtype=torch.float64)).mean_x.isnan()


def both_ways(test):
    """With the sweeps, and by plain torch operations: another function object has no kernel."""
    return pytest.mark.parametrize("function", [F.silu, lambda x: F.silu(x)], ids=["swept", "plain"])(test)


@both_ways
def test_batch_with_infinities_adds_nothing_to_what_is_pooled(function):
    module = NormalizedActivation(function, synchronized=True)
    module(torch.tensor([1.0, torch.inf]))
    assert not module.pending.any()
    module(torch.tensor([1.0, 2.0]))
    assert module.pending[0] == 2


@both_ways
def test_synchronized_step_equals_the_whole_batch_at_once(function):
    parts, whole = (NormalizedActivation(function, synchronized=True) for _ in range(2))
    for step in range(4):
        x = normal(40, 3, seed=step) * (1 + step / 4) + step
        for part in x.split([1, 30, 9]):
            parts(part)
        whole(x)
        for module in (parts, whole):
            synchronize_statistics(module)
    for name, value in whole.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), value, rtol=1e-6, atol=1e-7)
    assert parts.num_batches_tracked == 4


@both_ways
def test_synchronized_values_are_those_of_eq_16_to_18_one_step_later(function):
    late, prompt = NormalizedActivation(function, synchronized=True), NormalizedActivation(function)
    for step in range(3):
        x = normal(50, seed=step) * (1 + step)
        before = copy.deepcopy(prompt).eval()
        y = late(x)
        expected = prompt(x) if step == 0 else before(x)  # the first batch has nothing to go by but itself
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        prompt(x) if step else None
        synchronize_statistics(late)
        for name, value in prompt.named_buffers():
            torch.testing.assert_close(late.get_buffer(name), value, rtol=1e-6, atol=1e-7)


def test_what_is_pending_survives_copies_and_is_no_state():
    module = NSwish(synchronized=True)
    module(normal(50))
    assert "pending" not in module.state_dict()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module))).half()
    assert twin.pending.dtype == torch.float64
    assert torch.equal(twin.pending, module.pending)
    assert torch.equal(NSwish(synchronized=True, device="meta").to_empty(device="cpu").pending, torch.zeros(6))


@both_ways
def test_synchronized_forward_is_repeated_by_checkpointing(function):
    results = []
    for checkpointed in (False, True):
        module = NormalizedActivation(function, synchronized=True)
        x = normal(60).requires_grad_()
        for _ in range(3):
            y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
            y.square().sum().backward()
            synchronize_statistics(module)
        results.append([x.grad, module.alpha.grad, *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_synchronized_compiles_without_a_break():
    torch._dynamo.reset()
    module = NSwish(synchronized=True)
    twin, compiled = copy.deepcopy(module), torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = normal(30, seed=step)
        torch.testing.assert_close(compiled(x), twin(x))
        for each in (module, twin):
            synchronize_statistics(each)
    torch.testing.assert_close(module.running_rho, twin.running_rho)


def test_synchronization_that_is_forgotten_is_noticed():
    module = NSwish(synchronized=True)
    module.eval()
    module.train()
    module(normal(9))
    with pytest.warns(UserWarning, match=r"call synchronize_statistics\(model\) after each step"):
        module.eval()
    with pytest.raises(ValueError, match="no activation that pools its statistics"):
        synchronize_statistics(NSwish())
