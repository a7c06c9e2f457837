"""What `activation_sites` finds, counted by intercepting the calls."""

import copy

import pytest
import torch
from patterns import (
    BasicConv,
    CallCounter,
    Checkpointed,
    Derived,
    Everything,
    FeedForward,
    GatedFeedForward,
    Held,
    Helped,
    Inception,
    Loop,
    LoopOfOne,
    NewGELU,
    QuickGELU,
    Renamed,
    ResNet,
    Shared,
    SqueezeExcite,
)
from torch import nn
from torch.nn import functional as F

from lightning_noisy import activation_sites

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

MODELS = {
    "resnet": (ResNet, IMAGE, 17),
    "inception": (Inception, IMAGE, 94),
    "gated": (GatedFeedForward, ROWS, 1),
    "squeeze": (SqueezeExcite, ROWS, 2),
    "loop": (Loop, ROWS, 3),
    "loop of one": (LoopOfOne, ROWS, 3),
    "everything": (Everything, ROWS, 8),
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), ROWS, 2),
    "function": (lambda: FeedForward(F.gelu), ROWS, 1),
    "foreign": (lambda: FeedForward(NewGELU()), ROWS, 1),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), ROWS[None], 1),
}


def names(sites):
    return [site.name for site in sites]


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_call_is_found(name, observed):
    make, x, count = MODELS[name]
    model = make()
    with CallCounter() as counter, torch.no_grad():
        model.train()(x)
    assert counter.count == count
    sites = activation_sites(model, x if observed else None)
    assert len(sites) == count
    assert len(set(names(sites))) == count
    assert sites.unresolved == []


@pytest.mark.parametrize("observed", [True, False])
def test_a_resnet_has_seventeen_sites_eight_of_them_after_an_addition(observed):
    sites = activation_sites(ResNet(), IMAGE if observed else None)
    assert names(sites)[:3] == ["relu", "layer1.0.relu", "layer1.0.relu#2"]
    assert {site.name for site in sites if site.after_residual} == {
        f"layer{stage}.{block}.relu#2" for stage in (1, 2, 3, 4) for block in (0, 1)
    }
    assert {(site.kind, site.function) for site in sites} == {("module", "relu")}
    assert sites[0].batch_norm == "bn1"


@pytest.mark.parametrize("observed", [True, False])
def test_names_say_owner_function_and_number(observed):
    sites = activation_sites(Inception(blocks=1), IMAGE if observed else None)
    assert "features.3.branch1x1:relu#0" in names(sites)
    assert {site.kind for site in sites} == {"function"}
    assert {site.owner for site in sites} == {site.name.partition(":")[0] for site in sites}
    everything = activation_sites(Everything(), ROWS if observed else None)
    assert sorted((site.key, site.kind) for site in everything) == [
        ("elu#0", "inline"), ("gelu#0", "function"), ("leaky_relu#0", "function"), ("relu#0", "method"),
        ("relu#1", "inline"), ("relu#2", "function"), ("softplus#0", "function"), ("tanh#0", "function"),
    ]  # fmt: skip
    modules = {site.key: repr(site.module) for site in everything}
    assert modules["leaky_relu#0"] == "LeakyReLU(negative_slope=0.3)"
    assert modules["elu#0"] == "ELU(alpha=0.5)"
    assert modules["gelu#0"] == "GELU(approximate='tanh')"
    assert modules["softplus#0"] == "Softplus(beta=2, threshold=20.0)"
    assert modules["relu#2"] == "ReLU(inplace=True)"


@pytest.mark.parametrize("observed", [True, False])
def test_gates_are_seen(observed):
    (site,) = activation_sites(GatedFeedForward(), ROWS if observed else None)
    assert site.is_gate is True
    relu, sigmoid = activation_sites(SqueezeExcite(), ROWS if observed else None)
    assert (relu.is_gate, sigmoid.is_gate) == (False, True)


def test_outputs_are_seen():
    sites = activation_sites(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()), ROWS)
    assert [site.is_output for site in sites] == [False, True]


