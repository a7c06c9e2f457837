"""Checkpoints of models whose activations were replaced: what loads them, and what is noticed."""

import copy
import pickle
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from helpers import Net, batches, loader, quiet_trainer
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import (
    ActivationReplacement,
    fold_normalization,
    load_replaced,
    replace_activations,
    restore_activations,
)
from lightning_noisy.nn import NReLU, NSwish, registry
from lightning_noisy.replacement.record import MARKER
from lightning_noisy.schedules import Linear


class Deep(Net):
    """Tanh and ReLU; the width is a hyperparameter."""

    def __init__(self, width: int = 8):
        super().__init__(nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU()))
        self.save_hyperparameters()
        self.net.append(nn.Linear(width, 3))

    def test_step(self, batch, batch_idx):
        self.net(batch[0])


def fitted(model, path, *, to=None, weights_only=False, **options):
    """Train, with the callback if there is a `to`, and save."""
    tos = [] if to is None else to if isinstance(to, list) else [to]
    trainer = quiet_trainer(callbacks=[ActivationReplacement(each, **options) for each in tos])
    trainer.fit(model, loader(batches(4)))
    trainer.save_checkpoint(path, weights_only=weights_only)
    return model


def assert_same(loaded, model):
    assert repr(loaded) == repr(model)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    x = torch.randn(6, 8)
    loaded, model = (each.net if isinstance(each, Net) else each for each in (loaded.eval(), model.eval()))
    assert torch.equal(loaded(x), model(x))


def without_metadata(path):
    """As something writes it that keeps only the values."""
    checkpoint = torch.load(path)
    checkpoint["state_dict"] = dict(checkpoint["state_dict"])
    torch.save(checkpoint, path)


@pytest.mark.parametrize("to", ["nsw", {"relu": "nrelu", "tanh": "nah(alpha=1.1)"}])
@pytest.mark.parametrize(
    ("by", "weights_only", "named"),
    [
        ("function", False, True),
        ("function", False, False),
        ("function", True, False),
        ("callback", False, False),
        ("callback", True, True),
        ("callback", True, False),
    ],
)
def test_load_replaced_loads_what_function_and_callback_have_swapped(tmp_path, to, weights_only, named, by):
    model = Deep(6) if by == "callback" else replace_activations(Deep(6), to)
    fitted(model, tmp_path / "a.ckpt", to=to if by == "callback" else None, weights_only=weights_only)
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt", to=to if named else None), model)


def test_load_replaced_needs_to_where_only_the_values_were_kept(tmp_path):
    model = fitted(replace_activations(Deep(), {"tanh": "nsw"}), tmp_path / "a.ckpt")
    without_metadata(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"records no replaced activations.*or pass what .* as to="):
        load_replaced(Deep, tmp_path / "a.ckpt")
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt", to={"tanh": "nsw"}), model)
    with pytest.raises(
        ValueError, match=r"(?s)don't fit Deep with its activations replaced by 'nsw'. Pass to=.*net\.3\.alpha"
    ):
        load_replaced(Deep, tmp_path / "a.ckpt", to="nsw")
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt", to="nsw", options={"exclude": "net.3"}), model)


def test_load_replaced_swallows_no_misspelt_name(tmp_path):
    fitted(replace_activations(Deep(), "nsw"), tmp_path / "a.ckpt")
    load = lambda **given: load_replaced(Deep, tmp_path / "a.ckpt", **given)  # noqa: E731
    with pytest.raises(TypeError, match="replace_activations has no option 'gate'; options may have gates, outputs"):
        load(to="nsw", options={"gate": True})
    with pytest.raises(TypeError, match=r"Deep takes no argument 'gates'. Pass it as options=\{'gates': ...\}"):
        load(to="nsw", gates=True)
    with pytest.raises(TypeError, match="Deep takes no argument 'widht'"):
        load(widht=3)
    with pytest.raises(ValueError, match=r"options say how activations were replaced by to="):
        load(options={"gates": True})


def test_load_replaced_refuses_another_replacement_than_the_checkpoints(tmp_path):
    fitted(replace_activations(Deep(), "nsw"), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"net\.1: 'nsw' \(NSwish\(silu\)\) in the checkpoint, 'nrelu' \(NReLU"):
        load_replaced(Deep, tmp_path / "a.ckpt", to="nrelu")


