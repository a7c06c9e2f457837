"""Code that can't be read, or is read wrongly by who only looks at names, is left and named."""

import copy
import functools

import pytest
import torch
from patterns import ROWS, roles, swished
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import relu as rectify
from torch.utils.checkpoint import checkpoint_sequential

from lightning_noisy import activation_sites, replace_activations


class Local(nn.Module):
    """A name that means something else here."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.g = nn.Linear(6, 6), nn.Linear(6, 6), F.gelu

    def forward(self, x, kind="relu"):
        def relu(z):
            return z + 1

        text = """
a line at the beginning
"""
        # a comment at the beginning of a line
        match kind:
            case str() as tanh:
                tanh = tanh.upper()
        x = self.g(self.first(x), approximate="tanh")
        return self.last(relu(x)) if text else x


class Kinds(nn.Sequential):
    """Looks at types and children, in a helper."""

    def layers(self):
        return [child for child in self.children() if type(child) is not nn.Identity]

    def forward(self, x):
        for layer in self.layers():
            x = layer(x) if type(layer) is Block else F.relu(layer(x))
        return self[-1](x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(F.relu(self.first(x)))


@pytest.mark.parametrize("make", [Local, lambda: Kinds(nn.Linear(6, 6), Block(), nn.Linear(6, 6))])
@pytest.mark.parametrize("inputs", [None, ROWS])
@pytest.mark.filterwarnings("ignore:replace_activations")
def test_a_swap_by_itself_gives_the_same_or_nothing(make, inputs):
    torch.manual_seed(0)
    model = make()
    expected = model(ROWS)
    replace_activations(
        model,
        lambda site: copy.deepcopy(site.module),
        example_inputs=inputs,
        gates=True,
        outputs=True,
        after_residual=True,
    )
    assert torch.equal(model(ROWS), expected)
    replace_activations(model, "nsw", example_inputs=inputs)
    assert model(ROWS).isfinite().all()


def without_wraps(function):
    return lambda *arguments: function(*arguments)


class Hidden(nn.Module):
    """Activations where no source shows them."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how
        if how == "lambda":
            self.act = lambda x: F.relu(x)
        elif how == "partial":
            self.act = functools.partial(F.relu, inplace=True)
        elif how == "bound":
            self.act = self.squash
        elif how == "decorated":
            self.act = without_wraps(F.relu)

    def squash(self, x):
        return torch.relu(x)

    def default(self, x, act=F.relu):
        return act(x)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.default(x) if self.how == "default" else self.act(x))


@pytest.mark.parametrize("how", ["lambda", "partial", "bound", "decorated", "default"])
def test_activations_that_no_call_shows_are_replaced_or_named(how):
    for inputs in (None, ROWS):
        sites = activation_sites(Hidden(how), inputs)
        assert "hidden" in roles(sites).values() or sites.unresolved


def test_a_held_function_whose_calls_can_not_be_read_stays():
    code = {}
    source = "def forward(self, x): return self.last(self.g(self.first(x), approximate='tanh'))"
    exec(compile(source, "<of its own>", "exec"), code)
    model = type("Unread", (nn.Module,), {"forward": code["forward"]})()
    model.first, model.last, model.g = nn.Linear(6, 6), nn.Linear(6, 6), F.gelu
    for inputs in (None, ROWS):
        sites = activation_sites(model, inputs)
        assert list(sites) == []
        assert "(root): g, a gelu: the source that calls it can't be read" in sites.unresolved[0]


def test_strict_refuses_what_is_unresolved_and_changes_nothing():
    model = Hidden("lambda")
    model.extra = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    before = repr(model)
    with pytest.raises(ValueError, match="strict=True needs all activations to be resolved.*act, which mentions relu"):
        replace_activations(model, "nsw", strict=True)
    assert repr(model) == before
    replace_activations(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), "nsw", strict=True)


def test_an_identity_turns_calls_into_modules():
    torch.manual_seed(0)
    model = Block()
    expected = model(ROWS)
    replace_activations(model, {"relu": "relu"})
    assert type(model.activation_calls["relu#0"]) is nn.ReLU
    assert torch.equal(model(ROWS), expected)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.act, self.held = nn.LeakyReLU(0.1), F.relu
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ELU(0.5)), nn.Linear(6, 6))

    def forward(self, x):
        return self.last(self.held(self.net(self.act(self.first(x)))) * self.read())


class ReadsChild(Reads):
    def read(self):
        return self.act.negative_slope


class ReadsGrandchild(Reads):
    def read(self):
        return self.net[1][0].alpha


class ReadsFunction(Reads):
    def read(self):
        return len(self.held.__name__)


def slope_of(module):
    return module.negative_slope


class ReadsElsewhere(Reads):
    def read(self):
        return slope_of(self.act)


@pytest.mark.parametrize(
    ("cls", "name", "inputs"),
    [
        *((ReadsChild, "act", inputs) for inputs in (None, ROWS)),
        *((ReadsGrandchild, "net.1.0", inputs) for inputs in (None, ROWS)),
        *((ReadsFunction, "held", inputs) for inputs in (None, ROWS)),
        (ReadsElsewhere, "act", ROWS),  # no source shows it
    ],
)
@pytest.mark.filterwarnings("ignore:replace_activations")
def test_an_activation_of_which_code_reads_an_attribute_stays_and_is_named(cls, name, inputs):
    model = cls()
    sites = activation_sites(model, inputs)
    assert sorted(roles(sites)) == sorted({"act", "net.1.0", "held"} - {name})
    assert any(reason.startswith(f"{name}: ") and "may not have" in reason for reason in sites.unresolved)
    replace_activations(model, "nsw", example_inputs=inputs)
    model(ROWS)
    assert len(swished(model)) == 2


