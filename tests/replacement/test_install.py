"""Modules in the places of activations."""

import copy
import pickle

import pytest
import torch
from patterns import ROWS, Inception, ResNet, replaced
from torch import nn
from torch.nn import functional as F

from lightning_noisy import activation_sites, replace_activations, restore_activations
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.nn import NAH, NReLU, NSwish
from lightning_noisy.replacement import call_redirect, source


def test_a_child_that_stays_at_one_use_and_goes_at_the_other_keeps_both():
    model = replace_activations(ResNet(), "nsw")
    block = model.layer1[0]
    assert type(block.relu) is NSwish
    assert type(block.activation_calls["relu#2"]) is nn.ReLU
    other = replace_activations(ResNet(), "nsw", include="*#2", after_residual=True)
    assert type(other.layer1[0].relu) is nn.ReLU
    assert type(other.layer1[0].activation_calls["relu#2"]) is NSwish


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = Inception(blocks=1)
    structure = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    send, count = call_redirect.redirect_calls, []

    def fails(owner, theirs):
        count.append(owner)
        if len(count) == 5:
            raise source.UnreadError("the fifth")
        send(owner, theirs)

    monkeypatch.setattr("lightning_noisy.replacement.install.redirect_calls", fails)
    with pytest.raises(ValueError, match="can't be replaced: the fifth. Make them modules, or exclude"):
        replace_activations(model, "nsw")
    assert [(module, type(module), dict(module.__dict__)) for module in model.modules()] == structure


def test_parameters_follow_dtype_and_freezing_of_their_owner():
    model = Inception(blocks=1).double()
    model.features.requires_grad_(False)
    replace_activations(model, "nsw")
    assert all(module.alpha.dtype == torch.float64 for module in replaced(model, NSwish))
    assert not any(module.alpha.requires_grad for module in replaced(model, NSwish))
    evaluated = replace_activations(Inception(blocks=1).eval(), "nsw")
    assert not any(module.training for module in evaluated.modules())


def test_prelu_is_restored_with_the_dtype_of_the_model():
    model = replace_activations(nn.Sequential(nn.Linear(6, 6), nn.PReLU()), "nsw", outputs=True).double()
    assert restore_activations(model)(ROWS.double()).dtype == torch.float64


def test_a_failing_option_leaves_no_hook():
    model = ResNet()
    with pytest.raises(ValueError, match="buffer_batchnorm"):
        replace_activations(model, "nsw", buffer_batchnorm="head")
    assert not model._load_state_dict_pre_hooks


class UsedTwice(nn.Module):
    """One activation that is called twice, the second time after a residual addition."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.act(self.first(x))
        return self.second(self.act(y + x))


@pytest.mark.parametrize("options", [{}, {"include": "act"}, {"include": "act#2", "after_residual": True}])
def test_uses_of_a_module_have_hooks_of_their_own(options):
    model = UsedTwice()
    calls = []
    model.act.register_forward_hook(lambda module, *_: calls.append("before"))
    replace_activations(model, "nsw", example_inputs=torch.randn(3, 4), **options)
    uses = [model.act, *model.activation_calls.values()]
    assert len(uses) == 2
    calls.clear()
    for use, name in zip(uses, "ab", strict=True):
        use.register_forward_hook(lambda module, *_, name=name: calls.append(name))
    model(torch.randn(3, 4))
    assert calls == ["before", "a", "before", "b"]


def test_recorder_measures_each_use_of_a_module_by_itself():
    model = replace_activations(UsedTwice(), "nsw", include="act")
    recorder = ActivationRecorder(model)
    x = torch.randn(64, 4)
    seen = {}
    for name, use in (("act", model.act), ("act#2", *model.activation_calls.values())):
        use.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    with recorder, torch.no_grad():
        model(x)
    found = recorder.compute()
    for name, (h, output) in seen.items():
        h, output = h.double().numpy(), output.double().numpy()
        assert found[f"rho/{name}"] == pytest.approx((output**2).mean() / h.var(), rel=1e-5)
    assert found["rho/act"] != found["rho/act#2"]


@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize(
    "copied",
    [
        lambda layer: nn.ModuleList([layer]),  # what the copies are compared with
        lambda layer: nn.ModuleList([copy.deepcopy(layer)]),
        lambda layer: nn.ModuleList([pickle.loads(pickle.dumps(layer))]),
        lambda layer: nn.TransformerDecoder(layer, 2).layers,
    ],
)
def test_copies_of_torchs_layers_have_the_activation(cls, copied):
    torch.manual_seed(0)
    layer = replace_activations(cls(8, 2, 16, activation=F.relu, batch_first=True), "nsw")
    x = torch.randn(2, 5, 8)
    inputs = (x,) if cls is nn.TransformerEncoderLayer else (x, x)
    layer(*inputs)
    expected = layer.eval()(*inputs)
    for each in copied(layer):
        assert torch.equal(each(*inputs), expected)
        assert type(each.activation) is NSwish
        assert each.activation is each._modules["activation"]
        replace_activations(each, "nrelu")
        assert type(copy.deepcopy(each).activation) is NReLU
        assert restore_activations(each).activation is F.relu
        assert "activation" not in each._modules


def test_a_use_that_stayed_has_its_own_function_after_the_other_was_replaced():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    model = replace_activations(Twice(), "tanh")
    assert [(site.name, site.function, site.role) for site in activation_sites(model)] == [
        ("act", "tanh", "hidden"),
        ("act#2", "relu", "output"),
    ]
    replace_activations(model, "nah", outputs=True)
    assert [each.function_name for each in model.modules() if isinstance(each, NAH)] == ["tanh", "relu"]
    assert restore_activations(model)(ROWS).min() >= 0
