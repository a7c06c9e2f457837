"""Models whose activations were replaced: overlapping callbacks, averaged weights, models that load others."""

import argparse
import copy
import gc
import io
import weakref

import lightning as L
import pytest
import torch
from helpers import Net, batches, loader, quiet_trainer
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_noisy import (
    ActivationReplacement,
    GradientNoise,
    load_replaced,
    replace_activations,
    restore_activations,
)
from lightning_noisy.nn import NReLU, NSwish
from lightning_noisy.schedules import Linear


def layers():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Two(Net):
    def __init__(self):
        super().__init__(layers())

    def test_step(self, batch, batch_idx):
        self.net(batch[0])


class OfNet(Two):
    """Replaces in a part of itself."""

    def __init__(self):
        super().__init__()
        replace_activations(self.net, "nsw")


class OfAll(Two):
    def __init__(self):
        super().__init__()
        replace_activations(self, "nsw")


def fit(model, *own, path=None, **options):
    trainer = quiet_trainer(callbacks=list(own), **options)
    trainer.fit(model, loader(batches(4)))
    if path is not None:
        trainer.save_checkpoint(path)
    return trainer


def overlapping():
    return ActivationReplacement("nsw"), ActivationReplacement("nrelu", include="net.1")


@pytest.mark.parametrize("again", ["test", "fit", "new callbacks", "new callbacks after a test"])
def test_overlapping_callbacks_keep_what_was_learned(again):
    model = Two()
    trainer = fit(model, *overlapping())
    assert [type(model.net[i]) for i in (1, 3)] == [NReLU, NSwish]
    kept, alpha = [model.net[i] for i in (1, 3)], model.net[1].alpha.item()
    if again in ("test", "new callbacks after a test"):
        trainer.test(model, loader(batches(1)), verbose=False)
    if again == "fit":
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, loader(batches(4)))
    if again.startswith("new"):
        quiet_trainer(callbacks=list(overlapping())).test(model, loader(batches(1)), verbose=False)
    assert all(model.net[i] is module for i, module in zip((1, 3), kept, strict=True))
    assert (model.net[1].alpha.item() == alpha) == (again != "fit")
    assert alpha != 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_processes_that_train_copies_of_the_model_are_refused(strategy):
    model = Two()
    with pytest.raises(Exception, match=r"Call replace_activations\(model, 'nsw'\) before fit"):
        fit(model, ActivationReplacement("nsw"), strategy=strategy, devices=2)


@pytest.mark.slow
def test_what_was_swapped_before_such_processes_is_trained():
    model = replace_activations(Two(), "nsw")
    fit(model, ActivationReplacement("nsw"), strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    assert model.net[1].alpha != 0


@pytest.mark.parametrize(("saved", "here"), [("nrelu", "nsw"), ("gelu", "silu")])
def test_another_replacement_is_noticed_whatever_module_was_swapped(tmp_path, saved, here):
    model = Two()
    replace_activations(model.net, saved)
    fit(model, path=tmp_path / "a.ckpt")
    message = f"net.1: '{saved}' .* in the checkpoint, '{here}' .* in this model"
    with pytest.raises((RuntimeError, MisconfigurationException), match=message):
        quiet_trainer(callbacks=[ActivationReplacement(here)]).test(
            Two(), loader(batches(1)), ckpt_path=tmp_path / "a.ckpt"
        )
    weights = torch.load(tmp_path / "a.ckpt")["state_dict"]
    with pytest.raises(RuntimeError, match=message):
        replace_activations(Two(), here).load_state_dict(weights)
    model = replace_activations(Two(), saved)
    other = Two()
    replace_activations(other.net, here)
    with pytest.raises(RuntimeError, match=message.replace("net.1", "1")):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("model", [OfNet, OfAll])
def test_checkpoint_of_a_callback_loads_where_the_same_was_swapped_by_the_function(tmp_path, model):
    trained = Two()
    fit(trained, ActivationReplacement("nsw"), path=tmp_path / "a.ckpt")
    loaded = model.load_from_checkpoint(tmp_path / "a.ckpt")
    quiet_trainer(callbacks=[ActivationReplacement("nsw")]).test(
        model(), loader(batches(1)), ckpt_path=tmp_path / "a.ckpt"
    )
    weights = torch.load(tmp_path / "a.ckpt")["state_dict"]
    part = replace_activations(layers(), "nsw")
    part.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
    x = torch.randn(5, 8)
    expected = trained.eval().net(x)
    assert torch.equal(loaded.eval().net(x), expected)
    assert torch.equal(part.eval()(x), expected)


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="came with lightning 2.6")
def test_averaged_weights_have_the_c_of_the_schedule_and_say_what_was_replaced(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_validation_batch_end(self, trainer, module, *_):
            if not trainer.sanity_checking:
                seen.append(module.net[1].c.item())

    own = [
        ActivationReplacement("nah", noise=Linear(30.0, end=0.0)),
        callbacks.EMAWeightAveraging(decay=0.99),
        ModelCheckpoint(tmp_path, "a", save_last=True),
        Watch(),
    ]
    model = Two()
    trainer = quiet_trainer(callbacks=own, max_epochs=3, enable_checkpointing=True)
    trainer.fit(model, loader(batches(4)), loader(batches(1)))
    assert seen == pytest.approx([30 * (1 - t / 12) for t in (3, 7, 11)])
    assert model.net[1].c.item() == pytest.approx(30 / 12)
    assert load_replaced(Two, tmp_path / "last.ckpt").net[1].c == model.net[1].c
    weights = torch.load(tmp_path / "last.ckpt")["state_dict"]
    same = replace_activations(Two(), "nah")
    same.load_state_dict(weights)
    assert same.net[1].c == model.net[1].c
    with pytest.raises(RuntimeError, match=r"net.1: 'nah' .* in the checkpoint, 'nrelu' .* in this model"):
        replace_activations(Two(), "nrelu").load_state_dict(weights)


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="came with lightning 2.6")
def test_averaged_weights_of_a_model_that_replaces_in_its_init_keep_c_and_say_what_was_replaced(tmp_path):
    class Own(Two):
        def __init__(self, to="nah"):
            super().__init__()
            self.save_hyperparameters()
            replace_activations(self, to)

    model = Own()
    for i in (1, 3):
        model.net[i].c.fill_(3.0)
    own = [callbacks.EMAWeightAveraging(decay=0.99), ModelCheckpoint(tmp_path, "a", save_last=True)]
    quiet_trainer(callbacks=own, enable_checkpointing=True).fit(model, loader(batches(4)))
    assert Own.load_from_checkpoint(tmp_path / "last.ckpt").net[1].c == 3.0
    with pytest.raises(RuntimeError, match=r"net.1: 'nah' .* in the checkpoint, 'nrelu' .* in this model"):
        Own.load_from_checkpoint(tmp_path / "last.ckpt", to="nrelu")


