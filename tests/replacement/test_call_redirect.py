"""Replacing call sites: functions, methods, reused modules, loops; and the traps of doing so."""

import copy
import pickle

import pytest
import torch
from patterns import (
    IMAGE,
    MODELS,
    REGISTRY,
    ROWS,
    BasicConv,
    CallCounter,
    Checkpointed,
    Everything,
    FeedForward,
    GatedFeedForward,
    Gates,
    GoesThroughChildren,
    OneOfThem,
    QuickGELU,
    Remembering,
    ResNet,
    SqueezeExcite,
    Swapped,
    itself,
    made,
    replaced,
)
from torch import nn
from torch.nn import functional as F

from lightning_noisy import activation_sites, replace_activations, restore_activations
from lightning_noisy.nn import NormalizedActivation, NReLU, NSwish

EVERYTHING = {"gates": True, "outputs": True, "after_residual": True}


def run(model, x):
    """Output and gradients of a step, with dropout's numbers fixed."""
    torch.manual_seed(1)
    model.zero_grad()
    x.grad = None
    y = model(x)
    y.square().sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return y.detach(), x.grad, gradients


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_each_site_by_itself_is_bit_equal(name, observed):
    model, x = made(name)
    expected = run(copy.deepcopy(model), x)
    before = set(model.state_dict())
    sites = len(activation_sites(model, x if observed else None))
    replace_activations(model, itself, example_inputs=x.detach() if observed else None, **EVERYTHING)
    y, gradient, gradients = run(model, x)
    assert torch.equal(y, expected[0])
    assert torch.equal(gradient, expected[1])
    for key, value in expected[2].items():
        assert value is None or torch.equal(value, gradients[key]), key
    assert before <= set(model.state_dict())
    assert len(activation_sites(model, x if observed else None)) == sites


@pytest.mark.parametrize("name", MODELS)
def test_every_site_has_running_values_of_its_own_that_move(name):
    model, x = made(name)
    sites = activation_sites(model, x.detach())
    replace_activations(model, "nsw", example_inputs=x.detach(), **EVERYTHING)
    modules = replaced(model, NSwish)
    assert len(modules) == len(sites)
    with CallCounter() as counter:
        for _ in range(3):
            assert all(part.isfinite().all() for part in run(model, x)[:2])
    assert all(module.num_batches_tracked >= 3 and module.alpha.grad is not None for module in modules)
    others = counter.count - sum(int(module.num_batches_tracked) for module in modules)
    assert others <= 0  # no call of a function is left but theirs


@pytest.mark.parametrize("name", MODELS)
def test_restoring_gives_the_model_that_was(name):
    model, x = made(name)
    expected, text = run(copy.deepcopy(model), x), repr(model)
    classes = [type(module) for module in model.modules()]
    replace_activations(model, "nsw", example_inputs=x.detach(), **EVERYTHING)
    replace_activations(model, "nrelu", example_inputs=x.detach(), **EVERYTHING)
    assert restore_activations(model) is model
    assert repr(model) == text
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, x)[0], expected[0])
    with pytest.raises(ValueError, match="No activations of this .* were replaced"):
        restore_activations(model)


@pytest.mark.parametrize("name", MODELS)
def test_twice_with_the_same_arguments_changes_nothing(name):
    model, x = made(name)
    replace_activations(model, "nsw", example_inputs=x.detach(), **EVERYTHING)
    run(model, x)
    modules, classes = list(model.modules()), [type(module) for module in model.modules()]
    replace_activations(model, "nsw", example_inputs=x.detach(), **EVERYTHING)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert classes == [type(module) for module in model.modules()]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["resnet", "inception", "everything", "loop"])
def test_replaced_models_copy_and_pickle(name, clone):
    model, x = made(name)
    replace_activations(model, "nsw", example_inputs=x.detach(), **EVERYTHING)
    run(model, x)
    twin = clone(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert type(twin) is type(model)
    assert isinstance(twin, type(made(name)[0]))
    fresh = replace_activations(made(name)[0], "nsw", example_inputs=x.detach(), **EVERYTHING)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model(x))
    assert torch.equal(restore_activations(twin)(x), restore_activations(model)(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "inception", "loop", "transformer"])
