import copy
import pickle

import lightning as L
import pytest
import torch
import yaml
from helpers import Flat, Net, SpySGD, all_equal, batches, fit, loader, parameters_of, quiet_trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_noisy import GradientNoise
from lightning_noisy.schedules import Constant, InverseDecay


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_gradient_noise_takes_the_seed_of_seed_everything(monkeypatch):
    def run(*, seed=None, everything=None):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if everything is not None:
            L.seed_everything(everything, verbose=False)
        module = Flat(100)
        fit(module, [GradientNoise(eta=1.0, seed=seed)])
        return module.w.detach()

    assert torch.equal(run(everything=7), run(seed=7))
    assert not torch.equal(run(everything=7), run(everything=8))
    assert not torch.equal(run(), run())  # drawn anew


@pytest.mark.parametrize("seed", [None, 5])
def test_resumed_gradient_noise_equals_an_uninterrupted_run(tmp_path, monkeypatch, seed):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    data = batches(10)
    path = tmp_path / "half.ckpt"

    class SaveHalf(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(path)

    torch.manual_seed(0)
    whole = Net()
    fit(whole, [GradientNoise(eta=0.1, seed=seed), SaveHalf()], data)
    resumed = Net()
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=0.1, seed=seed)])
    trainer.fit(resumed, loader(data[5:]), ckpt_path=path)
    assert trainer.global_step == 10
    assert all_equal(parameters_of(whole), parameters_of(resumed))
    (state,) = torch.load(path, weights_only=True)["callbacks"].values()
    assert state["optimizers"][0]["step"] == 5


def test_resuming_with_another_seed_warns_and_uses_it(tmp_path):
    path = tmp_path / "last.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(path)

    fit(Net(), [GradientNoise(seed=1), Save()])
    trainer = quiet_trainer(callbacks=[GradientNoise(seed=2)], max_epochs=2)
    with pytest.warns(UserWarning, match="checkpoint with seed 1"):
        trainer.fit(Net(), loader(batches(4)), ckpt_path=path)


def test_a_checkpoint_without_the_callback_starts_the_noise_with_a_message(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "plain.ckpt")

    fit(Flat(), [Save(), Timer()])
    module = Flat()
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=0.3, seed=0), Timer()], max_epochs=2)
    with pytest.warns(UserWarning, match="written without GradientNoise: its noise starts at t = 0"):
        trainer.fit(module, loader(batches(4)), ckpt_path=tmp_path / "plain.ckpt")
    assert module.seen[0].std().item() == pytest.approx(0.3**0.5, rel=0.012)


def test_two_instances_have_a_state_and_a_stream_each(tmp_path):
    callbacks = [GradientNoise(eta=1.0, gamma=0, seed=0), GradientNoise(schedule=Constant(1.0), seed=0)]
    module = Flat()
    trainer = fit(module, callbacks)
    assert module.seen[0].std().item() == pytest.approx(2**0.5, rel=0.012)  # independent: variances add
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    assert len(torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]) == 2