def test_swapped_plain_module_has_only_its_own_keys():
    def keys(module):
        return {name for name, _ in module.named_parameters()} | {
            f"{path}.{name}" if path else name
            for path, each in module.named_modules()
            for name in each._buffers
            if name not in each._non_persistent_buffers_set
        }

    model = replace_activations(Deep().net, {"relu": "nrelu", "tanh": "nah"})
    state = model.state_dict()
    assert set(state) == keys(model)
    plain = restore_activations(copy.deepcopy(model))
    assert set(plain.state_dict()) == keys(plain)
    assert all(set(each) <= {"version"} for each in plain.state_dict()._metadata.values())


def test_checkpoint_of_a_callback_that_replaced_nothing_loads_either_way(tmp_path):
    model = Net(nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="replaced nothing"):
        fitted(model, tmp_path / "a.ckpt", to="nsw")
    loaded = Net.load_from_checkpoint(tmp_path / "a.ckpt", net=nn.Linear(8, 3))
    assert_same(loaded, model)
    assert_same(load_replaced(Net, tmp_path / "a.ckpt", net=nn.Linear(8, 3)), model)


class SwapsItself(Deep):
    def __init__(self, width: int = 8):
        super().__init__(width)
        replace_activations(self, "nsw")


@pytest.mark.parametrize(("callback", "weights_only"), [(False, False), (False, True), (True, False)])
def test_model_that_swaps_itself_loads_by_load_from_checkpoint(tmp_path, callback, weights_only):
    model = fitted(SwapsItself(5), tmp_path / "a.ckpt", to="nsw" if callback else None, weights_only=weights_only)
    assert_same(SwapsItself.load_from_checkpoint(tmp_path / "a.ckpt"), model)
    assert_same(load_replaced(SwapsItself, tmp_path / "a.ckpt"), model)


def test_part_that_was_swapped_alone_is_loaded(tmp_path):
    model = Deep()
    replace_activations(model.net, "nsw")
    fitted(model, tmp_path / "a.ckpt")
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt"), model)


@pytest.mark.parametrize("inner_first", [True, False])
def test_replacements_of_a_part_and_of_the_whole_are_done_again_in_their_order(tmp_path, inner_first):
    model = Deep()
    for part in (model.net, model) if inner_first else (model, model.net):
        replace_activations(part, "nani" if part is model else "nan")
    fitted(model, tmp_path / "a.ckpt")
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt"), model)


def test_replacements_are_done_again_in_their_order(tmp_path):
    model = replace_activations(Deep(), {"tanh": "leaky_relu"})
    replace_activations(model, "normalized")
    fitted(model, tmp_path / "a.ckpt")
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt"), model)
    replace_activations(model, {"leaky_relu": lambda site: NSwish()})
    fitted(model, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="pass it as to="):
        load_replaced(Deep, tmp_path / "a.ckpt")
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt", to={"leaky_relu": NSwish}), model)


def test_model_checkpoint_with_save_weights_only_is_loaded(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="a", save_weights_only=True)
    noise = ActivationReplacement("nah", noise=Linear(9.0, end=1.0, steps=8))
    model = Deep()
    trainer = quiet_trainer(callbacks=[noise, saving], enable_checkpointing=True)
    trainer.fit(model, loader(batches(4)))
    loaded = load_replaced(Deep, tmp_path / "a.ckpt")
    assert_same(loaded, model)
    assert loaded.net[1].c == model.net[1].c == 6.0
    fresh = Deep()
    quiet_trainer(callbacks=[ActivationReplacement("nah")]).test(
        fresh, loader(batches(1)), ckpt_path=tmp_path / "a.ckpt"
    )
    assert fresh.net[3].c == 6.0


def test_load_replaced_does_not_pass_weights_only_to_a_lightning_that_does_not_know_it(tmp_path):
    model = fitted(replace_activations(Deep(), "nsw"), tmp_path / "a.ckpt")

    class Old(Deep):
        @classmethod
        def load_from_checkpoint(cls, checkpoint_path, map_location=None, hparams_file=None, strict=None, **kwargs):
            assert kwargs == {}
            model = cls(**torch.load(checkpoint_path)["hyper_parameters"])
            model.load_state_dict(torch.load(checkpoint_path)["state_dict"])
            return model

    loaded = load_replaced(Old, tmp_path / "a.ckpt")
    assert_same(loaded.net, model.net)