def test_replaced_models_compile_without_a_break_and_export(name):
    if name == "loop" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 doesn't export what counts its passes")
    torch._dynamo.reset()
    model, x = (ResNet().layer2, torch.randn(2, 4, 8, 8)) if name == "blocks" else made(name)
    replace_activations(model, "nsw", example_inputs=x.detach(), **EVERYTHING)
    for module in replaced(model, nn.Dropout):
        module.p = 0.0
    for module in replaced(model, nn.MultiheadAttention):
        module.dropout = 0.0
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
    model.eval()
    exported = torch.export.export(model, (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inside_of_a_compiled_model_is_replaced_and_compiled_anew():
    torch._dynamo.reset()
    model = nn.Sequential(BasicConv(3, 4, kernel_size=3), BasicConv(4, 4, kernel_size=3))
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(IMAGE)
    assert replace_activations(compiled, "nsw") is compiled
    twin = copy.deepcopy(model)
    after = compiled(IMAGE)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, twin(IMAGE), rtol=1e-4, atol=1e-4)
    assert restore_activations(compiled) is compiled


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_meets_the_replacements_again(use_reentrant):
    results = []
    for active in (True, False):
        torch.manual_seed(0)
        model = Checkpointed(use_reentrant=use_reentrant, active=active)
        replace_activations(model, lambda site: nn.SiLU())
        results.append(run(model, ROWS.clone().requires_grad_()))
    (y, gradient, gradients), (expected, expected_gradient, expected_gradients) = results
    assert torch.equal(y, expected)
    assert torch.equal(gradient, expected_gradient)
    assert all(torch.equal(gradients[key], expected_gradients[key]) for key in gradients)


def test_a_branch_does_not_shift_the_sites():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x, extra=False):
            if extra:
                x = self.act(x + 100)
            return F.relu(self.act(x)) if not extra else x

    model = replace_activations(Branch(), NReLU, outputs=True)
    assert type(model.act) is nn.ReLU  # of the branch that was not seen
    second, last = model.activation_calls["act#2"], model.activation_calls["relu#0"]
    model(ROWS)
    assert torch.equal(model(ROWS, extra=True), ROWS + 100)
    assert [module.num_batches_tracked.item() for module in (second, last)] == [1, 1]


@pytest.mark.parametrize("inplace", [True, False])
def test_functions_in_place_keep_their_meaning(inplace):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            y = self.linear(x)
            F.relu(y, inplace=inplace)  # the result is left, on purpose
            z = y + 0.0
            return torch.relu_(z) + z if inplace else z

    model = Model()
    expected = model(ROWS)
    replace_activations(model, itself, outputs=True)
    assert torch.equal(model(ROWS), expected)
    replace_activations(model, "nrelu", outputs=True)
    assert not torch.equal(model(ROWS), expected) if inplace else torch.equal(model(ROWS), expected)
    if inplace:
        restore_activations(model)
        with pytest.raises(ValueError, match="works in place"):
            replace_activations(model, lambda site: nn.Tanh(), outputs=True)
        assert torch.equal(model(ROWS), expected)


def test_tracebacks_and_signatures_are_those_of_the_source():
    import inspect
    import traceback

    model = replace_activations(Everything(), "nsw")
    assert inspect.signature(model.forward) == inspect.signature(Everything().forward)
    assert type(model).__name__ == "Everything"
    try:
        model(ROWS[:, :5])
    except RuntimeError as error:
        line = next(frame.line for frame in traceback.extract_tb(error.__traceback__) if "patterns" in frame.filename)
        assert "self" in line or "layers" in line


