import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_noisy import activation_sites, replace_activations
from lightning_noisy.nn import NAH, NAN, NormalizedActivation, NReLU, NSwish


def mlp(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 2))


class Residual(nn.Module):
    """What `conv(relu(x)) + x` means depends on whether the ReLU works in place."""

    def __init__(self, *, inplace):
        super().__init__()
        self.act = nn.ReLU(inplace=inplace)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.act(x)) + x


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid())

    def forward(self, x):
        return x * self.reduce(x)


def kinds(model):
    return [type(site.module) for site in activation_sites(model)]


def test_replace_swaps_in_place_and_returns_the_same_model():
    model = mlp()
    linear = model[0]
    assert replace_activations(model, "nsw") is model
    assert kinds(model) == [NSwish, NSwish]
    assert model[1] is not model[3]
    assert model[0] is linear


def test_replace_returns_a_new_module_if_the_root_is_an_activation():
    assert type(replace_activations(nn.ReLU(), "nrelu")) is NReLU
    assert type(replace_activations(nn.Tanh(), "nrelu")) is NReLU


def test_replace_reaches_an_alias_in_one_parent():
    act = nn.ReLU()
    model = replace_activations(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act), "nrelu", outputs=True)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert model[1] is not model[3]


def test_replace_gives_an_instance_shared_between_parents_to_each_its_own():
    act = nn.ReLU()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), act), "b": nn.Sequential(nn.Linear(2, 2), act)})
    replace_activations(model, "nrelu")
    assert model["a"][1] is not model["b"][1]


def test_replace_keeps_a_shared_block_shared():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = replace_activations(nn.Sequential(block, block, nn.Linear(4, 4)), "nrelu")
    assert model[0] is model[1]
    assert len(activation_sites(model)) == 1


@pytest.mark.parametrize(
    "to", [{"relu": "nrelu"}, {"relu": NReLU}, {"relu": lambda site: NReLU()}, NReLU, lambda site: NReLU()]
)
def test_replace_takes_mappings_classes_and_callables(to):
    assert kinds(replace_activations(mlp(), to)) == [NReLU, NReLU]


def test_replace_by_mapping_leaves_what_is_not_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU())
    replace_activations(model, {"relu": "nrelu", "tanh": "nsw"})
    assert kinds(model) == [NReLU, NSwish, nn.GELU]


def test_replace_by_callable_sees_the_site():
    model = replace_activations(mlp(), lambda site: NReLU() if site.name == "1" else site.module)
    assert kinds(model) == [NReLU, nn.ReLU]


def test_normalized_keeps_each_sites_own_function_and_its_options():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LeakyReLU(0.3, inplace=True), nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 4)
    )
    weight = model[3].weight
    replace_activations(model, "normalized")
    assert kinds(model) == [NormalizedActivation, NormalizedActivation]
    assert (model[1].function.negative_slope, model[1].function.inplace, model[1].inplace) == (
        0.3,
        False,
        True,
    )
    assert model[3].function.weight is weight
    x = torch.randn(5, 4)
    replaced = replace_activations(model, "normalized")
    assert replaced(x).shape == (5, 4)


def test_hidden_squashing_functions_are_replaced_gates_and_outputs_stay():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        SqueezeExcite(),
        nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()),
        nn.Linear(4, 2),
        nn.Tanh(),
    )
    replace_activations(model, "nsw")
    assert [type(m) for m in (model[0][1], model[1].reduce[1], model[2][1])] == [NSwish, NSwish, NSwish]
    assert [type(m) for m in (model[1].reduce[3], model[4])] == [nn.Sigmoid, nn.Tanh]


class Gate(nn.Sequential):
    """A Sequential in name only."""

    def forward(self, x):
        return x * super().forward(x)


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (nn.Sequential(Gate(nn.Linear(4, 4), nn.Sigmoid()), nn.Linear(4, 4)), "0.1"),
        (nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Flatten(0)), "1"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1), nn.Softplus()), "3"),
    ],
    ids=["gate", "output that is reshaped", "output of a scale"],
)
@pytest.mark.filterwarnings("ignore:.*replaced nothing")
def test_gates_and_outputs_in_disguise_stay(model, kept):
    before = model.get_submodule(kept)
    assert replace_activations(model, "nsw").get_submodule(kept) is before


def test_parametrizations_of_weights_stay():
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    replace_activations(model, "nsw")
    assert (model[0].weight > 0).all()
    assert kinds(model) == [NSwish, NSwish]


def test_replacing_twice_changes_nothing():
    model = replace_activations(mlp(), "nsw")
    model(torch.randn(10, 4))
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    replace_activations(model, "nsw")
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    replace_activations(model, "nrelu")
    assert kinds(model) == [NReLU, NReLU]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU])