@pytest.mark.parametrize(
    ("act", "kind", "function"),
    [
        (F.gelu, "attribute", "gelu"),
        (nn.GELU(), "module", "gelu"),
        (NewGELU(), "module", "gelu"),
        (QuickGELU(), "module", "quickgelu"),
        (torch.tanh, "attribute", "tanh"),
    ],
)
def test_whatever_is_held_as_an_attribute_is_found(act, kind, function):
    (site,) = activation_sites(FeedForward(act), ROWS, also={NewGELU: "gelu", QuickGELU: "quickgelu"})
    assert (site.name, site.kind, site.function) == ("act", kind, function)


def test_a_shared_layer_has_one_site():
    assert names(activation_sites(Shared(), ROWS)) == ["layer.act"]


def test_a_loop_needs_example_inputs_where_it_cannot_be_traced():
    class Untraceable(Loop):
        def forward(self, x):
            for layer in list(self.layers)[: int(x.shape[0] > 0) * 3]:
                x = F.relu(layer(x))
            return self.last(x)

    sites = activation_sites(Untraceable())
    assert names(sites) == [":relu#0"]
    assert "in a loop that can't be traced" in sites.unresolved[0]
    assert names(activation_sites(Untraceable(), ROWS)) == [":relu#0", ":relu#0@2", ":relu#0@3"]


def test_what_cannot_be_looked_into_is_named_with_the_reason():
    sites = activation_sites(Held())
    assert list(sites) == []
    assert sites.unresolved == [
        "(root): getattr(torch, 'sig' + 'moid') in forward: hold the function as an attribute",
        "(root): relu, tanh in the container 'acts'; make it an nn.ModuleList or an nn.ModuleDict",
    ]
    observed = activation_sites(Held(), ROWS).unresolved
    for call in ("a relu", "a tanh", "a sigmoid"):
        assert any(f"(root): {call} that the source of its class doesn't show" in reason for reason in observed)
    assert "not looked into: (root)" in str(sites)
    assert "super().forward, which mentions relu" in activation_sites(Derived()).unresolved[0]
    helped = activation_sites(Helped())
    assert list(helped) == []
    assert helped.unresolved == [
        "(root): squash, which mentions tanh: make it a method, or a module",
        "(root): swish, which mentions sigmoid: make it a method, or a module",
    ]
    renamed = activation_sites(Renamed())
    assert renamed.unresolved == ["(root): forward has ReLU, elu other than in a call that can be replaced"]
    code = {}
    source = "def forward(self, x): return relu(x)"
    exec(compile(source, "<of its own>", "exec"), {"relu": torch.relu}, code)  # Python 3.13 knows "<string>"'s
    hidden = type("Hidden", (nn.Module,), code)
    assert "forward, which mentions relu: there is no source to read" in activation_sites(hidden()).unresolved[0]


def test_what_is_not_called_is_no_site_of_a_forward_pass():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[0].unused = nn.Tanh()
    sites = activation_sites(model, ROWS)
    assert [(site.name, site.role) for site in sites] == [("1", "output"), ("0.unused", "unused")]


def test_recurrent_layers_are_listed():
    model = nn.ModuleDict({"a": nn.LSTM(2, 2), "b": nn.RNN(2, 2, nonlinearity="relu"), "c": nn.GRUCell(2, 2)})
    assert [(site.name, site.kind, site.function) for site in activation_sites(model)] == [
        ("a", "recurrent", "tanh"), ("b", "recurrent", "relu"), ("c", "recurrent", "tanh"),
    ]  # fmt: skip


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_no_trace(observed, training):
    model = nn.Sequential(BasicConv(3, 4, kernel_size=3), nn.Dropout(), BasicConv(4, 4, kernel_size=3)).train(training)
    model[0].conv.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    structure = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    random = torch.get_rng_state()
    activation_sites(model, IMAGE if observed else None)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(module, type(module), dict(module.__dict__)) for module in model.modules()] == structure


def test_a_failing_forward_pass_leaves_no_trace():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    children = list(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        activation_sites(model, torch.randn(2, 5))
    assert list(model) == children


def test_example_inputs_are_positional_or_named():
    class Two(nn.Module):
        def forward(self, x, y=None):
            return F.relu(x) + (0 if y is None else F.gelu(y))

    assert len(activation_sites(Two(), (ROWS, ROWS))) == 2
    assert len(activation_sites(Two(), {"x": ROWS, "y": ROWS})) == 2
    sites = activation_sites(Two(), ROWS)
    assert [(site.name, site.role) for site in sites] == [(":relu#0", "output"), (":gelu#0", "unused")]