def test_gates_outputs_and_sums_stay_by_default():
    squeeze = replace_activations(SqueezeExcite(), NReLU)
    assert list(squeeze.activation_calls) == ["relu#0"]
    with pytest.warns(UserWarning, match=r"replaced nothing. Found act_fn \(silu\): gate, replaced with gates=True"):
        replace_activations(GatedFeedForward(), "nsw")
    assert len(replaced(replace_activations(GatedFeedForward(), "nsw", gates=True), NSwish)) == 1
    resnet = replace_activations(ResNet(), "nsw")
    assert len(replaced(resnet, NSwish)) == 9
    assert len(replaced(resnet, nn.ReLU)) == 8
    head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    assert len(replaced(replace_activations(copy.deepcopy(head), "nsw", example_inputs=ROWS), NSwish)) == 1
    assert len(replaced(replace_activations(head, "nsw", outputs=True), NSwish)) == 2


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"include": "layer1.*"}, 4),
        ({"include": ["layer1.*", "relu"]}, 5),
        ({"exclude": "layer*"}, 1),
        ({"exclude": nn.ReLU}, 0),
        ({"include": lambda site: site.owner == "layer4.1"}, 2),
        ({"keep_last": 3}, 14),
        ({"keep_last": 40}, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:replace_activations.*replaced nothing")
def test_rules_choose_sites(options, count):
    model = replace_activations(ResNet(), "nsw", after_residual=True, **options)
    assert len(replaced(model, NSwish)) == count


def test_keep_last_keeps_those_that_are_called_last():
    model = replace_activations(ResNet(), "nsw", example_inputs=IMAGE, after_residual=True, keep_last=3)
    kept = {site.name for site in activation_sites(model, IMAGE) if type(site.module) is nn.ReLU}
    assert kept == {"layer4.0.relu#2", "layer4.1.relu", "layer4.1.relu#2"}


@pytest.mark.parametrize("options", [{"keep_last": -1}, {"batchnorm_affine": "fold"}, {"buffer_batchnorm": "head"}])
def test_options_out_of_range_are_refused_and_change_nothing(options):
    model = ResNet()
    text = repr(model)
    with pytest.raises(ValueError, match=next(iter(options))):
        replace_activations(model, "nsw", **options)
    assert repr(model) == text


def test_normalized_keeps_the_options_of_a_call():
    model = replace_activations(Everything(), "normalized", **EVERYTHING)
    functions = {key: repr(module.function) for key, module in model.activation_calls.items()}
    assert functions["leaky_relu#0"] == "LeakyReLU(negative_slope=0.3)"
    assert functions["gelu#0"] == "GELU(approximate='tanh')"
    assert model.activation_calls["relu#2"].inplace
    foreign = replace_activations(FeedForward(QuickGELU()), "normalized", also=(QuickGELU,))
    assert isinstance(foreign.act, NormalizedActivation)
    assert isinstance(foreign.act.function, QuickGELU)


def test_an_argument_known_only_when_it_runs_is_named():
    class Dynamic(nn.Module):
        def forward(self, x):
            return F.leaky_relu(x, x.shape[0] / 10)

    assert activation_sites(Dynamic()).unresolved == [
        ":leaky_relu#0: an argument of leaky_relu is known only when it runs"
    ]
    with pytest.warns(UserWarning, match="Not looked into: :leaky_relu#0: an argument"):
        replace_activations(Dynamic(), "nsw")


@pytest.mark.filterwarnings("ignore:replace_activations.*left what is unresolved")
@pytest.mark.parametrize("observed", [True, False])
def test_what_a_name_or_an_argument_means_is_not_mistaken(observed):
    model, x = Swapped(), ROWS.clone().requires_grad_()
    twin = copy.deepcopy(model)
    inputs = ROWS if observed else None
    sites = activation_sites(model, inputs)
    assert sorted(site.name for site in sites) == [":elu#0", ":tanh#0", "act", "act#2"]
    assert any("rrelu" in reason for reason in sites.unresolved)
    replace_activations(model, itself, example_inputs=inputs, **EVERYTHING)
    for mine, expected in zip(run(model, x)[:2], run(twin, x)[:2], strict=True):
        assert torch.equal(mine, expected)
    assert len(replaced(replace_activations(twin, "nsw", example_inputs=inputs, **EVERYTHING), NSwish)) == 4


def test_looking_and_replacing_leave_the_state_that_forward_changes():
    for inputs in (None, ROWS):
        model = Remembering()
        activation_sites(model, inputs)
        assert (model.steps, model.cache, model.log) == (0, {}, [])
        replace_activations(model, "nsw", example_inputs=inputs, outputs=True)
        assert type(model(ROWS)) is torch.Tensor
        assert model.steps == 1


def test_a_class_that_keeps_count_of_its_subclasses_does_not_notice():
    model = replace_activations(OneOfThem(), "nsw", outputs=True)
    assert {"OneOfThem": OneOfThem} == REGISTRY
    assert len(replaced(model, NSwish)) == 1


def test_gates_and_outputs_are_followed_through_what_moves_them():
    with pytest.warns(UserWarning, match="replaced nothing"):
        replace_activations(Gates(), "relu")
    sites = activation_sites(Gates(), ROWS)
    assert [site.is_gate for site in sites] == [True, True, True, False]
    assert [site.role for site in sites] == ["gate", "gate", "gate", "output"]


def test_a_module_that_goes_through_its_children_is_named():
    model = GoesThroughChildren(nn.Linear(6, 6))
    expected = model(ROWS)
    with pytest.warns(UserWarning, match="it goes through its children"):
        replace_activations(model, "nsw")
    assert torch.equal(model(ROWS), expected)


def test_a_forward_of_the_instance_is_named():
    model = SqueezeExcite()
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.warns(UserWarning, match="its forward is made when it runs"):
        replace_activations(model, "nsw")


def test_scripting_a_replaced_model_is_refused():
    model = replace_activations(SqueezeExcite(), "nsw")
    with pytest.raises(RuntimeError, match=r"in which no activation is replaced. Use torch\.export"):
        torch.jit.script(model)


def test_a_source_that_has_changed_is_not_used(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    source = (
        "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n"
        "class Edited(nn.Module):\n    def forward(self, x):\n        return 2 * F.relu(x)\n"
    )
    (tmp_path / "edited_model.py").write_text(source)
    model = importlib.import_module("edited_model").Edited()
    (tmp_path / "edited_model.py").write_text(source.replace("2 *", "33 *"))
    with pytest.warns(UserWarning, match="its source has changed since it was imported"):
        replace_activations(model, "nsw")
    assert torch.equal(model(ROWS), 2 * F.relu(ROWS))


def test_a_class_that_is_extended_afterwards_is_not_taken_apart():
    from torch.nn.utils import parametrizations

    model = SqueezeExcite()
    model.weight = nn.Parameter(torch.randn(3, 3))
    replace_activations(model, "nsw")
    parametrizations.weight_norm(model, "weight")
    with pytest.raises(ValueError, match="extended after its activations were replaced"):
        restore_activations(model)
    assert model.weight.shape == (3, 3)
    assert model(ROWS).isfinite().all()
