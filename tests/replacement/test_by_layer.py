"""One place that is called after several layers, or more often than it was seen."""

import copy
import functools

import pytest
import torch
from patterns import (
    ROWS,
    Loop,
    LoopInside,
    swished,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_noisy import replace_activations
from lightning_noisy.nn import NSwish
from lightning_noisy.replacement.by_layer import ByLayer


def run(model, x):
    """Output and gradients of a step, with dropout's numbers fixed."""
    torch.manual_seed(1)
    model.zero_grad()
    x.grad = None
    y = model(x)
    y.square().sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return y.detach(), x.grad, gradients


def test_a_loop_that_is_longer_than_shown_says_so_once():
    model = replace_activations(Loop(), "nsw", example_inputs=ROWS)
    first, second, third = model.activation_calls["relu#0"].children()
    model.layers.append(nn.Linear(6, 6))
    with pytest.warns(UserWarning, match="':relu#0' is passed more often than it was") as record:
        model(ROWS)
    assert len(record) == 1
    model(ROWS)  # no second warning
    assert [each.num_batches_tracked.item() for each in (first, second, third)] == [2, 2, 4]


def test_a_loop_that_is_checkpointed_within_its_module_repeats_each_pass():
    model = replace_activations(LoopInside(), "nsw", example_inputs=ROWS)
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain.last(plain.body(x, 3))
    expected, actual = run(plain, ROWS.clone().requires_grad_()), run(model, ROWS.clone().requires_grad_())
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[2][name], gradient) for name, gradient in expected[2].items())


def call(function, x):
    return function(x)


class CheckpointedAlone(nn.Module):
    """Checkpoints an activation apart from the layers before it; every second time with it, if they are mixed."""

    def __init__(self, checkpoint=call, is_mixed=False):
        super().__init__()
        self.checkpoint, self.is_mixed = checkpoint, is_mixed
        self.layers, self.act = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), nn.ReLU()

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if self.is_mixed and number % 2:
                x = self.checkpoint(lambda z, layer=layer: self.act(layer(z)), x)
            else:
                x = self.checkpoint(self.act, layer(x))
        return x


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("way", ["non-reentrant", "reentrant", "input made anew"])
def test_a_pass_that_is_checkpointed_without_its_layer_repeats_its_module(way, is_mixed):
    torch.manual_seed(0)
    plain = CheckpointedAlone(is_mixed=is_mixed)
    replace_activations(plain, "prelu", example_inputs=ROWS, outputs=True)
    assert [len(each) for each in plain.modules() if isinstance(each, ByLayer)] == [4]
    for number, module in enumerate(each for each in plain.modules() if isinstance(each, nn.PReLU)):
        module.weight.data.fill_(0.1 * number)
    model = copy.deepcopy(plain)
    model.checkpoint = functools.partial(checkpoint, use_reentrant=way == "reentrant")
    if way == "input made anew":
        model.checkpoint = lambda f, x: checkpoint(lambda z: f(2 * z), x / 2, use_reentrant=False)
    for scale in (1, 2):
        inputs = (scale * ROWS).requires_grad_(), (3 * ROWS).requires_grad_()
        first, second = [(model(x), plain(x)) for x in inputs]
        for pair in (second, first) if way == "input made anew" else (first, second, first):
            for each, y in zip((model, plain), pair, strict=True):
                each.zero_grad()
                y.sum().backward(retain_graph=True)
            pairs = zip(model.parameters(), plain.parameters(), strict=True)
            assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.cell = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 6)

    def encode(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return x

    def recur(self, x, count):
        for _ in range(count):
            x = torch.tanh(self.cell(x))
        return x

    def forward(self, x):
        return self.recur(self.encode(x), 2)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.child, self.head = Encoder(), nn.Linear(6, 2)

    def forward(self, x, count=3):
        return self.head(self.child.recur(self.child.encode(x), count))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("inputs", [None, ROWS])
def test_methods_of_a_child_and_loops_of_any_length_run_after_a_swap(inputs):
    model = replace_activations(Parent(), "nsw", example_inputs=inputs)
    for count in (3, 1, 7):
        for _ in range(3):
            model(ROWS, count).sum().backward()
    model.child(ROWS)
    model.child.encode(ROWS)
    assert len({id(module) for module in model.modules() if isinstance(module, NSwish)}) == 4  # 3 layers and the cell


def test_siamese_branches_share_their_activations():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def encode(self, x):
            return self.last(F.relu(self.first(x)))

        def forward(self, a, b):
            return self.encode(a) - self.encode(b)

    for inputs in (None, (ROWS, ROWS + 1)):
        model = replace_activations(Siamese(), "nsw", example_inputs=inputs)
        for training in (True, False):
            assert not model.train(training)(ROWS, ROWS).any()
        assert len(swished(model)) == 1


def test_a_module_that_is_reached_in_several_ways_has_a_state_for_each_layer():
    class Reached(nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = nn.ModuleDict({"relu": nn.ReLU()})
            self.drop = nn.Sequential(nn.ReLU(), nn.Dropout(0.0))
            self.child = nn.Module()
            self.child.act = nn.ReLU()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(7))

        def forward(self, x):
            a, b, c, d, e, f, g = self.layers
            x = self.acts["relu"](b(self.acts["relu"](a(x))))
            x = self.drop(d(self.drop(c(x))))
            return g(self.child.act(f(self.child.act(e(x)))))

    for inputs in (None, ROWS):
        model = replace_activations(Reached(), "nsw", example_inputs=inputs)
        for scale in (1, 2, 3):
            model(scale * ROWS)
        modules = [module for module in model.modules() if isinstance(module, NSwish)]
        assert [module.num_batches_tracked.item() for module in modules] == [3] * 6
        assert len({module.running_mean.item() for module in modules}) == 6
        twin = copy.deepcopy(model)
        twin(ROWS)
        assert {module.num_batches_tracked.item() for module in modules} == {3}
        assert {m.num_batches_tracked.item() for m in twin.modules() if isinstance(m, NSwish)} == {4}