def test_resumed_gradient_noise_may_have_another_schedule(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(Flat(), [GradientNoise(eta=1.0, seed=1), Save()])
    module = Flat()
    trainer = quiet_trainer(callbacks=[GradientNoise(eta=0.3)], max_epochs=2)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer.fit(module, loader(batches(4)), ckpt_path=tmp_path / "last.ckpt")
    assert module.seen[0].std().item() == pytest.approx(InverseDecay(0.3)(4), rel=0.012)


# With OnExceptionCheckpoint Lightning looks for a checkpoint to go on from, and misses it.
@pytest.mark.filterwarnings("ignore:.*called without a model", "ignore:.*there is no last checkpoint available")
def test_checkpoints_written_after_the_fit_or_on_an_exception_have_the_state(tmp_path):
    class Fails(Flat):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("in the middle")
            return super().training_step(batch, batch_idx)

    def steps(path):
        (state,) = [v for k, v in torch.load(path, weights_only=True)["callbacks"].items() if "GradientNoise" in k]
        return [(noise["seed"], noise["step"]) for noise in state["optimizers"]]

    fit(Flat(10), [GradientNoise(seed=5)]).save_checkpoint(tmp_path / "after.ckpt")
    assert steps(tmp_path / "after.ckpt") == [(5, 4)]
    on_exception = OnExceptionCheckpoint(tmp_path, "crash")
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(Fails(10), [GradientNoise(seed=5), on_exception], enable_checkpointing=True, default_root_dir=tmp_path)
    assert steps(tmp_path / "crash.ckpt") == [(5, 3)]


def test_a_checkpoint_that_was_validated_does_not_reach_the_next_fit(tmp_path):
    fit(Net(), [GradientNoise(seed=5)]).save_checkpoint(tmp_path / "old.ckpt")
    callback = GradientNoise(seed=6)
    trainer = quiet_trainer(callbacks=[callback])
    model = Net()
    trainer.validate(model, loader(batches(1)), ckpt_path=tmp_path / "old.ckpt", verbose=False)
    trainer.fit(model, loader(batches(3)))
    assert callback.state_dict() == {"optimizers": [{"seed": 6, "stream": "0.0", "step": 3}]}


def test_a_fit_that_failed_to_resume_does_not_reach_the_next_one(tmp_path):
    class Fails(Net):
        def configure_optimizers(self):
            raise RuntimeError("before the optimizers are there")

    fit(Net(), [GradientNoise(seed=5)]).save_checkpoint(tmp_path / "old.ckpt")
    callback = GradientNoise(seed=5)
    trainer = quiet_trainer(callbacks=[callback])
    with pytest.raises(RuntimeError, match="before the optimizers"):
        trainer.fit(Fails(), loader(batches(1)), ckpt_path=tmp_path / "old.ckpt")
    fit(Net(), [callback], batches(2))
    assert callback.state_dict() == {"optimizers": [{"seed": 5, "stream": "0.0", "step": 2}]}


@pytest.mark.filterwarnings("ignore:The .* does not have many workers", "ignore:.*treespec")
def test_learning_rate_finder_leaves_the_noise_at_its_start(tmp_path):
    class Tunable(Net):
        lr = 0.1

        def configure_optimizers(self):
            return SpySGD(self.parameters(), lr=self.lr)

    callback = GradientNoise(seed=0)
    trainer = quiet_trainer(callbacks=[callback], default_root_dir=tmp_path, enable_checkpointing=True)
    model = Tunable()
    Tuner(trainer).lr_find(model, loader(batches(30)), num_training=20, update_attr=False)
    trainer.fit(model, loader(batches(3)))
    assert callback.state_dict() == {"optimizers": [{"seed": 0, "stream": "0.0", "step": 3}]}


def test_gradient_noise_leaves_no_hook_behind_after_fits_and_exceptions():
    class Fails(Flat):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("in the middle")
            return super().training_step(batch, batch_idx)

    callback = GradientNoise(eta=1.0, seed=0)
    trainer = quiet_trainer(callbacks=[callback])
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(hooks(trainer.optimizers[0]))

    trainer.callbacks.append(Watch())
    for model in (Flat(10), Flat(10)):
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(model, loader(batches(4)))
        assert hooks(trainer.optimizers[0]) == 0
    with pytest.raises(RuntimeError, match="in the middle"):
        quiet_trainer(callbacks=[callback]).fit(failing := Fails(10), loader(batches(4)))
    assert hooks(failing.optimizers().optimizer) == 0
    assert seen == [2] * len(seen)
    assert len(seen) == 8


def test_gradient_noise_of_a_second_fit_starts_at_t_zero():
    callback = GradientNoise(eta=0.3, seed=0)
    for _ in range(2):
        module = Flat()
        fit(module, [callback])
        assert module.seen[0].std().item() == pytest.approx(0.3**0.5, rel=0.012)


def test_copies_of_the_callback_work_on_their_own():
    original = GradientNoise(eta=1.0, seed=0)
    results = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            self.twins = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]

    copier = Copy()
    module = Flat(100)
    fit(module, [original, copier])
    for callback in copier.twins:
        twin = Flat(100)
        fit(twin, [callback])
        results.append(torch.equal(twin.w, module.w))
    assert results == [True, True]


