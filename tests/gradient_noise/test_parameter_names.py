"""By which names parameters get their noise."""

import pytest
import torch
from helpers import SpySGD, all_equal
from torch import nn

from lightning_noisy import add_gradient_noise
from lightning_noisy.gradient_noise.parameter_names import parameter_names
from lightning_noisy.kernels.gaussian import add_gaussian_, stream_key, substream
from lightning_noisy.schedules import Constant


def test_noise_is_the_documented_function_of_seed_stream_name_and_step():
    model = nn.ModuleDict({"large": nn.Linear(300, 200), "b": nn.Linear(4, 3), "a": nn.Linear(4, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = add_gradient_noise(optimizer, Constant(0.5), seed=3, stream="x", model=model)
    handle.load_state_dict({"seed": 3, "stream": "x", "step": 11})
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    key = stream_key(3, "x", 11)
    for name, parameter in model.named_parameters():
        expected = add_gaussian_(torch.zeros_like(parameter), 0.5, substream(key, name))
        assert torch.equal(-parameter.detach(), expected)


def test_noise_uses_the_optimizers_own_parameter_names_first():
    named = nn.Linear(4, 4)
    optimizers = [
        torch.optim.SGD(named.named_parameters(), lr=1.0),
        torch.optim.SGD(named.parameters(), lr=1.0),
    ]
    results = []
    for optimizer, model in zip(optimizers, (None, named), strict=True):
        nn.init.zeros_(named.weight)
        named.weight.grad = torch.zeros_like(named.weight)
        with add_gradient_noise(optimizer, Constant(1.0), model=model):
            optimizer.step()
        results.append(named.weight.detach().clone())
    assert torch.equal(*results)
    assert results[0].any()


def test_noise_ignores_the_wrappers_in_names():
    def run(model):
        model = model(nn.Sequential(nn.Linear(4, 4)))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        add_gradient_noise(optimizer, Constant(1.0), model=model)
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all_equal(run(lambda model: model), run(torch.compile))


def test_noise_of_the_others_stays_when_a_parameter_group_is_added():
    def run(*, late):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD([model[1].weight], lr=1.0)
        handle = add_gradient_noise(optimizer, Constant(1.0), model=model)
        optimizer.step()
        if late:
            optimizer.add_param_group({"params": [model[0].weight]})
        optimizer.step()
        return model, handle

    (alone, _), (grown, handle) = run(late=False), run(late=True)
    assert torch.equal(alone[1].weight, grown[1].weight)
    assert grown[0].weight.any()
    assert handle.step == 2


def test_parameters_of_equal_names_get_noise_each():
    layers = [nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False)]
    optimizer = torch.optim.SGD([{"params": list(layer.named_parameters())} for layer in layers], lr=1.0)
    add_gradient_noise(optimizer, Constant(1.0))
    for layer in layers:
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    noises = torch.stack([layer.weight.grad.flatten() for layer in layers])
    assert abs(torch.corrcoef(noises)[0, 1]) < 4 / 30
    assert noises.std(1).tolist() == pytest.approx([1, 1], rel=0.1)


def test_names_that_an_optimizer_has_from_a_compiled_model_are_those_of_the_model():
    def run(wrap):
        model = nn.Sequential(nn.Linear(4, 4))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD(wrap(model).named_parameters(), lr=1.0)
        add_gradient_noise(optimizer, Constant(1.0))
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all_equal(run(lambda model: model), run(torch.compile))


def test_noise_counts_a_tied_parameter_once():
    tied = nn.Linear(300, 300, bias=False)
    model = nn.Sequential(tied, tied)
    nn.init.zeros_(tied.weight)
    tied.weight.grad = torch.zeros_like(tied.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    add_gradient_noise(optimizer, Constant(1.0), model=model)
    optimizer.step()
    assert tied.weight.std().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_names_are_those_of_the_model_under_any_wrapping(wrap):
    def noise(wrapped, named):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        outer = wrap(model) if wrapped else model
        parameters = outer.named_parameters() if named else outer.parameters()
        optimizer = SpySGD(parameters)
        add_gradient_noise(optimizer, Constant(1.0), model=None if named else outer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return optimizer.seen[0]

    expected = noise(wrapped=False, named=False)
    assert all_equal(noise(wrapped=True, named=False), expected)
    assert all_equal(noise(wrapped=True, named=True), expected)


def test_names_that_are_equal_without_wrappers_get_noise_each():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(50))
            self._checkpoint_wrapped_module = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(50))})

    model = Odd()
    optimizer = SpySGD(model.parameters())
    add_gradient_noise(optimizer, Constant(1.0), model=model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    first, second = optimizer.seen[0]
    assert first.count_nonzero() == second.count_nonzero() == 50
    assert not torch.equal(first, second)


def test_names_do_not_see_parallel_wrappers_inside_of_the_model():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3)))
    expected = list(parameter_names(model).values())
    model[1] = nn.DataParallel(nn.Sequential(nn.DataParallel(model[1][0])))
    assert list(parameter_names(model).values()) == expected
    model[1].module.add_module("module", nn.Linear(1, 1))  # a name of one's own stays
    assert list(parameter_names(model).values())[-1] == "1.module.bias"
