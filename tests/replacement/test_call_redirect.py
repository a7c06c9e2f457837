"""Replacing call sites: functions, methods, reused modules, loops; and the traps of doing so."""

import copy
import pickle

import pytest
import torch
from patterns import (
    REGISTRY,
    BasicConv,
    CallCounter,
    Checkpointed,
    Everything,
    FeedForward,
    GatedFeedForward,
    Gates,
    GoesThroughChildren,
    Inception,
    Loop,
    LoopInside,
    LoopOfOne,
    NewGELU,
    OneOfThem,
    QuickGELU,
    Remembering,
    ResNet,
    Shared,
    SqueezeExcite,
    Swapped,
)
from torch import nn
from torch.nn import functional as F

from lightning_noisy import activation_sites, replace_activations, restore_activations
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.nn import NormalizedActivation, NReLU, NSwish
from lightning_noisy.replacement import call_finder, call_redirect

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
EVERYTHING = {"gates": True, "outputs": True, "after_residual": True}

MODELS = {
    "resnet": (ResNet, IMAGE),
    "inception": (lambda: Inception(blocks=1), IMAGE),
    "gated": (GatedFeedForward, ROWS),
    "squeeze": (SqueezeExcite, ROWS),
    "shared": (Shared, ROWS),
    "loop": (Loop, ROWS),
    "loop of one": (LoopOfOne, ROWS),
    "everything": (Everything, ROWS),
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), ROWS),
    "reentrant": (lambda: Checkpointed(use_reentrant=True), ROWS),
    "function": (lambda: FeedForward(torch.tanh), ROWS),
    "foreign": (lambda: FeedForward(NewGELU()), ROWS),
    "own": (lambda: FeedForward(QuickGELU()), ROWS),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), ROWS[None]),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="gelu"), 2),
        ROWS[None],
    ),
}


def made(name):
    torch.manual_seed(0)
    make, x = MODELS[name]
    return make(), x.clone().requires_grad_()


def run(model, x):
    """Output and gradients of a step, with dropout's numbers fixed."""
    torch.manual_seed(1)
    model.zero_grad()
    x.grad = None
    y = model(x)
    y.square().sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return y.detach(), x.grad, gradients


def itself(site):
    return copy.deepcopy(site.module)


def replaced(model, cls):
    return [module for module in model.modules() if isinstance(module, cls)]


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

    model = replace_activations(Branch(), NReLU)
    first, second, last = (model.act, model.activation_calls["act#2"], model.activation_calls["relu#0"])
    model(ROWS)
    assert [module.num_batches_tracked.item() for module in (first, second, last)] == [0, 1, 1]
    model(ROWS, extra=True)
    assert [module.num_batches_tracked.item() for module in (first, second, last)] == [1, 1, 1]
    assert first.running_mean > 50


def test_a_loop_that_is_longer_than_shown_says_so():
    model = replace_activations(Loop(), "nsw", example_inputs=ROWS)
    assert sorted(model.activation_calls) == ["relu#0", "relu#0@2", "relu#0@3"]
    model.layers.append(nn.Linear(6, 6))
    with pytest.raises(
        RuntimeError, match="'relu#0' is passed 4 times in one forward pass, the example inputs showed 3"
    ):
        model(ROWS)


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
    replace_activations(model, itself)
    assert torch.equal(model(ROWS), expected)
    replace_activations(model, "nrelu")
    assert not torch.equal(model(ROWS), expected) if inplace else torch.equal(model(ROWS), expected)
    if inplace:
        restore_activations(model)
        with pytest.raises(ValueError, match="works in place"):
            replace_activations(model, lambda site: nn.Tanh())
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
    with pytest.warns(UserWarning, match=r"replaced nothing. Found act_fn \(silu\)"):
        replace_activations(GatedFeedForward(), "nsw")
    assert len(replaced(replace_activations(GatedFeedForward(), "nsw", gates=True), NSwish)) == 1
    resnet = replace_activations(ResNet(), "nsw")
    assert len(replaced(resnet, NSwish)) == 9
    assert len(replaced(resnet, nn.ReLU)) == 8
    head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    assert len(replaced(replace_activations(copy.deepcopy(head), "nsw", example_inputs=ROWS), NSwish)) == 1
    assert len(replaced(replace_activations(head, "nsw", outputs=True), NSwish)) == 2