@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_batch_size_finder_leaves_the_noise_at_its_start(tmp_path):
    class Data(L.LightningDataModule):
        batch_size = 2

        def train_dataloader(self):
            return torch.utils.data.DataLoader(batches(64, 1), batch_size=self.batch_size, collate_fn=lambda b: b[0])

        def val_dataloader(self):
            return loader(batches(1))

    callback = GradientNoise(seed=0)
    trainer = quiet_trainer(callbacks=[callback], default_root_dir=tmp_path, enable_checkpointing=True, max_steps=3)
    model, data = Net(), Data()
    Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=2)
    trainer.fit(model, data)
    assert data.batch_size > 2
    assert callback.state_dict() == {"optimizers": [{"seed": 0, "stream": "0.0", "step": 3}]}


def test_instances_with_the_same_schedule_resume_side_by_side(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "both.ckpt")

    def both():
        return [GradientNoise(eta=1.0, seed=0, name=name) for name in "ab"]

    module, resumed = Flat(1000), Flat(1000)
    fit(module, [*both(), Save()])
    trainer = quiet_trainer(callbacks=[*both(), Save()])
    trainer.fit(resumed, loader(batches(4)), ckpt_path=tmp_path / "both.ckpt")
    assert all_equal(resumed.seen, module.seen[2:])
    assert module.seen[0].std().item() == pytest.approx(2**0.5, rel=0.1)  # independent: variances add


def test_the_seed_is_in_the_hyperparameters_beside_the_models_own(tmp_path):
    class Configured(Flat):
        def __init__(self, size=100):
            super().__init__(size)
            self.save_hyperparameters()

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(Configured(), [GradientNoise(seed=7)], logger=logger)
    assert logger.hparams == {"size": 100, "gradient_noise_seed": 7}
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text()) == {"size": 100, "gradient_noise_seed": 7}


