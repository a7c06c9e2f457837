import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_noisy import fold_normalization, replace_activations, restore_activations
from lightning_noisy.nn import NormalizedActivation, NReLU, NSwish


def trained(model, x, to="nsw"):
    """Swapped, with running values and parameters that aren't those of the beginning."""
    replace_activations(model, to, after_residual=True, outputs=True)
    for scale in (1.0, 2.0):
        model(scale * x + 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def left(model):
    return [name for name, module in model.named_modules() if isinstance(module, NormalizedActivation)]


def assert_folds(model, x):
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert fold_normalization(model, x) is model
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert left(model) == []


@pytest.mark.parametrize("to", ["nsw", "nrelu", "nlrelu", "normalized"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_take_scale_and_shift(to, bias):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16, bias=bias), nn.GELU(), nn.Linear(16, 3)]
    assert_folds(trained(nn.Sequential(*layers), x, to), x)


def test_convolutions_without_padding_and_flattening_in_between():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 9)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(100, 2),
    )  # fmt: skip
    model = trained(model, x, "nrelu")
    assert_folds(model, x)
    assert [type(model[i]) for i in (1, 3)] == [nn.ReLU, nn.ReLU]
    assert model[1].inplace


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twice, self.branch, self.output = NSwish(), nn.ReLU(), nn.ReLU()
        self.padded, self.conv = nn.ReLU(), nn.Conv1d(1, 1, 3, padding=1)
        self.shared_by, self.shared = nn.ReLU(), nn.Linear(4, 4)
        self.several, self.q, self.k = nn.ReLU(), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        x = self.last(self.twice(self.twice(self.first(x))))
        y = self.branch(x)
        x = self.shared(self.shared_by(self.shared(y))) + y
        x = x + self.conv(self.padded(x)[:, None])[:, 0]
        both = self.several(x)
        return self.output(torch.cat([self.q(both), self.k(both)], dim=1))


def test_what_can_not_be_exact_stays_and_is_named():
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    model = trained(Branches(), x).eval()
    expected = model(x)
    with pytest.warns(UserWarning, match="These activations stay normalized") as record:
        fold_normalization(model, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert sorted(left(model)) == ["branch", "output", "padded", "shared_by", "twice"]
    assert record[0].filename == __file__
    message = str(record[0].message)
    for name, reason in {
        "twice": "it is called several times",
        "branch": "its output goes into add",
        "output": "it is an output of the model",
        "padded": "the next convolution pads with zeros",
        "shared_by": "the next layer's weight is used elsewhere, too",
    }.items():
        assert f"{name} (" in message
        assert reason in message


def test_a_padded_convolution_is_named():
    x = torch.randn(4, 2, 6, 6)
    model = trained(nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)), x)
    with pytest.warns(UserWarning, match=r"1 \(the next convolution pads with zeros\)"):
        fold_normalization(model, x)


def test_training_flags_and_the_running_values_stay():
    x = torch.randn(32, 4)
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()), x).train()
    before = {name: value.clone() for name, value in model[3].state_dict().items()}
    with pytest.warns(UserWarning, match="stay normalized: 3"):
        fold_normalization(model, (x,))
    assert model.training
    assert model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model[3].state_dict().items())


def test_a_model_that_does_what_can_not_be_seen_is_left_as_it_was():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            y = self.act(self.first(x))
            return self.last(y) * float(y.detach().numpy().mean())

    x = torch.randn(32, 4)
    model = trained(Hidden(), x).eval()
    expected = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="Folding would change the output"):
        fold_normalization(model, x)
    assert torch.equal(model(x), expected)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Flaky(nn.Module):
    """Fails once it is folded, or returns something of another structure."""

    def __init__(self, way):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False)
        self.way = way

    def forward(self, x):
        y = self.last(self.act(self.first(x)))
        if self.last.bias is not None and self.way == "structure":
            return y, y
        if self.last.bias is not None:
            raise self.way("folded")
        return y