def test_a_child_that_stays_at_one_use_and_goes_at_the_other_keeps_both():
    model = replace_activations(ResNet(), "nsw")
    block = model.layer1[0]
    assert type(block.relu) is NSwish
    assert type(block.activation_calls["relu#2"]) is nn.ReLU
    other = replace_activations(ResNet(), "nsw", include="*#2", after_residual=True)
    assert type(other.layer1[0].relu) is nn.ReLU
    assert type(other.layer1[0].activation_calls["relu#2"]) is NSwish


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
    foreign = replace_activations(FeedForward(QuickGELU()), "normalized")
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


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = Inception(blocks=1)
    structure = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    send, count = call_redirect.redirect_calls, []

    def fails(owner, theirs):
        count.append(owner)
        if len(count) == 5:
            raise call_finder.UnreadError("the fifth")
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


def test_stripped_batch_norms_keep_their_statistics_and_what_is_lost_is_said():
    model = BasicConv(3, 4, kernel_size=3)
    model(IMAGE)
    expected = copy.deepcopy(model).eval()(IMAGE)
    plain = copy.deepcopy(model)
    replace_activations(plain, lambda site: nn.ReLU(inplace=True), batchnorm_affine="strip")
    assert plain.bn.weight is None
    assert torch.equal(plain.eval()(IMAGE), expected)
    assert restore_activations(plain).bn.weight is not None
    nn.init.constant_(model.bn.weight, 2.0)
    with pytest.warns(UserWarning, match="Weight and bias of bn were trained, and are gone"):
        replace_activations(model, "nsw", batchnorm_affine="strip")


def test_a_batch_norm_goes_before_the_head():
    model, _ = made("resnet")
    keys = set(model.state_dict())
    replace_activations(model, "nsw", buffer_batchnorm=True)
    inputs = []
    handle = model.fc.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    model(IMAGE)
    handle.remove()
    assert inputs[0].mean(0).abs().max() < 1e-3
    assert keys < set(model.state_dict())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.eval()(IMAGE), model.eval()(IMAGE))
    restore_activations(model)
    assert set(model.state_dict()) == keys
    assert len(model.fc._forward_pre_hooks) == 0


def test_a_layer_with_tokens_has_its_batch_norm_over_all_of_them():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    replace_activations(model, "nsw", buffer_batchnorm="2")
    model(torch.randn(3, 5, 6))
    assert model[2].buffer.num_batches_tracked == 1


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


def test_a_loop_that_is_checkpointed_within_its_module_says_so():
    model = replace_activations(LoopInside(), "nsw", example_inputs=ROWS)
    y = model(ROWS)
    with pytest.raises(RuntimeError, match="is repeated by checkpointing.*Checkpoint the whole module"):
        y.sum().backward()


def test_looking_and_replacing_leave_the_state_that_forward_changes():
    for inputs in (None, ROWS):
        model = Remembering()
        activation_sites(model, inputs)
        assert (model.steps, model.cache, model.log) == (0, {}, [])
        replace_activations(model, "nsw", example_inputs=inputs)
        assert type(model(ROWS)) is torch.Tensor
        assert model.steps == 1


def test_a_class_that_keeps_count_of_its_subclasses_does_not_notice():
    model = replace_activations(OneOfThem(), "nsw")
    assert {"OneOfThem": OneOfThem} == REGISTRY
    assert len(replaced(model, NSwish)) == 1


def test_gates_and_outputs_are_followed_through_what_moves_them():
    with pytest.warns(UserWarning, match="replaced nothing"):
        replace_activations(Gates(), "relu")
    sites = activation_sites(Gates(), ROWS)
    assert [site.is_gate for site in sites] == [True, True, True, False]
    assert [site.is_output for site in sites] == [False, False, False, True]


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


def test_prelu_is_restored_with_the_dtype_of_the_model():
    model = replace_activations(nn.Sequential(nn.Linear(6, 6), nn.PReLU()), "nsw").double()
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
    found = recorder.statistics.compute()
    for name, (h, output) in seen.items():
        h, output = h.double().numpy(), output.double().numpy()
        assert found[f"rho/{name}"].item() == pytest.approx((output**2).mean() / h.var(), rel=1e-5)
    assert found["rho/act"] != found["rho/act#2"]