def test_a_resumed_run_logs_the_checkpoints_seed(tmp_path):
    trainer = fit(Flat(10), [GradientNoise(seed=7)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = quiet_trainer(callbacks=[GradientNoise()], max_epochs=2, logger=logger)
    trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "last.ckpt")
    assert logger.hparams["gradient_noise_seed"] == 7


class SaveAt(L.Callback):
    """Writes a checkpoint after a number of steps."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_instances_find_their_state_by_name_in_any_order_and_with_any_schedule(tmp_path):
    fit(Flat(10), [GradientNoise(seed=0, name="a"), SaveAt(tmp_path / "a.ckpt", 2)])
    both = [GradientNoise(eta=0.5, seed=0, name=name) for name in "ba"]
    trainer = quiet_trainer(callbacks=[*both, SaveAt("", 0)])
    with pytest.warns(UserWarning, match=r"has no state of GradientNoise\{'name': 'b'\}: its noise starts at t = 0"):
        trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "a.ckpt")
    states = [callback.state_dict()["optimizers"][0] for callback in both]
    assert states == [{"seed": 0, "stream": "'b'.0", "step": 2}, {"seed": 0, "stream": "'a'.0", "step": 4}]


def test_two_instances_never_add_the_same_noise(tmp_path):
    fit(Flat(10), [GradientNoise(eta=1.0, seed=0), SaveAt(tmp_path / "one.ckpt", 2)])
    callbacks = [GradientNoise(eta=0.5, seed=0), GradientNoise(eta=1.0, seed=0), SaveAt("", 0)]
    trainer = quiet_trainer(callbacks=callbacks)
    with (
        pytest.warns(UserWarning, match="has no state of"),
        pytest.raises(MisconfigurationException, match="Give each a name"),
    ):
        trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "one.ckpt")


def test_the_logged_seed_is_the_one_of_a_checkpoint_that_is_restored_late(tmp_path):
    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    fit(Flat(10), [GradientNoise(seed=7), SaveAt(tmp_path / "last.ckpt", 2)])
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    trainer = quiet_trainer(callbacks=[GradientNoise(), SaveAt("", 0)], strategy=Late("cpu"), logger=logger)
    trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "last.ckpt")
    assert logger.experiment.hparams["gradient_noise_seed"] == 7


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"optimizers": None},
        {"optimizers": [{"seed": 0, "stream": "0.0", "step": 3}, {"seed": 0, "stream": "0.0", "step": -1}]},
        {"optimizers": [{"seed": 0, "stream": "0.0"}]},
        {"optimizers": [{"seed": "0", "stream": "0.0", "step": 1}]},
        {"optimizers": [{"seed": 0, "stream": None, "step": 1}]},
        {"optimizers": [{"seed": 0, "stream": "0.0", "step": "1"}]},
        {"optimizers": ["0"]},
        "0",
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state):
    callback = GradientNoise(eta=1.0, seed=0)
    messages = []

    class Loads(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            with pytest.raises(ValueError, match=r"has a state of \{") as caught:
                callback.load_state_dict(state)
            messages.append(str(caught.value))

    with pytest.raises(ValueError, match="has a state of"):
        callback.load_state_dict(state)
    fit(model := Flat(100), [callback, Loads()])
    fit(plain := Flat(100), [GradientNoise(eta=1.0, seed=0)])
    assert torch.equal(model.w, plain.w)
    assert len(messages) == 4
    assert all("\n" not in message for message in messages)


def test_the_state_of_another_callback_is_not_taken(tmp_path):
    class GradientNoiseScale(L.Callback):
        def state_dict(self):
            return {"scale": 1.0}

    fit(Flat(10), [GradientNoiseScale()]).save_checkpoint(tmp_path / "other.ckpt")
    trainer = quiet_trainer(callbacks=[GradientNoise(seed=0), GradientNoiseScale()], max_epochs=2)
    with pytest.warns(UserWarning, match="was written without GradientNoise: its noise starts at t = 0"):
        trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.parametrize(("writes", "reads"), [(0, 1), (1, 0), (1, 1)])
def test_a_subclass_and_its_base_find_each_others_state(tmp_path, writes, reads):
    class Mine(GradientNoise):
        pass

    classes = [GradientNoise, Mine]
    fit(Flat(10), [classes[writes](seed=0)]).save_checkpoint(tmp_path / "base.ckpt")
    callback = classes[reads](seed=0)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2)
    trainer.fit(Flat(10), loader(batches(4)), ckpt_path=tmp_path / "base.ckpt")  # warnings are errors
    assert callback.state_dict()["optimizers"][0]["step"] == 8


@pytest.mark.parametrize("names", [("", "0"), ("noise0", "", ""), ("", "noise0", ""), ("#0", "", "0")])
def test_instances_never_share_a_stream_or_a_tag(names):
    callbacks = [GradientNoise(eta=0.1 * (i + 1), seed=0, name=name) for i, name in enumerate(names)]
    trainer = fit(Flat(10), callbacks)
    streams = [callback.state_dict()["optimizers"][0]["stream"] for callback in callbacks]
    assert len(set(streams)) == len(names)
    tags = [tag for tag in trainer.callback_metrics if tag.startswith("gradient_noise/std")]
    assert len(tags) == len(names)
    for callback, name in zip(callbacks, names, strict=True):
        assert not name or f"gradient_noise/std/{name}" in tags
        assert callback.name == name
