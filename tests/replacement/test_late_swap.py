"""New parameters that an optimizer misses are noticed."""

import gc

import lightning as L
import pytest
import torch
from helpers import Net, batches, loader, quiet_trainer
from torch import nn

from lightning_noisy import ActivationReplacement, replace_activations, restore_activations


def mlp(*, bias=True):
    layers = [nn.Linear(4, 4, bias=bias), nn.ReLU(), nn.Linear(4, 4, bias=bias), nn.Tanh(), nn.Linear(4, 1, bias=bias)]
    return nn.Sequential(*layers)


def steps(model, optimizers, count=3, *, x=None):
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(8, 4) if x is None else x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def hooks(optimizer):
    return len(optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize("count", [1, 5])
def test_swap_after_the_optimizer_was_made_warns_once_and_names_the_parameters(count):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, [optimizer])
    replace_activations(model, {"relu": "nsw", "tanh": "nah"})
    with pytest.warns(UserWarning, match=r"SGD trains Sequential, but not 1.alpha, 3.p: it was made before") as record:
        steps(model, [optimizer], count)
    assert len(record) == 1


def test_optimizer_of_a_part_that_was_made_before_warns():
    model = mlp()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    replace_activations(model, "nsw")
    with pytest.warns(UserWarning, match="SGD trains Sequential, but not 1.alpha, 3.alpha"):
        steps(model, [optimizer])


@pytest.mark.parametrize("chosen", [lambda p: True, lambda p: p.dim() > 1], ids=["all", "matrices"])
def test_optimizer_made_after_the_swap_is_silent(chosen):
    model = replace_activations(mlp(), "nsw")
    steps(model, [torch.optim.SGD([p for p in model.parameters() if chosen(p)], lr=0.1)])


@pytest.mark.parametrize("weights_first", [True, False])
def test_optimizer_of_the_new_parameters_alone_is_silent(weights_first):
    model = mlp()
    before = set(model.parameters())
    optimizers = [torch.optim.SGD(before, lr=0.1)]
    replace_activations(model, "nsw")
    optimizers.append(torch.optim.SGD([p for p in model.parameters() if p not in before], lr=0.1))
    steps(model, optimizers if weights_first else optimizers[::-1])


def test_later_group_of_an_optimizer_made_after_the_swap_is_silent():
    model = replace_activations(mlp(), "nsw")
    activations = {p for module in (model[1], model[3]) for p in module.parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p not in activations], lr=0.1)
    steps(model, [optimizer])  # a warm-up
    optimizer.add_param_group({"params": list(activations)})
    steps(model, [optimizer])


def test_parts_that_are_trained_in_turn_are_silent():
    model = nn.ModuleList([mlp(), mlp()])
    replace_activations(model, "nsw")
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    for turn in (0, 0, 1):
        steps(model[turn], [optimizers[turn]], 2)


def test_added_parameter_group_is_silent():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = set(model.parameters())
    replace_activations(model, "nsw")
    optimizer.add_param_group({"params": [p for p in model.parameters() if p not in before]})
    steps(model, [optimizer])


@pytest.mark.parametrize("to", ["silu", "nsw(learn_alpha=False)", "frozen", "restored"])
def test_without_new_parameters_to_train_it_is_silent(to):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if to == "frozen":
        model[:4].requires_grad_(False)
        replace_activations(model, "nsw", include="1")
        model[1].requires_grad_(False)
    else:
        replace_activations(model, "nsw" if to == "restored" else to)
    if to == "restored":
        restore_activations(model)
    steps(model, [optimizer])


def test_other_models_and_dead_ones_are_silent():
    other = mlp()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    model = replace_activations(mlp(), "nsw")
    assert hooks(optimizer) == 0
    shared = nn.Sequential(model[0], nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    replace_activations(shared, "nsw")
    assert hooks(optimizer) == 1
    del shared
    gc.collect()
    optimizer.step()


class Outside(torch.optim.Optimizer):
    """A wrapper that skips `super().__init__`."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, inner.defaults

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


def test_wrapper_without_hooks_warns_by_its_inner_optimizer():
    model = mlp()
    optimizer = Outside(torch.optim.SGD(model.parameters(), lr=0.1))
    replace_activations(model, "nsw")
    with pytest.warns(UserWarning, match="SGD trains Sequential, but not 1.alpha, 3.alpha") as record:
        steps(model, [optimizer])
    assert len(record) == 1


def test_optimizers_are_found_without_running_code_of_other_objects():
    class Poser:
        @property
        def __class__(self):
            raise AssertionError

    posers = [Poser()]
    replace_activations(mlp(), "nsw")
    assert posers


def test_compiled_step_of_an_optimizer_is_not_broken_by_looking():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_activations(model, "nsw")
    model(torch.randn(8, 4)).mean().backward()
    before = model[0].weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(model[0].weight, before)


class InConfigureOptimizers(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        replace_activations(self, "nsw")
        return optimizer


class InOnTrainStart(Net):
    def on_train_start(self):
        replace_activations(self.net, "nsw")


@pytest.mark.parametrize("model", [InConfigureOptimizers, InOnTrainStart])
def test_swap_too_late_in_a_fit_warns_at_its_start(model):
    seen = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_):
            seen.append(1)

    with pytest.warns(UserWarning, match=r"SpySGD trains .*, but not (net\.)?1.alpha") as record:
        quiet_trainer(callbacks=[Count()], max_steps=1).fit(model(), loader(batches(3)))
    assert len([each for each in record if "but not" in str(each.message)]) == 1
    assert seen == [1]


def test_swap_by_the_callback_is_silent():
    quiet_trainer(callbacks=[ActivationReplacement("nsw")]).fit(Net(), loader(batches(3)))
