"""Models made up of what people write: looking changes nothing, and every call is accounted for."""

import copy
import importlib.util
import itertools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patterns import CallCounter, itself
from torch import nn

from lightning_noisy import activation_sites, replace_activations

FUNCTIONS = st.sampled_from(["F.relu", "torch.tanh", "F.gelu", "torch.sigmoid", "F.silu", "F.softplus"])
MODULES = st.sampled_from(["self.relu", "self.tanh", "self.acts['gelu']", "self.block.act", "nn.SiLU()", "self.held"])
ACTIVATIONS = FUNCTIONS | MODULES
LAYERS = st.sampled_from(["self.a", "self.b", "self.norm", "self.layers[1]"])
STATEMENTS = st.one_of(
    st.builds("x = {}({}(x))".format, ACTIVATIONS, LAYERS),
    st.builds("x = x + {}({}({}(x)))".format, LAYERS, ACTIVATIONS, LAYERS),
    st.builds("x = {}(x + {}(x))".format, ACTIVATIONS, LAYERS),
    st.builds("x = {}(x) * {}({}(x))".format, LAYERS, ACTIVATIONS, LAYERS),
    st.builds("for layer in self.layers:\n            x = {}(layer(x))".format, ACTIVATIONS),
    st.builds("for _ in range(2):\n            x = {}({}(x))".format, ACTIVATIONS, LAYERS),
    st.just("x = self.helper(x)"),
    st.just("x = self.block(x)"),
    st.just("x = checkpoint(self.block, x, use_reentrant=False)"),
    st.builds("x = self.a({}(x).chunk(2, -1)[0].repeat(1, 2))".format, ACTIVATIONS),
    st.builds("if x.shape[0] > 100:\n            x = {}(x)".format, ACTIVATIONS),
    st.builds("x = torch.cat([{}(x)[:, :3], x[:, 3:]], 1)".format, ACTIVATIONS),
    st.just("self.steps = self.steps + 1"),
    st.just("self.log.append(x.detach().mean())"),
)
SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        return self.two(self.act(self.one(x)))


class Example(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.relu, self.tanh, self.block, self.held = nn.ReLU(), nn.Tanh(), Block(), F.elu
        self.acts = nn.ModuleDict({{"gelu": nn.GELU()}})
        self.register_buffer("steps", torch.zeros(()))
        self.log = []

    def helper(self, x):
        return F.leaky_relu(self.b(x), 0.2)

    def forward(self, x):
        {body}
        return {end}(x)
"""
NUMBER = itertools.count()


class Marked(nn.Module):
    """An activation that counts its calls, which the counter of all others passes over."""

    calls, outside = 0, CallCounter()

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    @classmethod
    def of(cls, site):
        return cls(copy.deepcopy(site.module))

    def forward(self, x):
        Marked.calls += 1
        before, Marked.outside.inside = Marked.outside.inside, True
        try:
            return self.plain(x)
        finally:
            Marked.outside.inside = before


def made(body, end, folder):
    file = folder / f"example{next(NUMBER)}.py"
    file.write_text(SOURCE.format(body="\n        ".join(body), end=end))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Example()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    body=st.lists(STATEMENTS, min_size=1, max_size=6),
    end=st.sampled_from(["self.head", "torch.sigmoid", "F.relu"]),
    observed=st.booleans(),
)
def test_random_models_are_the_same_by_themselves_and_every_call_is_accounted_for(folder, body, end, observed):
    model = made(body, end, folder)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state, attributes = copy.deepcopy(model.state_dict()), {m: dict(vars(m)) for m in model.modules()}
    sites = activation_sites(model, x if observed else None)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {module: dict(vars(module)) for module in model.modules()} == attributes
    assert not model.log

    plain = copy.deepcopy(model)
    with CallCounter() as counter, torch.no_grad():
        expected = plain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        marked = replace_activations(
            copy.deepcopy(model), Marked.of, example_inputs=x if observed else None, gates=True, outputs=True,
            after_residual=True,
        )  # fmt: skip
    Marked.calls = 0
    Marked.outside.count = 0
    with Marked.outside as left, torch.no_grad():
        marked(x)
    assert Marked.calls + left.count == counter.count
    assert left.count == 0 or sites.unresolved

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        everything = {"gates": True, "outputs": True, "after_residual": True}
        replaced = replace_activations(
            copy.deepcopy(model), itself, example_inputs=x if observed else None, **everything
        )
        swished = replace_activations(copy.deepcopy(model), "nsw", example_inputs=x if observed else None)
    twin = copy.deepcopy(replaced)
    with torch.no_grad():
        assert torch.equal(replaced(x), expected)
        assert torch.equal(twin(x), expected)
    for _ in range(2):
        swished(x.clone().requires_grad_()).sum().backward()
    assert torch.isfinite(swished(x)).all()