@pytest.mark.parametrize("way", [MemoryError, KeyboardInterrupt, "structure"])
@pytest.mark.parametrize("swapped", [True, False])
def test_an_error_of_the_folded_model_leaves_it_as_it_was(way, swapped):
    torch.manual_seed(0)
    model, x = Flaky(way), torch.randn(32, 4)
    if swapped:
        replace_activations(model, "nrelu")
    else:
        model.act = NReLU()
    model(x)
    expected, state = model.eval()(x), {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(ValueError if way == "structure" else way):
        fold_normalization(model, x)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


class Counting(nn.Module):
    """Counts its calls, keeps an activation, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second, self.kept, self.last = (
            nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4),
        )  # fmt: skip
        self.calls, self.features = 0, None

    def forward(self, x):
        self.calls += 1
        self.features = self.kept(self.second(self.act(self.first(x))))
        return self.last(self.features) * self.calls + 0 * torch.rand(())


def test_folding_runs_a_copy_and_leaves_what_the_model_stores():
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    model = trained(Counting(), x).eval()
    expected, state = model(x), torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"stay normalized: kept \(its output is stored\)\.$"):
        fold_normalization(model, x)
    assert model.calls == 3
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(x) / 4, expected / 3)


@pytest.mark.parametrize("clone", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("again", [None, "nsw", "nrelu"])
def test_folded_activations_are_not_restored(clone, again):
    x = torch.randn(32, 4)
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Flatten(0), nn.Softmax(0)]
    model = trained(nn.Sequential(nn.Sequential(*layers[:4]), *layers[4:]), x)
    unfolded = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="stay normalized: 0.3"):
        model = clone(fold_normalization(model.eval(), x))
    if again is not None:
        replace_activations(model, again, outputs=True)
    output = model(x)
    with pytest.raises(ValueError, match=r"put the normalization of 0\.1 into the weights of the next.*Restore before"):
        restore_activations(model)
    assert torch.equal(model(x), output)
    assert type(restore_activations(unfolded)[0][1]) is nn.ReLU


def test_the_same_replacement_leaves_what_was_folded():
    x = torch.randn(32, 4)
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), x).eval()
    expected = fold_normalization(model, x)(x)
    replace_activations(model, "nsw", after_residual=True, outputs=True)
    assert torch.equal(model(x), expected)
    replace_activations(model, {"silu": "nrelu"})
    assert type(model[1]) is NReLU


def test_only_modules_are_folded():
    with pytest.raises(TypeError, match="model must be an nn.Module, got 3"):
        fold_normalization(3, torch.randn(1))


class Kept(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.act, self.fc, self.way = NSwish(), nn.Linear(6, 6), way

    def forward(self, x):
        y = self.act(x)
        if self.way == "attribute":
            self.feature = y
        if self.way == "chunk":
            return self.fc(y)[:, :3] + torch.mul(*torch.chunk(y, 2, -1))
        return self.fc(y)


@pytest.mark.parametrize("way", ["attribute", "chunk", "hook"])
def test_what_else_is_used_or_kept_stays(way):
    model, x = Kept(way), torch.randn(5, 6)
    model(x)
    if way == "hook":
        model.act.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="These activations stay normalized: act"):
        fold_normalization(model, x)
    assert type(model.act) is NSwish


def test_output_that_is_not_finite_is_refused():
    model = nn.Sequential(NSwish(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        fold_normalization(model, torch.full((3, 2), torch.nan))
    assert type(model[0]) is NSwish


def test_a_model_that_needs_its_hooks_says_so():
    kept = []
    model = nn.Sequential(nn.Linear(4, 4), NReLU(), nn.Linear(4, 4), nn.Identity())
    model[0].register_forward_hook(lambda _, __, output: kept.append(output))
    model[3].forward = lambda x: x + kept.pop()
    x = torch.randn(32, 4)
    model(x)
    with pytest.raises(RuntimeError, match="Sequential can't be folded: a copy of it is run, without hooks"):
        fold_normalization(model, x)
    assert kept == []