def test_code_may_read_what_every_module_has():
    class Harmless(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)

        def forward(self, x):
            return self.last(self.act(self.first(x))) * float(self.act.training or self.act.forward is not None)

    assert roles(activation_sites(Harmless())) == {"act": "hidden"}


class First(nn.Module):
    """Has activations that only its subclasses' ``super()`` leads to, one in a method that it calls."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.own(rectify(self.first(x)))

    def own(self, x):
        return F.silu(x)


class Second(First):
    def forward(self, x):
        return self.last(super().forward(x))


class Third(Second):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("cls", [Second, Third])
def test_what_super_leads_to_is_found_or_named(cls):
    sites = activation_sites(cls())
    assert [(site.function, site.kind) for site in sites] == [("silu", "function")]
    assert sites.unresolved == ["(root): super().forward, which mentions relu"]
    assert activation_sites(cls(), ROWS).unresolved[0] == "(root): super().forward, which mentions relu"


class Square(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return F.relu(x) ** 2

    @staticmethod
    def backward(context, gradient):
        return gradient


class Elsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.kind, self.layer = "gelu", nn.Linear(6, 6)

    @property
    def act(self):
        return getattr(F, self.kind)


def outer(x):
    return inner(x) if x.ndim else outer(x)


def inner(x):
    return outer(x) if x is None else rectify(x)


class ByProperty(Elsewhere):
    def forward(self, x):
        return self.layer(self.act(self.layer(x)))


class ByAutograd(Elsewhere):
    def forward(self, x):
        return self.layer(Square.apply(self.layer(x)))


class ByName(Elsewhere):
    def forward(self, x):
        return self.layer(getattr(F, self.kind)(self.layer(x)))


class ByHelpers(Elsewhere):
    def forward(self, x):
        return self.layer(outer(self.layer(x)))


NAMED = {
    ByProperty: "act, which mentions getattr of torch's functions",
    ByAutograd: "Square.apply, which mentions relu",
    ByName: "getattr(F, self.kind) in forward",
    ByHelpers: "outer, which mentions relu",
}


@pytest.mark.parametrize(("cls", "what"), NAMED.items())
def test_what_runs_elsewhere_is_named_without_example_inputs(cls, what):
    sites = activation_sites(cls())
    assert list(sites) == []
    assert [reason.partition(": ")[2].partition(": ")[0] for reason in sites.unresolved] == [what]


class Table(nn.Module):
    """Calls its activations from a table, which a swap doesn't change."""

    def __init__(self):
        super().__init__()
        self.layer, self.acts = nn.Linear(6, 6), nn.ModuleDict({"r": nn.ReLU(), "t": nn.Tanh()})
        self.table = {"x": [(self.layer, self.acts["r"])], "y": ({"z": (self.layer, self.acts["r"])},)}

    def forward(self, x):
        layer, act = self.table["x"][0]
        return self.layer(self.acts["t"](act(layer(x))))


@pytest.mark.parametrize("inputs", [None, ROWS])
def test_modules_in_tables_stay_and_are_named(inputs):
    sites = activation_sites(Table(), inputs)
    assert roles(sites) == {"acts.t": "hidden"}
    assert [reason.partition(";")[0] for reason in sites.unresolved][:2] == [
        "(root): relu in the container 'table'",
        *(
            ["acts.r: a relu that the source of its class doesn't show, such as in another function"]
            if inputs is not None
            else []
        ),
    ]


class Children(nn.Module):
    """Goes through children, of which the same module is one only once."""

    def __init__(self, how):
        super().__init__()
        act = nn.Tanh()
        self.how, self.net = how, nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 6))
        self.other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x):
        if self.how == "checkpoint":
            return self.other(checkpoint_sequential(self.net, 2, x, use_reentrant=False))
        for child in self.net.children():
            x = child(x)
        return self.other(x)


@pytest.mark.parametrize("how", ["loop", "checkpoint"])
@pytest.mark.parametrize("inputs", [None, ROWS])
@pytest.mark.filterwarnings("ignore:replace_activations")
def test_code_that_goes_through_children_computes_the_same_after_a_swap_by_itself(how, inputs):
    model = Children(how)
    expected = model(ROWS)
    every = {"gates": True, "outputs": True, "after_residual": True}
    replace_activations(model, lambda site: copy.deepcopy(site.module), example_inputs=inputs, **every)
    assert torch.equal(model(ROWS), expected)
    sites = activation_sites(Children(how), inputs)
    assert roles(sites) == {"other.1": "hidden"}
    assert sites.unresolved


def test_checkpointing_a_child_in_segments_does_not_keep_calls_from_being_replaced():
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

        def forward(self, x):
            return checkpoint_sequential(self.net, 2, F.relu(self.net(x)), use_reentrant=False)

    model = replace_activations(Segments(), "nsw")
    assert swished(model) == ["net.1", "activation_calls.relu#0"]
    model(ROWS).sum().backward()