@pytest.mark.parametrize("to", ["gelu", "nsw", "nah"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_plain_loading_of_what_the_function_has_changed_says_how_to_load_it(tmp_path, to, weights_only):
    model = replace_activations(Two(), to)
    keys = list(model.state_dict())
    fit(model).save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    assert list(model.state_dict()) == keys
    with pytest.raises(RuntimeError, match=r"load with lightning_noisy.load_replaced\(Model, path\)"):
        Two.load_from_checkpoint(tmp_path / "a.ckpt")
    assert repr(load_replaced(Two, tmp_path / "a.ckpt")) == repr(model)
    fresh = replace_activations(Two(), to)
    fresh.load_state_dict(torch.load(tmp_path / "a.ckpt")["state_dict"])
    x = torch.randn(5, 8)
    assert torch.equal(fresh.eval().net(x), model.eval().net(x))


class Gan(Two):
    """Two optimizers that both step with each batch, in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 4)]


@pytest.mark.parametrize("options", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 32}])
def test_annealing_of_several_optimizers_takes_the_whole_training(options):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.net[1].c.item())

    fit(Gan(), ActivationReplacement("nah", noise=Linear(16.0, end=0.0)), Watch(), **options)
    assert seen == pytest.approx([16.0 - t for t in range(16)])


class Configured(Net):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = layers()


def test_exception_before_configure_model_leaves_the_model_alone():
    class Bad(L.Callback):
        def setup(self, *_, **__):
            raise RuntimeError("no disk")

    model = Configured()
    with pytest.raises(RuntimeError, match="no disk"):
        fit(model, ActivationReplacement("nsw"), Bad())
    assert "configure_model" not in model.__dict__
    fit(model)
    assert type(model.net[1]) is nn.ReLU


class MakesLayersInSetup(Net):
    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        if self.net is None:
            self.net = layers()


def test_layers_that_the_models_setup_makes_are_replaced():
    model = MakesLayersInSetup()
    trainer = fit(model, ActivationReplacement("nah", noise=Linear(2.0)))
    assert [type(model.net[i]).__name__ for i in (1, 3)] == ["NAH", "NAH"]
    assert any(model.net[1].p is p for group in trainer.optimizers[0].param_groups for p in group["params"])
    assert "setup" not in model.__dict__


class Student(Two):
    """Loads another model of its class, or weights, while it is made."""

    def __init__(self, teacher=None, weights=None):
        super().__init__()
        self.save_hyperparameters()
        if weights is not None:
            self.load_state_dict(torch.load(weights))
        self.teacher = None if teacher is None else Student.load_from_checkpoint(teacher)


@pytest.mark.parametrize("by", ["function", "callback"])
def test_models_that_load_others_while_they_are_made_are_loaded(tmp_path, by):
    fit(Student(), path=tmp_path / "teacher.ckpt")
    torch.save(Student().state_dict(), tmp_path / "weights.pt")
    student = Student(str(tmp_path / "teacher.ckpt"), str(tmp_path / "weights.pt"))
    to = {"to": "nsw", "include": "net.*"}
    if by == "function":
        replace_activations(student, to["to"], include=to["include"])
    fit(student, *([ActivationReplacement(**to)] if by == "callback" else []), path=tmp_path / "student.ckpt")
    loaded = load_replaced(Student, tmp_path / "student.ckpt")
    assert type(loaded.teacher.net[1]) is nn.ReLU
    x = torch.randn(5, 8)
    assert torch.equal(loaded.eval().net(x), student.eval().net(x))


def test_load_replaced_takes_what_load_from_checkpoint_takes(tmp_path):
    trained = Two()
    fit(trained, ActivationReplacement("nsw"), path=tmp_path / "a.ckpt")
    x = torch.randn(5, 8)
    content = (tmp_path / "a.ckpt").read_bytes()
    for source in (str(tmp_path / "a.ckpt"), (tmp_path / "a.ckpt").as_uri(), io.BytesIO(content)):
        assert torch.equal(load_replaced(Two, source).eval().net(x), trained.eval().net(x))
    checkpoint = torch.load(tmp_path / "a.ckpt")
    checkpoint["state_dict"]["other"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="other"):
        load_replaced(Two, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="other"):
        loaded = load_replaced(Two, tmp_path / "a.ckpt", strict=False)
    assert torch.equal(loaded.eval().net(x), trained.eval().net(x))
    with pytest.raises(ValueError, match=r"'nsw' .* in the checkpoint, 'nrelu' .* in this model"):
        load_replaced(Two, tmp_path / "a.ckpt", to="nrelu")
    with pytest.warns(UserWarning, match="other"):
        assert type(load_replaced(Two, tmp_path / "a.ckpt", to="nrelu", strict=False).net[1]) is NReLU


def test_checkpoint_without_weights_is_written(tmp_path):
    class NoWeights(Two):
        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]

    fit(NoWeights(), ActivationReplacement("nsw"), path=tmp_path / "a.ckpt")
    assert "state_dict" not in torch.load(tmp_path / "a.ckpt")


def test_stochastic_weight_averaging_warns_of_statistics_it_does_not_refresh():
    with pytest.warns(UserWarning, match="refreshes the running statistics of batch norms alone"):
        fit(Two(), ActivationReplacement("nsw"), StochasticWeightAveraging(swa_lrs=0.01))


def test_stochastic_weight_averaging_beside_other_activations_is_silent():
    fit(Two(), ActivationReplacement("gelu"), StochasticWeightAveraging(swa_lrs=0.01))


def test_fit_without_batches_needs_no_length():
    fit(Two(), ActivationReplacement("nah", noise=Linear(1.0)), limit_train_batches=0)
    fit(Two(), GradientNoise(schedule=Linear(1.0)), limit_train_batches=0)


def test_checkpoint_of_a_plain_model_warns_where_replacements_have_no_parameters(tmp_path):
    fit(Two(), path=tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="was written without ActivationReplacement"):
        quiet_trainer(callbacks=[ActivationReplacement("gelu")], max_epochs=2).fit(
            Two(), loader(batches(4)), ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.mark.parametrize("value", [-0.75, float("nan"), float("inf")])
def test_noise_that_is_no_scale_is_refused(value):
    with pytest.raises(ValueError, match=r"c must be a finite number >= 0, and noise=.* at 2"):
        fit(Two(), ActivationReplacement("nah", noise=lambda t: value if t == 2 else 1.0))


class WithBatchNorm(Net):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.mark.parametrize("moved", [lambda m: m.double().float(), lambda m: m, lambda m: copy.deepcopy(m)])
def test_stripped_batch_norms_give_their_statistics_back(moved):
    model = moved(replace_activations(WithBatchNorm(), "nrelu", batchnorm_affine="strip"))
    fit(model)
    learned = model.net[1].running_mean.clone()
    restore_activations(model)
    assert torch.equal(model.net[1].running_mean, learned)
    assert learned.any()
    restored = restore_activations(
        replace_activations(WithBatchNorm(), "nrelu", batchnorm_affine="strip").double()
    ).double()
    restored.net(torch.randn(5, 8).double())


OPTIONS = argparse.Namespace(slope=0.1, nested={"a": [1]})


def test_callables_that_keep_state_or_read_a_namespace():
    class Counting:
        def __init__(self):
            self.names = []

        def __call__(self, site):
            self.names.append(site.name)
            return NSwish()

    model = Two()
    fit(model, ActivationReplacement(Counting()))
    kept = model.net[1]
    fit(model, ActivationReplacement(Counting()))
    assert model.net[1] is kept

    model = Two()
    to = lambda site: nn.LeakyReLU(OPTIONS.slope)  # noqa: E731
    replace_activations(model, to)
    replace_activations(model, to)
    OPTIONS.slope = 0.9
    replace_activations(model, to)
    assert model.net[1].negative_slope == 0.9


def test_classes_with_a_rewritten_forward_are_collected():
    def made():
        class Calls(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(2, 2)

            def forward(self, x):
                return self.linear(torch.relu(self.linear(x)))

        return Calls

    cls = made()
    model = replace_activations(cls(), "nsw")
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    reference = weakref.ref(cls)
    del cls, model, copied
    gc.collect()
    assert reference() is None