def test_plain_loading_error_has_its_hint_on_lines_of_its_own(tmp_path):
    fitted(Deep(), tmp_path / "a.ckpt", to="nsw")
    with pytest.raises(RuntimeError) as plain:
        Deep.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError) as resumed:
        quiet_trainer().fit(Deep(), loader(batches(1)), ckpt_path=tmp_path / "a.ckpt")
    for message in (str(plain.value), str(resumed.value)):
        lines = [line.strip() for line in message.splitlines()]
        assert "Without a Trainer, load with lightning_noisy.load_replaced(Model, path)." in lines
        assert any(
            re.match(r"For ckpt_path= of a Trainer, give .* the ActivationReplacement callback", x) for x in lines
        )
        assert message.index("load_replaced") < message.index("net.1.alpha")


def run(stage, model, path, *tos):
    trainer = quiet_trainer(callbacks=[ActivationReplacement(to) for to in tos], max_epochs=2)
    getattr(trainer, stage)(model, loader(batches(2)), ckpt_path=path)
    return model


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("kept", ["all", "values alone"])
@pytest.mark.parametrize("other", ["nrelu", {"tanh": "nsw"}, "nsw(beta=0.1)", {"tanh": "nsw", "relu": NReLU}])
def test_checkpoint_of_another_replacement_is_refused_with_both_named(tmp_path, stage, kept, other):
    fitted(Deep(), tmp_path / "a.ckpt", to="nsw")
    if kept == "values alone":
        without_metadata(tmp_path / "a.ckpt")
    named = "not replaced" if other == {"tanh": "nsw"} else "NReLU" if isinstance(other, dict) else other
    with pytest.raises(
        (RuntimeError, MisconfigurationException),
        match=f"net.3: 'nsw' .* in the checkpoint, '?{re.escape(named)}.* in this model"
        if not (kept == "values alone" and other == {"tanh": "nsw"})
        else "Unexpected key",
    ):
        run(stage, Deep(), tmp_path / "a.ckpt", other)


class Lenient(Deep):
    def __init__(self):
        super().__init__()
        self.strict_loading = False


def test_another_replacement_is_loaded_where_loading_is_not_strict(tmp_path):
    fitted(Deep(), tmp_path / "a.ckpt", to="nsw")
    model = run("test", Lenient(), tmp_path / "a.ckpt", "nrelu")
    assert model.net[1].running_rho == torch.load(tmp_path / "a.ckpt")["state_dict"]["net.1.running_rho"]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("to", "other"),
    [
        ("nsw", "nswish(momentum=0.5, synchronized=True)"),
        ("nsw", {"relu": "nsw", "tanh": "nsw"}),
        ({"relu": "nsw", "tanh": "nah"}, {"tanh": "nah", "relu": NSwish}),
        (lambda site: NSwish(), lambda site: NSwish(momentum=0.2)),
    ],
)
def test_what_changes_nothing_in_the_function_is_no_other_replacement(tmp_path, stage, to, other):
    saved = fitted(Deep(), tmp_path / "a.ckpt", to=to)
    model = run(stage, Deep(), tmp_path / "a.ckpt", other)
    if stage != "fit":
        x = torch.randn(4, 8)
        assert torch.equal(model.eval().net(x), saved.eval().net(x))


