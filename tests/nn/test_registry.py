import pytest
import torch
from torch import nn

from lightning_noisy.nn import NLeakyReLU, NormalizedActivation, NReLU, NSwish, registry


@pytest.mark.parametrize(
    ("name", "cls"),
    [("nsw", NSwish), ("nswish", NSwish), ("nrelu", NReLU), ("nlrelu", NLeakyReLU), ("gelu", nn.GELU)],
)
def test_create_makes_the_named_class(name, cls):
    assert type(registry.create(name)) is cls


@pytest.mark.parametrize("name", registry.PLAIN)
def test_plain_names_are_those_of_torch_nn_functional(name):
    x = torch.tensor([-2.0, -0.3, 0.4, 3.0])
    function = getattr(torch.nn.functional, name)
    expected = function(x, torch.tensor(0.25)) if name == "prelu" else function(x)
    assert torch.equal(registry.create(name).eval()(x), expected)
    assert registry.function_name(registry.create(name)) == name


def test_every_name_makes_a_module_that_maps_a_tensor():
    for name in registry.names():
        assert registry.create(name)(torch.randn(3, 4)).shape == (3, 4)


def test_normalized_takes_the_function_of_the_site():
    module = registry.create("normalized", function="gelu", momentum=0.5)
    assert (type(module), registry.function_name(module), module.momentum) == (
        NormalizedActivation,
        "gelu",
        0.5,
    )
    assert registry.function_name(registry.create("normalized", function=torch.sin)) == "sin"


@pytest.mark.parametrize(("name", "suggestion"), [("nws", "'nsw'"), ("Relu", "'relu'"), ("nsww", "'nsw'")])
def test_unknown_names_are_answered_with_the_closest(name, suggestion):
    with pytest.raises(ValueError, match=rf"'{name}' is not the name of an activation. Did you mean.*{suggestion}"):
        registry.create(name)


def test_unknown_name_close_to_none_is_answered_with_all():
    with pytest.raises(ValueError, match=r"Known are: celu, elu,"):
        registry.create("zzzzzz")
    with pytest.raises(ValueError, match="'rellu' is not the name of a plain activation function"):
        registry.create("normalized", function="rellu")


def test_options_of_a_class_are_checked_by_it():
    with pytest.raises(TypeError, match="slope"):
        registry.create("leaky_relu", slope=0.2)


@pytest.mark.parametrize(
    ("name", "alpha", "c"),
    [("nan", 1.15, 0.5), ("nah", 1.15, 0.5), ("nani", None, 0.05), ("nanil", None, 0.5), ("nanis", None, 0.25)],
)
def test_noisy_defaults_are_the_authors(name, alpha, c):
    module = registry.create(name)
    assert getattr(module, "alpha", None) == alpha
    assert module.c.item() == pytest.approx(c)


@pytest.mark.parametrize(
    "spec",
    ["nah(c=1)(alpha=2)", "nah(c=1).x(alpha=2)", "nah(c=1, c=2)", "nah(c={[]})", "nah(c=" + "-" * 100_000 + "1)"],
)
def test_what_is_no_single_call_is_refused(spec):
    with pytest.raises(ValueError, match="must be a name, or a name with literals"):
        registry.parse(spec)


def test_aliases_name_functions_too():
    assert isinstance(registry.create("normalized", function="swish").function, nn.SiLU)
    with pytest.raises(ValueError, match="alpha must be a finite number, got inf"):
        registry.create("nah(alpha=1e999)")