def test_replacing_each_function_by_itself_is_bit_equal(activation):
    model, x = mlp(activation), torch.randn(6, 4)
    twin = replace_activations(copy.deepcopy(model), activation)
    outputs = model(x), twin(x)
    for output in outputs:
        output.sum().backward()
    assert torch.equal(*outputs)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_replace_keeps_training_flag_dtype_and_old_keys():
    model = mlp().double().eval()
    keys = model.state_dict().keys()
    replace_activations(model, "nsw")
    assert not model[1].training
    assert model[1].alpha.dtype == torch.float64
    assert model[1].running_mean.dtype == torch.float32
    assert keys <= model.state_dict().keys()
    assert model(torch.randn(3, 4).double()).dtype == torch.float64


def test_replace_follows_the_device_of_the_neighbours():
    with torch.device("meta"):
        model = mlp()
    assert replace_activations(model, "nsw")[1].alpha.is_meta


def test_replace_in_a_frozen_part_stays_frozen():
    model = nn.Sequential(mlp(), mlp())
    model[0].requires_grad_(False)
    replace_activations(model, "nsw")
    assert [model[i][1].alpha.requires_grad for i in (0, 1)] == [False, True]


def test_replace_keeps_hooks_and_their_handles_work():
    model, calls = mlp(), []
    handle = model[1].register_forward_hook(lambda module, args, output: calls.append(type(module)))
    replace_activations(model, "nsw")
    model(torch.randn(2, 4))
    handle.remove()
    model(torch.randn(2, 4))
    assert calls == [NSwish]


def test_replacements_of_an_alias_have_hooks_of_their_own():
    act, calls = nn.ReLU(), []
    act.register_forward_hook(lambda *_: calls.append("old"))
    model = replace_activations(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act), "nrelu", outputs=True)
    model[1].register_forward_hook(lambda *_: calls.append("new"))
    model(torch.randn(2, 4))
    assert sorted(calls) == ["new", "old", "old"]


@pytest.mark.parametrize("to", ["normalized", lambda site: nn.Sequential(site.module, nn.Dropout(0.0))])
def test_hooks_fire_once_where_the_old_function_lives_on_in_the_new_module(to):
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    replace_activations(model, to)(torch.randn(2, 4))
    assert calls == [1]


def test_replacement_keeps_hooks_that_it_was_made_with():
    model, calls = mlp(), []
    model[1].register_forward_hook(lambda *_: calls.append("old"))

    def hooked(site):
        module = NReLU()
        module.register_forward_hook(lambda *_: calls.append("new"))
        return module

    replace_activations(model, hooked)(torch.randn(2, 4))
    assert sorted(calls) == ["new", "new", "old"]


def test_replace_by_another_callable_is_not_taken_for_the_same():
    model = replace_activations(mlp(), lambda site: NormalizedActivation(lambda x: x.relu()))
    before = model[1]
    replace_activations(model, lambda site: NormalizedActivation(lambda x: x.tanh()))
    assert model[1] is not before


@pytest.mark.parametrize("inplace", [False, True])
def test_replace_keeps_the_meaning_of_working_in_place(inplace):
    torch.manual_seed(0)
    model = replace_activations(Residual(inplace=inplace), "nrelu").eval()
    model.act.running_mean.fill_(0.5)
    x = torch.randn(3, 4)
    activated = x.relu() - 0.5
    expected = model.linear(activated) + (activated if inplace else x)
    torch.testing.assert_close(model(x.clone()), expected)


@pytest.mark.parametrize(
    "to",
    [
        "silu(inplace=True)",
        lambda site: nn.SiLU(inplace=True),
        {"relu": lambda site: nn.ELU(inplace=True)},
    ],
)
def test_what_an_activation_reads_is_not_changed_by_one_that_works_in_place(to):
    model = replace_activations(Residual(inplace=False), to)
    x = torch.randn(3, 4)
    before = x.clone()
    torch.testing.assert_close(model(x), model.linear(model.act(before.clone())) + before)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (functools.partial(nn.LeakyReLU, 0.1), "LeakyReLU has taken the site for its argument 'inplace'"),
        (functools.partial(nn.Softplus, 2), "Softplus has taken the site for its argument 'threshold'"),
        (functools.partial(nn.ELU, alpha=0.3), "multiple values for argument 'alpha'"),
    ],
)
def test_partial_of_a_class_is_refused_with_what_to_write(to, message):
    model = Residual(inplace=False)
    with pytest.raises(TypeError, match=f"{message}.* It is called with the site: write lambda site: "):
        replace_activations(model, to)
    assert type(model.act) is nn.ReLU