def test_plain_modules_notice_another_replacement():
    saved = replace_activations(Deep().net, "nsw").state_dict()
    model = replace_activations(Deep().net, "nrelu")
    with pytest.raises(RuntimeError, match=r"1: 'nsw' .* in the checkpoint, 'nrelu' .* in this model"):
        model.load_state_dict(saved)
    model.load_state_dict(saved, strict=False)
    model.load_state_dict(OrderedDict(saved))  # only the values
    restore_activations(model).load_state_dict(Deep().net.state_dict())


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="came with lightning 2.6")
def test_averaged_weights_are_loaded(tmp_path):
    model = Deep()
    trainer = quiet_trainer(callbacks=[ActivationReplacement("nsw"), callbacks.WeightAveraging()])
    trainer.fit(model, loader(batches(4)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    load_replaced(Deep, tmp_path / "a.ckpt")
    again = quiet_trainer(callbacks=[ActivationReplacement("nsw"), callbacks.WeightAveraging()], max_epochs=2)
    again.fit(Deep(), loader(batches(4)), ckpt_path=tmp_path / "a.ckpt")


def test_another_c_is_another_replacement(tmp_path):
    fitted(Deep(), tmp_path / "a.ckpt", to="nah", noise=Linear(9.0))
    with pytest.raises(RuntimeError, match=r"net.3: 'nah' .*c=0.5 at .* checkpoint, 'nah\(c=3\)' .*c=3 at the start"):
        run("test", Deep(), tmp_path / "a.ckpt", "nah(c=3)")


class Own(nn.Module):
    """An activation that shows no options."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return self.slope * x.tanh()


def test_options_of_registered_activations_are_compared(tmp_path):
    registry.register("own")(Own)
    try:
        fitted(Deep(), tmp_path / "a.ckpt", to="own(slope=2)")
        run("test", Deep(), tmp_path / "a.ckpt", "own( slope=2 )")
        with pytest.raises(RuntimeError, match=r"net.3: 'own\(slope=2\)' .* 'own\(slope=3\)' .* in this model"):
            run("test", Deep(), tmp_path / "a.ckpt", "own(slope=3)")
    finally:
        registry.unregister("own")


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoint_of_activations_without_parameters_does_not_load_the_plain_way(tmp_path, weights_only, averaged):
    if averaged and not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("WeightAveraging came with lightning 2.6")

    def fit(model, *others, **options):
        own = [ActivationReplacement("gelu"), *([callbacks.WeightAveraging()] if averaged else []), *others]
        trainer = quiet_trainer(callbacks=own, enable_checkpointing=bool(others), max_epochs=2)
        trainer.fit(model, loader(batches(4)), **options)

    model = Deep()
    fit(model, ModelCheckpoint(tmp_path, "a", save_weights_only=weights_only))
    with pytest.raises(RuntimeError, match=r"load with lightning_noisy.load_replaced\(Model, path\)"):
        Deep.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(load_replaced(Deep, tmp_path / "a.ckpt").net[1]) is nn.GELU
    if not weights_only:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty")
            fit(Deep(), ModelCheckpoint(tmp_path, "a"), ckpt_path=tmp_path / "a.ckpt")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.on_save_checkpoint(checkpoint := {"state_dict": each.state_dict()})
        assert f"net.1.{MARKER}" in checkpoint["state_dict"]
        assert each.on_save_checkpoint.args[0] is each
    restore_activations(model).on_save_checkpoint(checkpoint := {"state_dict": model.state_dict()})
    assert checkpoint["state_dict"].keys() == Deep().state_dict().keys()


class Hooked(Deep):
    """Keeps something of its own in its checkpoints, and other names of its parameters."""

    epochs = 0

    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = 7
        checkpoint["state_dict"] = {f"_{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        self.epochs = checkpoint["own"]
        checkpoint["state_dict"] = {name.removeprefix("_"): v for name, v in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_hooks_of_the_model_are_called(tmp_path, weights_only):
    model = fitted(Hooked(), tmp_path / "a.ckpt", to="nsw", weights_only=weights_only)
    loaded = load_replaced(Hooked, tmp_path / "a.ckpt", to="nsw" if weights_only else None)
    assert loaded.epochs == 7
    assert_same(loaded, model)


def test_load_replaced_leaves_the_class_as_it_was(tmp_path):
    fitted(replace_activations(Deep(), "nsw"), tmp_path / "a.ckpt")
    before = dict(vars(Deep))
    load_replaced(Deep, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="don't fit"):
        load_replaced(Deep, tmp_path / "a.ckpt", width=5)
    assert dict(vars(Deep)) == before


def test_checkpoint_of_a_folded_model_is_one_of_the_plain_model(tmp_path):
    model = fitted(Deep(), tmp_path / "a.ckpt", to="nsw")
    trainer = quiet_trainer(callbacks=[ActivationReplacement("nsw")])
    trainer.validate(model, loader(batches(1)), verbose=False)
    x = torch.randn(6, 8)
    fold_normalization(model.net, x)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    plain = Deep.load_from_checkpoint(tmp_path / "b.ckpt")
    plain.net[1], plain.net[3] = nn.SiLU(), nn.SiLU()
    assert torch.equal(plain.net(x), model.eval().net(x))
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"net.1: not replaced in the checkpoint, 'nsw' \(NSwish\(silu\)\) in this"):
        run("test", Deep(), tmp_path / "b.ckpt", "nsw")


def test_two_callbacks_resume_test_and_load(tmp_path):
    tos = [{"relu": "nsw"}, {"tanh": "nah"}]
    model = fitted(Deep(), tmp_path / "a.ckpt", to=tos)
    assert [type(model.net[i]).__name__ for i in (1, 3)] == ["NAH", "NSwish"]
    assert_same(load_replaced(Deep, tmp_path / "a.ckpt"), model)
    assert_same(run("test", Deep(), tmp_path / "a.ckpt", *tos), model)
    assert_same(run("validate", Deep(), tmp_path / "a.ckpt", *reversed(tos)), model)
    run("fit", Deep(), tmp_path / "a.ckpt", *tos)