def test_replace_refuses_an_in_place_site_for_a_module_that_cannot():
    model = Residual(inplace=True)
    with pytest.raises(ValueError, match="'act' works in place.*GELU does not"):
        replace_activations(model, "gelu")
    assert type(model.act) is nn.ReLU


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_replaced_activation_of_a_transformer_layer_is_called_in_evaluation(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    replace_activations(model, "nrelu")
    calls = []
    for block in model.layers:
        block.activation.running_rho.fill_(0.1)
        block.activation.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        without_grad = model(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    with_grad = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(without_grad, with_grad, rtol=1e-5, atol=1e-6)


def test_replace_is_all_or_nothing():
    model = mlp()
    before = list(model.modules())

    def fails_at_the_second(site):
        if site.name == "3":
            raise RuntimeError("no")
        return NReLU()

    with pytest.raises(RuntimeError, match="no"):
        replace_activations(model, fails_at_the_second)
    with pytest.raises(TypeError, match="replacement of '1' must be an nn.Module, got None"):
        replace_activations(model, lambda site: None)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize("to", ["nsw", {"tanh": "nsw"}])
def test_replacing_nothing_warns_with_the_remedy(to):
    with pytest.warns(UserWarning, match=r"replaced nothing. No activation was found in it"):
        replace_activations(nn.Linear(1, 1), to)
    with pytest.warns(UserWarning, match=r"replaced nothing. Found 1 \(sigmoid\): output, replaced with outputs=True"):
        replace_activations(nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()), to)


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("nws", ValueError, "'nws' is not the name of an activation. Did you mean 'nsw'"),
        (
            {"rellu": "nsw"},
            ValueError,
            "'rellu' is not the name of a plain activation function. Did you mean",
        ),
        ({"relu": "nws"}, ValueError, "Did you mean 'nsw'"),
        ({"relu": {"relu": "nsw"}}, TypeError, "A mapping's values must be names, classes or callables"),
        (NReLU(), TypeError, "An instance can't be used at every site.*Pass its class"),
        (torch.nn.functional.relu, TypeError, "Pass its name, 'relu'"),
        (NormalizedActivation, TypeError, "NormalizedActivation can't be made without arguments.*lambda site"),
        (3, TypeError, "to must be a name, a mapping, an nn.Module class or a callable, got 3"),
        (int, TypeError, "got the class <class 'int'>"),
    ],
)
def test_replace_refuses_what_is_no_replacement(to, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        replace_activations(model, to)
    assert kinds(model) == [nn.ReLU, nn.ReLU]


def test_replace_refuses_models_that_cannot_be_changed():
    with pytest.raises(TypeError, match="model must be an nn.Module, got 'resnet18' of type str"):
        replace_activations("resnet18", "nsw")
    with pytest.raises(ValueError, match="before wrapping it"):
        replace_activations(nn.DataParallel(mlp()), "nsw")


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_replace_refuses_a_scripted_model():
    with pytest.raises(ValueError, match=r"before torch\.jit\.script"):
        replace_activations(torch.jit.script(mlp()), "nsw")


def test_replaced_model_copies_pickles_and_trains():
    model = replace_activations(mlp(), "nsw")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        twin(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()
        assert twin[1].alpha.grad.abs() > 0
        assert twin[1].num_batches_tracked == 1


def test_sites_are_listed_in_order_without_a_change():
    model = nn.Sequential(SqueezeExcite(), nn.ReLU6())
    before = repr(model)
    sites = activation_sites(model)
    assert [(s.name, s.function, s.owner) for s in sites] == [
        ("0.reduce.1", "relu", "0.reduce"),
        ("0.reduce.3", "sigmoid", "0.reduce"),
        ("1", "relu6", ""),
    ]
    assert [s.role for s in sites] == ["hidden", "gate", "output"]
    lines = str(sites).splitlines()
    assert len(lines) == 4
    assert (
        len({line.index(word) for line, word in zip(lines, ("kind", "module", "module", "module"), strict=True)}) == 1
    )
    assert repr(model) == before


def test_sites_do_not_look_into_activations():
    model = replace_activations(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), "normalized")
    assert [(s.name, s.function) for s in activation_sites(model)] == [("1", "gelu")]


def test_noisy_names_go_to_saturating_sites_each_with_its_own_hard_function():
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)]
    model = nn.Sequential(*layers, nn.Sigmoid())
    replace_activations(model, "nah(alpha=1.1, c=2)")
    assert [type(layer) for layer in model[1::2]] == [NAH, NAH, nn.GELU, nn.Sigmoid]
    assert [layer.function_name for layer in (model[1], model[3])] == ["tanh", "relu"]
    assert (model[1].alpha, model[1].c.item()) == (1.1, 2.0)
    before = list(model)
    replace_activations(model, "nah(alpha=1.1, c=2)")
    assert all(now is then for now, then in zip(model, before, strict=True))
    replace_activations(model, {"sigmoid": "nan"}, outputs=True)
    assert (type(model[7]), model[7].function_name) == (NAN, "sigmoid")


def test_noisy_names_find_nothing_in_a_model_that_does_not_saturate():
    with pytest.warns(UserWarning, match=r"Found 1 \(gelu\): other function, replaced with a mapping"):
        replace_activations(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), "nah")


def test_a_noisy_model_trains_and_resumes_its_noise():
    def made():
        torch.manual_seed(0)
        return replace_activations(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), "nan(c=30)")

    def train(model, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(torch.ones(16, 4)) - 1).square().mean().backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    straight, half = made(), made()
    expected = train(straight, 4)
    train(half, 2)
    resumed = made()
    resumed.load_state_dict(half.state_dict())
    found = train(resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
